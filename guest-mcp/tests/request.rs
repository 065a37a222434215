//! `http_request` to servers on the loopback.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

use common::{Guest, facts, header, stream, within};
use serde_json::json;

/// A server that answers one request; gives its port, and what it was asked.
fn serve(answer: Vec<u8>) -> (u16, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream);
        let (mut asked, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            asked.push_str(&line);
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        asked.push_str(&String::from_utf8(body).unwrap());
        // Who read enough hangs up.
        let _ = reader.get_mut().write_all(&answer);
        asked
    });
    (port, thread)
}

#[test]
fn a_server_is_asked() {
    let guest = Guest::start();
    let mut client = guest.client();
    let (port, server) = serve(
        b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 6\r\n\r\ngr\xc3\xbcn\n".to_vec(),
    );
    let arguments = json!({ "url": format!("http://localhost:{port}/a?b=c"), "headers": { "X-Mine": "yes" }, "body": "hello" });
    let result = client.good("http_request", arguments);
    assert_eq!(stream(&result, "content"), "grün\n");
    let found = facts(&result);
    assert_eq!(
        (&found["status"], &found["body_bytes"], &found["truncated"]),
        (&json!(201), &json!(6), &json!(false))
    );
    assert_eq!(
        (&found["headers"]["content-type"], &found["headers"]["x-a"]),
        (&json!("text/plain"), &json!("1, 2"))
    );
    assert!(
        !header(&result).contains('\u{1b}') && header(&result).contains("201 Created"),
        "{}",
        header(&result)
    );
    let asked = server.join().unwrap();
    assert!(asked.starts_with("POST /a?b=c HTTP/1.1\r\n") && asked.ends_with("\r\n\r\nhello"), "{asked}");
    assert!(
        asked.to_lowercase().contains("x-mine: yes") && asked.contains(&format!("localhost:{port}")),
        "{asked}"
    );
}

#[test]
fn a_body_without_end_is_cut() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mut answer = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    answer.extend(std::iter::repeat_n(0xff, 4 << 20));
    for (arguments, length) in [
        (json!({ "encoding": "base64", "limit": 262_144 }), 262_144),
        (json!({ "limit": 262_144 }), 48_000),
        (json!({}), 32_768),
        (json!({ "limit": 5 }), 5),
    ] {
        let (port, server) = serve(answer.clone());
        let mut arguments = arguments;
        arguments["url"] = format!(":{port}").into();
        let result = client.good("http_request", arguments);
        assert_eq!(
            (&facts(&result)["body_bytes"], &facts(&result)["truncated"]),
            (&json!(length), &json!(true))
        );
        server.join().unwrap();
    }
}

#[test]
fn what_gives_no_answer_is_said() {
    let guest = Guest::start();
    let mut client = guest.client();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let result = client.call("http_request", json!({ "url": format!("http://127.0.0.1:{closed}/") }));
    let error = &result["_meta"]["dev.nexus/error"];
    assert_eq!(
        (&error["code"], &error["errno"]),
        (&json!("request_failed"), &json!("ECONNREFUSED")),
        "{result}"
    );
    let (port, server) = serve(b"\x1b[2Jthis is not HTTP\r\n\r\n".to_vec());
    assert_eq!(
        client.bad("http_request", json!({ "url": format!("http://127.0.0.1:{port}/") })),
        "request_failed"
    );
    server.join().unwrap();
    for wrong in [
        json!({ "url": "https://localhost/" }),
        json!({ "url": "http://192.0.2.1/" }),
        json!({ "url": "http://localhost:1/", "method": "CONNECT" }),
        json!({ "url": "http://localhost:1/", "headers": { "a b": "c" } }),
        json!({ "url": "http://localhost:1/", "headers": { "a": "b\r\nc: d" } }),
        json!({ "url": "http://localhost:1/", "timeout_s": 46 }),
    ] {
        assert_eq!(client.bad("http_request", wrong.clone()), "invalid_argument", "{wrong}");
    }
    // One that never answers.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", mute.local_addr().unwrap());
    let code =
        within(common::PATIENCE, move || client.bad("http_request", json!({ "url": url, "timeout_s": 0.2 })));
    assert_eq!(code, "timeout");
}
