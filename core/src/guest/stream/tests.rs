//! Streams of a guest that gives arbitrary answers.

use nexus_schema::stream::{Open, TcpOpening, VERSION};
use proptest::prelude::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::*;
use crate::os::paths::vm_files;

fn opening() -> Opening {
    Opening { version: VERSION, client: None, open: Open::Tcp(TcpOpening { port: 80 }) }
}

/// Opens a stream of a guest that sends `answer` and nothing else. With `hangs_up` it then closes the connection.
async fn open(answer: Vec<u8>, hangs_up: bool) -> Result<GuestStream, StreamError> {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join(vm_files::VSOCK)).unwrap();
    let guest = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let (mut connect, mut line) = (String::new(), String::new());
        stream.read_line(&mut connect).await.unwrap();
        assert_eq!(connect, "CONNECT 201\n");
        stream.get_mut().write_all(b"OK 1\n").await.unwrap();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "{\"version\":1,\"open\":{\"tcp\":{\"port\":80}}}\n");
        // The reader may have closed the connection.
        let _ = stream.get_mut().write_all(&answer).await;
        if !hangs_up {
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    });
    let opened = GuestStream::open(directory.path(), &opening()).await;
    if opened.is_err() {
        guest.await.unwrap();
    }
    opened
}

#[tokio::test]
async fn what_comes_behind_the_answer_is_kept() {
    let stream =
        open(b"{\"ok\":{\"tty\":true,\"later\":1}}\n\x01\0\0\x02hi\x06\0\0\x02{}".to_vec(), false).await;
    let stream = stream.unwrap();
    assert!(stream.opened.tty);
    let (mut receiver, _sender) = stream.into_frames();
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::Data("hi".into())));
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::Done("{}".into())));
    assert_eq!(receiver.next().await.unwrap(), None);
}

#[tokio::test]
async fn the_first_bytes_go_with_the_request() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join(vm_files::VSOCK)).unwrap();
    let guest = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let expected = b"CONNECT 201\n{\"version\":1,\"open\":{\"tcp\":{\"port\":80}}}\n\x01\0\0\x05hello";
        let mut all = vec![0; expected.len()];
        stream.read_exact(&mut all).await.unwrap();
        assert_eq!(all, expected);
        stream.write_all(b"OK 1\n").await.unwrap();
        // What came meanwhile does not wait for the answer.
        let mut all = vec![0; 7];
        stream.read_exact(&mut all).await.unwrap();
        assert_eq!(all, b"\x01\0\0\x03you");
        stream.write_all(b"{\"ok\":{}}\n").await.unwrap();
    });
    let (way, more) = (Way::New(directory.path()), async { Ok(b"you".to_vec()) });
    let stream = GuestStream::open_with(way, &opening(), b"hello", more).await.unwrap();
    assert_eq!(stream.early, 8);
    guest.await.unwrap();
}

#[tokio::test]
async fn answers_that_are_none_are_the_guests_fault() {
    let error = |code: &str, message: &str| {
        format!("{{\"error\":{{\"code\":\"{code}\",\"message\":\"{message}\",\"retryable\":false}}}}\n")
            .into_bytes()
    };
    let endless = vec![b' '; LINE_MAX + 100_000];
    for (answer, code, words) in [
        (b"\n".to_vec(), ErrorCode::GuestMisbehaved, "malformed JSON"),
        (b"HTTP/1.1 200 OK\r\n".to_vec(), ErrorCode::GuestMisbehaved, "malformed JSON"),
        (b"{\"ok\":7}\n".to_vec(), ErrorCode::GuestMisbehaved, "malformed JSON"),
        (endless, ErrorCode::GuestMisbehaved, "too long"),
        (b"{\"ok\"".to_vec(), ErrorCode::GuestMisbehaved, "hung up"),
        (Vec::new(), ErrorCode::GuestMisbehaved, "hung up"),
        (
            error("command_not_found", "no command x"),
            ErrorCode::CommandNotFound,
            "inside web-1: no command x",
        ),
        (
            error("vm_not_found", "I am the host"),
            ErrorCode::GuestMisbehaved,
            "a code that guests may not use",
        ),
        (error("guest_failed", "\\u001b[2J"), ErrorCode::GuestMisbehaved, "control characters"),
    ] {
        let error = open(answer, true).await.unwrap_err().to_tool_error("web-1");
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{words}: {error}");
    }
    let long = open(error("guest_failed", &"x".repeat(20_000)), true).await.unwrap_err();
    assert!(long.to_tool_error("web-1").message.len() < 5000);
}

/// Carries an empty connection over a stream on which these bytes arrive.
async fn carried(bytes: Vec<u8>) -> Result<(), StreamError> {
    let stream = open([b"{\"ok\":{}}\n", &bytes[..]].concat(), true).await.unwrap();
    let (mut nothing, mut nowhere) = (tokio::io::empty(), tokio::io::sink());
    let carried = stream.carry(&mut nothing, &mut nowhere);
    timeout(Duration::from_secs(60), carried).await.expect("it ends")
}

#[tokio::test]
async fn what_a_stream_carries_is_checked_to_its_end() {
    carried(b"\x01\0\0\x02hi\x03\0\0\0\x06\0\0\x09{\"ok\":{}}".to_vec()).await.unwrap();
    for (bytes, code) in [
        (&b"\x01\0\0\x02hi"[..], ErrorCode::GuestUnreachable),
        (b"garbage", ErrorCode::GuestMisbehaved),
        (b"\x01\xff\xff\xff", ErrorCode::GuestMisbehaved),
        (b"\x04\0\0\x04\xff\xff\xff\xff", ErrorCode::GuestMisbehaved),
        (b"\x03\0\0\0\x05\0\0\x02{}", ErrorCode::GuestUnreachable),
        (b"\x06\0\0\x02{}", ErrorCode::GuestMisbehaved),
        (
            b"\x06\0\0\x36{\"error\":{\"code\":\"x\",\"message\":\"y\",\"retryable\":false}}",
            ErrorCode::GuestMisbehaved,
        ),
    ] {
        let error = carried(bytes.to_vec()).await.unwrap_err().to_tool_error("web-1");
        assert_eq!(error.code, code, "{:?}: {error}", String::from_utf8_lossy(bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_answer_and_no_frame_makes_it_panic(answer in prop::collection::vec(any::<u8>(), 0..100), is_open in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            if is_open {
                drop(carried(answer).await);
            } else {
                drop(open(answer, true).await);
            }
        });
    }
}
