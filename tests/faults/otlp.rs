//! Spans of calls at a collector of OpenTelemetry: those of a trace belong to it, and no call waits for a collector that does not answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::world::{SOON, World, soon};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// A collector: its address, and the requests that it takes.
fn collector() -> (String, Receiver<(String, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a listener has an address");
    let (sender, requests) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Some(request) = take(stream) else { continue };
            if sender.send(request).is_err() {
                return;
            }
        }
    });
    (format!("http://{address}"), requests)
}

/// The first line of a request, and its body; it is answered.
fn take(stream: TcpStream) -> Option<(String, Value)> {
    let mut lines = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    lines.read_line(&mut first).ok()?;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).ok()?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body).ok()?;
    let answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    lines.get_mut().write_all(answer).ok()?;
    Some((first.trim().to_owned(), serde_json::from_slice(&body).ok()?))
}

fn spans(request: &Value) -> Vec<Value> {
    request["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().cloned().unwrap_or_default()
}

fn attribute(span: &Value, key: &str) -> Value {
    let found = span["attributes"].as_array().into_iter().flatten().find(|attribute| attribute["key"] == key);
    found.map_or(Value::Null, |attribute| attribute["value"]["stringValue"].clone())
}

/// The value of a sample of the metrics.
fn metric(world: &World, name: &str) -> u64 {
    let mut stream = std::os::unix::net::UnixStream::connect(world.daemon.socket()).expect("connect");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .expect("a request is sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or_default()
}

#[test]
fn calls_are_spans_of_their_traces_and_say_nothing_of_contents() {
    let (url, requests) = collector();
    let mut world = World::with(&[("NEXUS_OTLP_ENDPOINT", url.as_str())]);
    let mut client = world.client();
    let vm = world.create(&mut client, "web");
    let mut call = |flags: &str, command: &str| {
        let meta = json!({ "traceparent": format!("00-{TRACE}-{SPAN}-{flags}") });
        let arguments = json!({ "vm": "web", "command": command });
        let params = json!({ "name": "guest_run_command", "arguments": arguments, "_meta": meta });
        client.request("tools/call", &params).expect("an answer")
    };
    call("01", "echo swordfish");
    call("00", "echo unsampled");
    client.call("vm_inspect", json!({ "vm": "nowhere" })).expect_err("there is no such VM");
    drop(client);
    // At its end the daemon sends what it has.
    world.daemon.stop();
    let mut all = Vec::new();
    let deadline = Instant::now() + SOON;
    while !all.iter().any(|span: &Value| span["name"] == "vm_inspect" && span["status"]["code"] == 2) {
        let left = deadline.saturating_duration_since(Instant::now());
        let (first, body) = requests.recv_timeout(left).expect("spans come");
        assert_eq!(first, "POST /v1/traces HTTP/1.1");
        assert!(!body.to_string().contains("swordfish"), "{body}");
        assert!(body["resourceSpans"][0]["resource"].to_string().contains("nexusd"), "{body}");
        all.extend(spans(&body));
    }
    let ran: Vec<&Value> = all.iter().filter(|span| span["name"] == "run_command").collect();
    let [ran] = ran[..] else { panic!("one call was sampled: {ran:?}") };
    assert_eq!((&ran["traceId"], &ran["parentSpanId"]), (&json!(TRACE), &json!(SPAN)), "{ran}");
    assert_eq!(
        (attribute(ran, "nexus.vm.id"), attribute(ran, "nexus.outcome")),
        (vm["id"].clone(), json!("ok"))
    );
    let created = all.iter().find(|span| span["name"] == "vm_create").expect("a span of each call");
    assert!(created.get("parentSpanId").is_none() && created["traceId"] != TRACE, "{created}");
    let times = |span: &Value, key: &str| span[key].as_str().and_then(|text| text.parse::<u64>().ok());
    assert!(times(created, "startTimeUnixNano") < times(created, "endTimeUnixNano"), "{created}");
    world.daemon.restart();
}

#[test]
fn no_call_waits_for_a_collector_that_does_not_answer() {
    // It accepts, and says nothing.
    let deaf = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", deaf.local_addr().expect("an address"));
    let world = World::hostile(&[("NEXUS_OTLP_ENDPOINT", url.as_str())]);
    let mut client = world.client();
    let begun = Instant::now();
    let calls = 6000;
    for _ in 0..calls {
        let params = json!({ "name": "vm_inspect", "arguments": { "vm": "nowhere" } });
        client.request("tools/call", &params).expect("an answer");
    }
    let each = begun.elapsed() / calls;
    assert!(each < Duration::from_millis(20), "{each:?} a call");
    // What has no room is lost at once, what was sent in vain once that is known.
    soon("losses are counted", || (metric(&world, "nexus_spans_lost_total") > 512).then_some(()));
    assert_eq!(metric(&world, "nexus_spans_sent_total"), 0);
    drop(deaf);
    // Refused connections are no better, and cost calls nothing either.
    client.must("vm_list", json!({}));
    let one = Client::connect_at(&world.daemon.socket(), "/mcp?tools=work").expect("it serves");
    drop(one);
}

#[test]
fn a_collector_is_an_address_of_http() {
    let place = tempfile::tempdir().expect("a directory");
    let output = std::process::Command::new(nexus_tests::daemon::program("nexusd"))
        .env("NEXUS_STATE_DIR", place.path())
        .env("NEXUS_RUNTIME_DIR", place.path())
        .env("NEXUS_OTLP_ENDPOINT", "https://example.org")
        .output()
        .expect("nexusd runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("NEXUS_OTLP_ENDPOINT") && said.contains("http://"),
        "{said}"
    );
}
