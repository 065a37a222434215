//! The link with scripted guests: correct, slow and hostile ones.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::os::paths::vm_files;
use crate::os::socket;

mod again;

const LIMIT: Duration = Duration::from_secs(60);

/// The guest's end of one link.
struct Guest {
    _directory: tempfile::TempDir,
    listener: UnixListener,
}

struct Talk {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Guest {
    fn new() -> (Self, Link) {
        Self::known_to(Patience::default())
    }

    fn known_to(patience: Patience) -> (Self, Link) {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket::bind_in_tokio(directory.path(), vm_files::VSOCK).unwrap();
        let link = Link::start_with(directory.path(), 200, patience);
        (Self { _directory: directory, listener }, link)
    }

    async fn accept(&self) -> Talk {
        self.accept_offering(json!({})).await
    }

    async fn accept_offering(&self, capabilities: Value) -> Talk {
        let (stream, _): (UnixStream, _) = timeout(LIMIT, self.listener.accept()).await.unwrap().unwrap();
        let (read, write) = stream.into_split();
        let mut talk = Talk { read: BufReader::new(read), write };
        assert_eq!(talk.text().await, "CONNECT 200");
        // The handshake's answer and the first frame arrive in one piece: no byte may be lost.
        talk.raw(b"OK 1073741824\n").await;
        let hello = talk.hear().await;
        assert_eq!(hello["method"], "initialize");
        talk.say(&json!({"jsonrpc": "2.0", "id": hello["id"], "result": {"protocolVersion": "2025-11-25",
            "capabilities": capabilities, "serverInfo": {"name": "fake", "version": "0"}}}))
            .await;
        assert_eq!(talk.hear().await["method"], "notifications/initialized");
        talk
    }

    async fn up() -> (Self, Link, Talk) {
        let (guest, link) = Self::new();
        let talk = guest.accept().await;
        assert!(link.is_up_within(LIMIT).await);
        (guest, link, talk)
    }
}

impl Talk {
    async fn text(&mut self) -> String {
        let mut line = String::new();
        timeout(LIMIT, self.read.read_line(&mut line)).await.unwrap().unwrap();
        line.trim_end().to_owned()
    }

    async fn hear(&mut self) -> Value {
        serde_json::from_str(&self.text().await).unwrap()
    }

    async fn raw(&mut self, bytes: &[u8]) {
        self.write.write_all(bytes).await.unwrap();
    }

    async fn say(&mut self, message: &Value) {
        self.raw(format!("{message}\n").as_bytes()).await;
    }

    async fn result(&mut self, id: &Value, result: Value) {
        self.say(&json!({"jsonrpc": "2.0", "id": id, "result": result})).await;
    }

    /// Answers calls up to and including one of the tool `last`.
    async fn serve(&mut self, last: &str) {
        loop {
            let call = self.hear().await;
            self.result(&call["id"], json!({"content": [], "of": call["params"]})).await;
            if call["params"]["name"] == last {
                return;
            }
        }
    }
}

/// Options of a test's call.
struct CallOptions {
    deadline: Duration,
    progress: Option<mpsc::Sender<GuestProgress>>,
    cancel: CancellationToken,
}

impl CallOptions {
    fn deadline(deadline: Duration) -> Self {
        Self { deadline, progress: None, cancel: CancellationToken::new() }
    }
}

/// Forwards the progress and outcome of a call.
struct Hearing {
    outcome: oneshot::Sender<Result<Box<RawValue>, LinkError>>,
    progress: Option<mpsc::Sender<GuestProgress>>,
}

impl CallSink for Hearing {
    fn progress(&mut self, progress: GuestProgress) {
        self.progress.as_ref().unwrap().try_send(progress).unwrap();
    }

    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>) {
        let _ = self.outcome.send(outcome.map(ToOwned::to_owned));
    }
}

/// Calls a tool. The call is cancelled when the task is.
fn start(
    link: &Link,
    tool: &str,
    options: CallOptions,
) -> tokio::task::JoinHandle<Result<Box<RawValue>, LinkError>> {
    let (link, tool) = (link.clone(), tool.to_owned());
    tokio::spawn(async move {
        assert!(link.is_up_within(LIMIT).await);
        let (outcome, ended) = oneshot::channel();
        let wants_progress = options.progress.is_some();
        let sink = Box::new(Hearing { outcome, progress: options.progress });
        let arguments = |out: &mut Vec<u8>| out.extend_from_slice(br#"{"x":1}"#);
        let call = link.begin(
            &tool,
            arguments,
            CallMeta { wants_progress, ..CallMeta::default() },
            options.deadline,
            sink,
        );
        let call = call.map_err(|(error, _)| error)?;
        link.flush();
        let _guard = CancelOnDrop { link: &link, call };
        tokio::pin!(ended);
        tokio::select! {
            ended = &mut ended => ended.unwrap(),
            () = options.cancel.cancelled() => {
                link.cancel(call);
                ended.await.unwrap()
            }
        }
    })
}

fn plain() -> CallOptions {
    CallOptions::deadline(LIMIT)
}

async fn ended(call: tokio::task::JoinHandle<Result<Box<RawValue>, LinkError>>) -> Result<Value, LinkError> {
    let outcome = timeout(LIMIT, call).await.unwrap().unwrap();
    outcome.map(|raw| serde_json::from_str(raw.get()).unwrap())
}

#[tokio::test]
async fn calls_are_multiplexed() {
    let (_guest, link, mut talk) = Guest::up().await;
    let calls: Vec<_> = (0..50).map(|i| start(&link, &format!("tool{i}"), plain())).collect();
    let mut heard = Vec::new();
    for _ in 0..50 {
        heard.push(talk.hear().await);
    }
    for call in heard.iter().rev() {
        talk.result(&call["id"], json!({"content": [], "of": call["params"]})).await;
    }
    for (i, call) in calls.into_iter().enumerate() {
        let result = ended(call).await.unwrap();
        assert_eq!(result["of"], json!({"name": format!("tool{i}"), "arguments": {"x": 1}}));
    }
}

#[tokio::test]
async fn progress_comes_through_while_it_grows() {
    let (_guest, link, mut talk) = Guest::up().await;
    let (sender, mut progress) = mpsc::channel(16);
    let call = start(&link, "slow", CallOptions { progress: Some(sender), ..plain() });
    let heard = talk.hear().await;
    let token = heard["params"]["_meta"]["progressToken"].clone();
    let note = |token: &Value, value: f64| {
        json!({"jsonrpc": "2.0", "method": "notifications/progress",
            "params": {"progressToken": token, "progress": value, "message": "m".repeat(10_000)}})
    };
    for value in [1.0, 3.0, 2.0, 3.0, 4.0] {
        talk.say(&note(&token, value)).await;
    }
    talk.say(&note(&json!(987_654), 9.0)).await;
    talk.result(&heard["id"], json!({})).await;
    ended(call).await.unwrap();
    talk.say(&note(&token, 5.0)).await;
    let mut seen = Vec::new();
    while let Some(p) = timeout(LIMIT, progress.recv()).await.unwrap() {
        assert_eq!(p.message.unwrap().len(), 500);
        seen.push(p.progress);
    }
    assert_eq!(seen, [1.0, 3.0, 4.0]);
}

#[tokio::test]
async fn cancelling_tells_the_guest_its_own_id() {
    let (_guest, link, mut talk) = Guest::up().await;
    let cancel = CancellationToken::new();
    let call = start(&link, "slow", CallOptions { cancel: cancel.clone(), ..plain() });
    let heard = talk.hear().await;
    cancel.cancel();
    assert_eq!(ended(call).await, Err(LinkError::Cancelled));
    let told = talk.hear().await;
    assert_eq!(
        (&told["method"], &told["params"]["requestId"]),
        (&json!("notifications/cancelled"), &heard["id"])
    );
    // The late answer is dropped. So is the call of a caller that goes away.
    talk.result(&heard["id"], json!({})).await;
    let gone = start(&link, "gone", plain());
    let heard = talk.hear().await;
    gone.abort();
    assert_eq!(talk.hear().await["params"]["requestId"], heard["id"]);
    let next = start(&link, "next", plain());
    talk.serve("next").await;
    ended(next).await.unwrap();
}

#[tokio::test]
async fn a_deadline_ends_a_call_that_is_never_answered() {
    let (_guest, link, mut talk) = Guest::up().await;
    let after = Duration::from_millis(120);
    let call = start(&link, "never", CallOptions::deadline(after));
    let heard = talk.hear().await;
    assert_eq!(ended(call).await, Err(LinkError::Deadline { after }));
    assert_eq!(talk.hear().await["params"]["requestId"], heard["id"]);
}

#[tokio::test]
async fn a_lost_link_fails_calls_at_once_and_is_dialled_again_without_replay() {
    let (guest, link, mut talk) = Guest::up().await;
    let call = start(&link, "lost", plain());
    talk.hear().await;
    let lost = tokio::time::Instant::now();
    drop(talk);
    assert!(matches!(ended(call).await, Err(LinkError::Down { .. })));
    assert!(lost.elapsed() < LIMIT / 2, "it did not wait for its deadline");
    // A call that begins while the link is connecting waits for it.
    let next = start(&link, "next", plain());
    let mut talk = guest.accept().await;
    let first = talk.hear().await;
    assert_eq!(first["params"]["name"], "next", "nothing is sent a second time");
    talk.result(&first["id"], json!({})).await;
    ended(next).await.unwrap();
}

#[tokio::test]
async fn closing_is_final() {
    let (guest, link, mut talk) = Guest::up().await;
    let call = start(&link, "x", plain());
    talk.hear().await;
    link.close("the VM stops");
    assert_eq!(ended(call).await, Err(LinkError::Down { why: "the VM stops".into() }));
    assert!(!link.is_up_within(LIMIT).await);
    // A call that waits for the link fails as well.
    let (_deaf, dialling) = Guest::new();
    let (is_up, ()) = tokio::join!(timeout(LIMIT, dialling.is_up_within(2 * LIMIT)), async {
        tokio::task::yield_now().await;
        dialling.close("the VM stops");
    });
    assert_eq!(is_up, Ok(false));
    let mut rest = Vec::new();
    timeout(LIMIT, talk.read.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(timeout(Duration::from_millis(200), guest.listener.accept()).await.is_err());
}

#[tokio::test]
async fn answers_that_are_none_fail_their_call_only() {
    let (_guest, link, mut talk) = Guest::up().await;
    let big = "x".repeat(nexus_schema::limits::GUEST_RESULT_MAX + 1);
    for (answer, expected) in [
        (r#""result":[]"#.to_owned(), LinkError::Misbehaved { what: "not an object" }),
        (
            r#""result":{},"error":{}"#.to_owned(),
            LinkError::Misbehaved { what: "both a result and an error" },
        ),
        (format!(r#""result":{{"x":"{big}"}}"#), LinkError::TooLarge),
        (
            r#""error":{"code":-32602,"message":"no\tsuch"}"#.to_owned(),
            LinkError::Refused { code: -32602, message: "no\tsuch".into(), data: None },
        ),
        (
            r#""error":{"code":-32602,"message":"no\u0007 such"}"#.to_owned(),
            LinkError::Misbehaved { what: "control characters in an error" },
        ),
        (
            r#""error":{"code":-32602,"message":"\ud800"}"#.to_owned(),
            LinkError::Misbehaved { what: "a malformed error" },
        ),
        (r#""error":"bad""#.to_owned(), LinkError::Misbehaved { what: "a malformed error" }),
    ] {
        let call = start(&link, "x", plain());
        let heard = talk.hear().await;
        talk.raw(format!("{{\"jsonrpc\":\"2.0\",\"id\":{},{answer}}}\n", heard["id"]).as_bytes()).await;
        assert_eq!(ended(call).await, Err(expected));
    }
    let call = start(&link, "good", plain());
    talk.serve("good").await;
    ended(call).await.unwrap();
}

#[tokio::test]
async fn a_line_of_17_mib_fails_its_call_and_the_link_lives() {
    let (_guest, link, mut talk) = Guest::up().await;
    for id_first in [true, false] {
        let call = start(&link, "huge", plain());
        let other = start(&link, "other", plain());
        let (one, two) = (talk.hear().await, talk.hear().await);
        let (huge, small) = if one["params"]["name"] == "huge" { (one, two) } else { (two, one) };
        let text = "x".repeat(17 << 20);
        let line = if id_first {
            format!("{{\"jsonrpc\":\"2.0\",\"id\":{},\"result\":{{\"x\":\"{text}\"}}}}\n", huge["id"])
        } else {
            format!("{{\"result\":{{\"x\":\"{text}\"}},\"jsonrpc\":\"2.0\",\"id\":{}}}\n", huge["id"])
        };
        talk.raw(line.as_bytes()).await;
        assert_eq!(ended(call).await, Err(LinkError::TooLarge));
        talk.result(&small["id"], json!({"content": []})).await;
        ended(other).await.unwrap();
    }
}

#[tokio::test]
async fn a_result_that_never_ends_loses_the_link() {
    let (guest, link, mut talk) = Guest::up().await;
    let call = start(&link, "endless", plain());
    let other = start(&link, "other", plain());
    talk.hear().await;
    talk.hear().await;
    let flood = tokio::spawn(async move {
        let chunk = vec![b'x'; 1 << 20];
        while talk.write.write_all(&chunk).await.is_ok() {}
    });
    assert!(matches!(ended(call).await, Err(LinkError::Down { .. })));
    assert!(matches!(ended(other).await, Err(LinkError::Down { .. })));
    timeout(LIMIT, flood).await.unwrap().unwrap();
    guest.accept().await;
}

#[tokio::test]
async fn a_guest_that_only_sends_garbage_is_hung_up_on() {
    let (guest, link, mut talk) = Guest::up().await;
    let call = start(&link, "x", plain());
    let heard = talk.hear().await;
    // A few invalid lines are tolerated.
    talk.raw(b"\xff\xfe\nnot json\n[]\n3\n{}\n{\"id\":{}}\n\n").await;
    talk.say(&json!({"jsonrpc": "2.0", "id": 999_999, "result": {}})).await;
    talk.result(&heard["id"], json!({"content": []})).await;
    talk.result(&heard["id"], json!({"content": [], "second": true})).await;
    assert_eq!(ended(call).await.unwrap(), json!({"content": []}));
    let call = start(&link, "y", plain());
    talk.hear().await;
    talk.raw("garbage\n".repeat(200).as_bytes()).await;
    assert_eq!(ended(call).await, Err(LinkError::Down { why: "the guest sends garbage".into() }));
    guest.accept().await;
}

#[tokio::test]
async fn guests_may_ask_for_nothing_but_a_ping() {
    let (_guest, _link, mut talk) = Guest::up().await;
    talk.say(&json!({"jsonrpc": "2.0", "id": "p", "method": "ping"})).await;
    assert_eq!(talk.hear().await, json!({"jsonrpc": "2.0", "id": "p", "result": {}}));
    talk.say(&json!({"jsonrpc": "2.0", "id": 5, "method": "sampling/createMessage", "params": {}})).await;
    assert_eq!(talk.hear().await["error"]["code"], -32601);
}

#[tokio::test]
async fn a_silent_guest_is_asked_and_then_given_up() {
    let patience = Patience { ping_after: Duration::from_millis(100), silence_max: Duration::from_secs(6) };
    let (guest, link) = Guest::known_to(patience);
    let mut talk = guest.accept().await;
    // As long as the guest answers pings, the link stays up.
    for _ in 0..3 {
        let ping = talk.hear().await;
        assert_eq!(ping["method"], "ping");
        talk.result(&ping["id"], json!({})).await;
    }
    assert_eq!(*link.state().borrow(), LinkState::Up);
    let mut state = link.state();
    let down = state.wait_for(|s| matches!(s, LinkState::Down { why } if why.contains("silent")));
    drop(timeout(LIMIT, down).await.unwrap().unwrap());
    guest.accept().await;
    assert!(link.is_up_within(LIMIT).await);
}

#[tokio::test]
async fn a_standstill_of_the_daemon_is_no_silence_of_the_guest() {
    let patience = Patience { ping_after: Duration::from_millis(500), silence_max: Duration::from_secs(3) };
    let (guest, link) = Guest::known_to(patience);
    let mut talk = guest.accept().await;
    assert!(link.is_up_within(LIMIT).await);
    let mut state = link.state();
    state.mark_unchanged();
    // The call has two seconds. It is answered before the daemon stalls for longer than a guest may be silent.
    let call = start(&link, "slow", CallOptions::deadline(Duration::from_secs(2)));
    let asked = loop {
        let heard = talk.hear().await;
        if heard["method"] == "tools/call" {
            break heard["id"].clone();
        }
    };
    talk.result(&asked, json!({})).await;
    #[expect(clippy::disallowed_methods, reason = "the test needs a runtime that stalls for so long")]
    std::thread::sleep(patience.silence_max + 2 * STANDSTILL);
    assert_eq!(ended(call).await, Ok(json!({})), "its answer was there in time");
    loop {
        let ping = talk.hear().await;
        talk.result(&ping["id"], json!({})).await;
        if ping["method"] == "ping" {
            break;
        }
    }
    let next = start(&link, "next", plain());
    talk.serve("next").await;
    ended(next).await.unwrap();
    assert!(!state.has_changed().unwrap(), "the link was given up: {:?}", *state.borrow());
    // A guest that is silent while the daemon is not stalled is given up as usual.
    let down = state.wait_for(|s| matches!(s, LinkState::Down { why } if why.contains("silent")));
    drop(timeout(LIMIT, down).await.unwrap().unwrap());
}
