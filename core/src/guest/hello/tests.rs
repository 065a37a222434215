//! Hello and bye with correct guests and with guests that misbehave.

use std::collections::BTreeMap;

use nexus_schema::id::{BootId, VmId};
use nexus_schema::link::GuestFile;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::*;

const LIMIT: Duration = Duration::from_secs(60);

struct Fixture {
    directory: tempfile::TempDir,
    events: mpsc::Receiver<GuestEvent>,
    _server: HelloServer,
}

impl Fixture {
    fn new(first: bool) -> Self {
        Self::with(first, plain())
    }

    fn with(first: bool, configure: Configure) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, mut said) = mpsc::channel(16);
        let server = HelloServer::bind(directory.path(), configure, first, sender).unwrap();
        // Events are stored at once.
        let (recorder, events) = mpsc::channel(64);
        tokio::spawn(async move {
            while let Some(mut event) = said.recv().await {
                if let GuestEvent::Ready { recorded, .. } = &mut event {
                    *recorded = Recorded { _held: mpsc::channel(1).0, is_lost: Arc::default() };
                }
                recorder.send(event).await.unwrap();
            }
        });
        Self { directory, events, _server: server }
    }

    /// Sends lines one by one, and returns the answer to each.
    async fn talk(&self, lines: &[String]) -> Vec<Value> {
        let stream = socket::connect_in_tokio(self.directory.path(), vm_files::HELLO).await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        let mut answers = Vec::new();
        for line in lines {
            if write.write_all(format!("{line}\n").as_bytes()).await.is_err() {
                break;
            }
            let mut answer = String::new();
            timeout(LIMIT, read.read_line(&mut answer)).await.unwrap().unwrap();
            answers.push(serde_json::from_str(&answer).unwrap_or(Value::Null));
        }
        answers
    }

    async fn event(&mut self) -> GuestEvent {
        timeout(LIMIT, self.events.recv()).await.unwrap().unwrap()
    }
}

fn plain() -> Configure {
    Configure {
        protocol: 0,
        token: "secret".into(),
        vm: VmId::from_i64(1).unwrap(),
        name: "web-1".parse().unwrap(),
        boot_id: BootId::from_i64(2).unwrap(),
        hostname: "web-1".into(),
        time_unix_ns: 0,
        interfaces: Vec::new(),
        dns: Vec::new(),
        search: Vec::new(),
        env: BTreeMap::new(),
        working_dir: None,
        image_user: None,
        wait_for_init_s: 0,
        mounts: Vec::new(),
        files: Vec::new(),
        proxy: None,
        resume: None,
        template: false,
    }
}

fn hello(more: Value) -> String {
    let mut hello = json!({"type": "hello", "protocol": 1, "min_protocol": 1, "build": "0.1.0", "kernel": "6.1",
        "arch": "x86_64", "kernel_boot_id": "b", "uptime_ms": 5, "init": "agent"});
    hello.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    hello.to_string()
}

fn ack(token: &str) -> String {
    json!({"type": "ack", "token": token, "problems": ["p\n".repeat(1000)]}).to_string()
}

#[tokio::test]
async fn a_boot_is_configured_and_says_bye() {
    let mut fixture = Fixture::new(true);
    let said = hello(json!({"os": "x".repeat(1000)}));
    let answers = fixture.talk(&[said, ack("secret")]).await;
    assert_eq!(answers[0]["type"], "configure");
    assert_eq!((&answers[0]["token"], &answers[0]["protocol"]), (&json!("secret"), &json!(1)));
    assert!(answers[0]["time_unix_ns"].as_u64().unwrap() > 1_700_000_000_000_000_000);
    assert_eq!(answers[1]["type"], "welcome");
    assert!(
        matches!(fixture.event().await, GuestEvent::Hello(hello) if hello.os.as_deref().unwrap().len() == TEXT_MAX)
    );
    assert!(
        matches!(fixture.event().await, GuestEvent::Ready { ack, .. } if ack.problems[0].len() == TEXT_MAX)
    );

    let bye = |token: &str| json!({"type": "bye", "token": token, "reason": "reboot"}).to_string();
    assert_eq!(fixture.talk(&[bye("wrong!")]).await[0]["type"], "refused");
    assert!(matches!(fixture.event().await, GuestEvent::Misbehaved { .. }));
    assert_eq!(fixture.talk(&[bye("secret")]).await[0]["type"], "welcome");
    assert_eq!(fixture.event().await, GuestEvent::Bye { reason: ByeReason::Reboot, guessed: false });
}

#[tokio::test]
async fn a_guest_is_welcomed_when_it_is_recorded_that_it_is_ready() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, mut events) = mpsc::channel(16);
    let _server = HelloServer::bind(directory.path(), plain(), true, sender).unwrap();
    let stream = socket::connect_in_tokio(directory.path(), vm_files::HELLO).await.unwrap();
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read).lines();
    write.write_all(format!("{}\n{}\n", hello(json!({})), ack("secret")).as_bytes()).await.unwrap();
    assert!(read.next_line().await.unwrap().unwrap().contains("configure"));
    assert!(matches!(events.recv().await, Some(GuestEvent::Hello(_))));
    let ready = events.recv().await.unwrap();
    assert!(matches!(ready, GuestEvent::Ready { .. }));
    assert!(timeout(Duration::from_millis(200), read.next_line()).await.is_err(), "it is not recorded yet");
    drop(ready);
    assert!(timeout(LIMIT, read.next_line()).await.unwrap().unwrap().unwrap().contains("welcome"));
}

#[tokio::test]
async fn files_are_given_once() {
    let file = GuestFile { path: "/a".into(), content_base64: String::new(), mode: 0o644, user: None };
    let fixture = Fixture::with(true, Configure { files: vec![file], ..plain() });
    let files = |answers: &[Value]| answers[0]["files"].as_array().unwrap().len();
    // A guest that disconnects may not have written the files.
    assert_eq!(files(&fixture.talk(&[hello(json!({}))]).await), 1);
    assert_eq!(files(&fixture.talk(&[hello(json!({})), ack("secret")]).await), 1);
    // An agent that reconnects does not get them again.
    let again = hello(json!({ "token": "secret" }));
    assert_eq!(files(&fixture.talk(&[again, ack("secret")]).await), 0);
}

#[tokio::test]
async fn only_the_first_hello_comes_without_a_token() {
    let mut fixture = Fixture::new(true);
    // A guest that disconnects before it has the token may try again.
    assert_eq!(fixture.talk(&[hello(json!({}))]).await[0]["type"], "configure");
    assert_eq!(fixture.talk(&[hello(json!({})), ack("secret")]).await[1]["type"], "welcome");
    for _ in 0..3 {
        fixture.event().await;
    }
    assert_eq!(fixture.talk(&[hello(json!({}))]).await[0]["type"], "refused");
    assert!(
        matches!(fixture.event().await, GuestEvent::Misbehaved { what } if what.contains("second hello"))
    );
    assert_eq!(fixture.talk(&[hello(json!({"token": "secreT"}))]).await[0]["type"], "refused");
    fixture.event().await;
    assert_eq!(fixture.talk(&[hello(json!({"token": "secret"})), ack("secret")]).await[1]["type"], "welcome");
    assert!(matches!(fixture.event().await, GuestEvent::Hello(_)));

    let later = Fixture::new(false);
    assert_eq!(later.talk(&[hello(json!({}))]).await[0]["type"], "refused");
}

#[tokio::test]
async fn other_generations_are_told_apart() {
    let mut fixture = Fixture::new(true);
    let answers = fixture.talk(&[hello(json!({"protocol": 0, "min_protocol": 0, "build": "0.0.1"}))]).await;
    assert_eq!(answers[0]["type"], "refused");
    assert_eq!(fixture.event().await, GuestEvent::Outdated { protocol: 0, build: "0.0.1".into() });
    let newer = hello(json!({"protocol": PROTOCOL + 5, "min_protocol": PROTOCOL + 1}));
    assert_eq!(fixture.talk(&[newer]).await[0]["type"], "refused");
    fixture.event().await;
    // With a newer guest that still supports this host's protocol, the host uses its own.
    let answers = fixture.talk(&[hello(json!({"protocol": PROTOCOL + 1}))]).await;
    assert_eq!(answers[0]["protocol"], PROTOCOL);
}

#[tokio::test]
async fn garbage_is_refused_and_does_no_harm() {
    let mut fixture = Fixture::new(true);
    for garbage in
        ["x".to_owned(), "{}".into(), ack("secret"), "y".repeat(HELLO_MAX + 10), "[".repeat(10_000)]
    {
        let _ = fixture.talk(&[garbage]).await;
        assert!(matches!(fixture.event().await, GuestEvent::Misbehaved { .. }));
    }
    // Silent connections take places, but not all of them: a correct guest is still served.
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS_MAX - 1 {
        silent.push(socket::connect_in_tokio(fixture.directory.path(), vm_files::HELLO).await.unwrap());
    }
    assert_eq!(fixture.talk(&[hello(json!({})), ack("secret")]).await[1]["type"], "welcome");
}

/// A server for a guest that was restored.
fn restored() -> (tempfile::TempDir, HelloServer, mpsc::Receiver<GuestEvent>) {
    let directory = tempfile::tempdir().unwrap();
    let (sender, events) = mpsc::channel(16);
    let resume = nexus_schema::link::Resume {
        kind: nexus_schema::link::ResumeKind::Fork,
        entropy_base64: "AAAA".into(),
        machine_id: None,
        run_hooks: true,
    };
    let configure = Configure { resume: Some(resume), ..plain() };
    let known = Restored { nonce: "nonce".into(), token: "of the checkpoint".into() };
    let server = HelloServer::bind_restored(directory.path(), configure, known, sender).unwrap();
    (directory, server, events)
}

#[tokio::test]
async fn a_restored_guest_is_known_by_its_nonce_and_has_to_renew() {
    let (directory, server, events) = restored();
    // Takes events and stores them at once.
    let (recorder, taken) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut events = events;
        while let Some(mut event) = events.recv().await {
            if let GuestEvent::Ready { recorded, .. } = &mut event {
                *recorded = Recorded { _held: mpsc::channel(1).0, is_lost: Arc::default() };
            }
            recorder.send(event).await.unwrap();
        }
    });
    let mut fixture = Fixture { directory, events: taken, _server: server };
    let said = |token: &str, nonce: &str| hello(json!({ "token": token, "resumed": nonce }));
    for wrong in [
        hello(json!({})),
        hello(json!({ "token": "of the checkpoint" })),
        hello(json!({ "token": "secret" })),
        said("of the checkpoint", "of another restore"),
        said("made up", "nonce"),
    ] {
        assert_eq!(fixture.talk(std::slice::from_ref(&wrong)).await[0]["type"], "refused", "{wrong}");
        assert!(matches!(fixture.event().await, GuestEvent::Misbehaved { .. }));
    }
    let first = said("of the checkpoint", "nonce");
    // Without a word of what it renewed, or with something that it could not renew, it does not become ready.
    let failed = json!({ "type": "ack", "token": "secret", "resumed": { "renewed": ["clock"], "failed": ["renew x"] } });
    for bad in [ack("secret"), failed.to_string()] {
        let answers = fixture.talk(&[first.clone(), bad]).await;
        assert_eq!((&answers[0]["resume"]["kind"], &answers[1]["type"]), (&json!("fork"), &json!("refused")));
        assert!(matches!(fixture.event().await, GuestEvent::Hello(_)));
        assert!(matches!(fixture.event().await, GuestEvent::Unrenewed { .. }));
    }
    let good = json!({ "type": "ack", "token": "secret", "resumed": { "renewed": ["clock"], "clock_behind_ms": 9 } });
    let answers = fixture.talk(&[first.clone(), good.to_string()]).await;
    assert_eq!(answers[1]["type"], "welcome");
    assert!(matches!(fixture.event().await, GuestEvent::Hello(_)));
    let GuestEvent::Ready { ack: said, .. } = fixture.event().await else { panic!("it is ready") };
    assert_eq!(said.resumed.unwrap().clock_behind_ms, 9);
    // The token of the checkpoint was good once.
    assert_eq!(fixture.talk(&[first]).await[0]["type"], "refused");
    assert!(matches!(fixture.event().await, GuestEvent::Misbehaved { .. }));
    let again = fixture.talk(&[hello(json!({ "token": "secret" })), ack("secret")]).await;
    assert_eq!((&again[0]["type"], &again[0]["resume"]), (&json!("configure"), &Value::Null));
}

#[tokio::test]
async fn a_restored_guest_that_cannot_be_recorded_is_not_welcomed_and_renews_again() {
    let (directory, _server, mut events) = restored();
    let good = json!({ "type": "ack", "token": "secret", "resumed": { "renewed": ["clock"], "clock_behind_ms": 9 } });
    // It has the new token from the first exchange.
    for (token, is_recorded) in [("of the checkpoint", false), ("secret", false), ("secret", true)] {
        let stream = socket::connect_in_tokio(directory.path(), vm_files::HELLO).await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read).lines();
        let said = hello(json!({ "token": token, "resumed": "nonce" }));
        write.write_all(format!("{said}\n{good}\n").as_bytes()).await.unwrap();
        let configure = timeout(LIMIT, read.next_line()).await.unwrap().unwrap().unwrap();
        let configure: Value = serde_json::from_str(&configure).unwrap();
        assert_eq!(configure["resume"]["kind"], "fork", "{configure}");
        assert!(matches!(events.recv().await, Some(GuestEvent::Hello(_))));
        let Some(GuestEvent::Ready { recorded, .. }) = events.recv().await else { panic!("it is ready") };
        if is_recorded {
            drop(recorded);
        } else {
            recorded.lose();
        }
        let last = timeout(LIMIT, read.next_line()).await.unwrap().unwrap();
        assert_eq!(last.is_some_and(|line| line.contains("welcome")), is_recorded, "{token}");
    }
}
