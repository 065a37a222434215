//! This build writes and reads the recorded lines, and a client finds its answers among events.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use nexus_net_wire::{
    Answer, Attached, Call, Client, ClientError, Detached, ErrorCode, Event, Hello, NetError, PROTOCOL,
    Reply, Request, Watching, decode, encode,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream};

const REQUESTS: &str = include_str!("recorded/1/requests.jsonl");
const REPLIES: &str = include_str!("recorded/1/replies.jsonl");

fn are_as_recorded<T: Serialize + DeserializeOwned>(lines: &str) {
    for line in lines.lines() {
        let message: T =
            decode(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {:?}", error.source));
        assert_eq!(String::from_utf8(encode(&message)).unwrap(), format!("{line}\n"));
    }
}

#[test]
fn requests_are_as_recorded() {
    are_as_recorded::<Call>(REQUESTS);
}

#[test]
fn replies_are_as_recorded() {
    are_as_recorded::<Reply>(REPLIES);
}

#[test]
fn requests_with_unknown_fields_are_refused_and_answers_with_them_are_read() {
    for line in [
        r#"{"id":1,"request":{"detach":{"id":"aaaaaaaaaaabe","force":true}}}"#,
        r#"{"id":1,"request":{"state":{"more":1}}}"#,
        r#"{"id":1,"request":{"fly":{}}}"#,
        r#"{"id":1,"request":{"attach":{"vm":{"id":"x"}}}}"#,
        r#"{"id":1,"request":{"cleanup":{"instance":"00000000"}}}"#,
        "",
    ] {
        let error = decode::<Call>(line.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("malformed line"), "{error}");
    }
    let reply: Reply = decode(br#"{"id":4,"answer":{"attach":{"tap":"nx3","mtu":1500}}}"#).unwrap();
    let attached = Attached { tap: "nx3".to_owned(), changes: 0 };
    assert_eq!(reply, Reply::Answer { id: 4, answer: Answer::Attach(attached) });
}

/// Answers each request with the replies in `answers`.
async fn serve(socket: DuplexStream, answers: Vec<Vec<Reply>>) {
    let (read, mut write) = tokio::io::split(socket);
    let mut lines = BufReader::new(read).lines();
    for replies in answers {
        let line = lines.next_line().await.unwrap().unwrap();
        decode::<Call>(line.as_bytes()).unwrap();
        for reply in replies {
            write.write_all(&encode(&reply)).await.unwrap();
        }
    }
}

fn hello(protocol: u32) -> Vec<Reply> {
    let hello = Hello { protocol, pid: 1, version: "0.1.0".to_owned() };
    vec![Reply::Answer { id: 1, answer: Answer::Hello(hello) }]
}

#[tokio::test]
async fn a_client_finds_its_answers_among_events() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let event = |changes| Reply::Event { event: Event::Repaired { changes } };
    let failed = NetError { code: ErrorCode::InUse, message: "in use".to_owned(), hint: None };
    let answers = vec![
        hello(PROTOCOL),
        vec![Reply::Answer { id: 2, answer: Answer::Watch(Watching {}) }],
        vec![
            event(1),
            event(2),
            Reply::Answer { id: 3, answer: Answer::Detach(Detached { was_attached: false }) },
            event(3),
        ],
        vec![Reply::Error { id: 4, error: failed.clone() }],
    ];
    let server = tokio::spawn(serve(theirs, answers));
    let (mut client, _) = Client::hello(ours).await.unwrap();
    assert_eq!(client.call(Request::Watch {}).await.unwrap(), Answer::Watch(Watching {}));
    let id = "aaaaaaaaaaabe".parse().unwrap();
    let detached = client.call(Request::Detach { id }).await.unwrap();
    assert_eq!(detached, Answer::Detach(Detached { was_attached: false }));
    for changes in 1..=3 {
        assert_eq!(client.event().await.unwrap(), Event::Repaired { changes });
    }
    match client.call(Request::State {}).await {
        Err(ClientError::Failed { source }) => assert_eq!(source, failed),
        other => panic!("{other:?}"),
    }
    server.await.unwrap();
    assert!(matches!(client.event().await, Err(ClientError::Closed)));
}

#[tokio::test]
async fn a_client_refuses_another_protocol() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let server = tokio::spawn(serve(theirs, vec![hello(PROTOCOL + 1)]));
    match Client::hello(ours).await {
        Err(ClientError::Protocol { found }) => assert_eq!(found, PROTOCOL + 1),
        other => panic!("{other:?}"),
    }
    server.await.unwrap();
}
