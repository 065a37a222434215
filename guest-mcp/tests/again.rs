//! Calls whose connection is lost, and the ports on which a restored guest is told so, and one that goes on without a daemon.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};

use common::{Client, Guest, Host, TOKEN, configure, dial, until};
use nexus_schema::link::{GuestMessage, HostMessage};
use serde_json::{Value, json};

/// A connection of the link of this name.
fn connect(guest: &Guest, link: &str) -> Client {
    let mut client = guest.client();
    let hello = json!({
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": { "name": "test", "version": "1" },
        "_meta": { "dev.nexus/link": link },
    });
    let answer = client.request("initialize", hello);
    assert!(answer["result"]["capabilities"]["experimental"]["dev.nexus/calls"].is_object(), "{answer}");
    client
}

/// Asks for calls. The id is none that a test uses for something else.
fn ask(client: &mut Client, ids: &[i64]) {
    client.send(&json!({ "jsonrpc": "2.0", "id": 1000, "method": "nexus/calls", "params": { "ids": ids } }));
}

fn run(client: &mut Client, command: &str) -> i64 {
    client.begin_call("run_command", json!({ "command": command }))
}

#[test]
fn calls_are_answered_once_over_the_next_connection() {
    let guest = Guest::start();
    let mut first = connect(&guest, "the link");
    let go_on = guest.path("go-on");
    let slow = run(&mut first, &format!("while ! [ -e {go_on} ]; do sleep 0.02; done; echo slow"));
    let quick = run(&mut first, "echo quick");
    // It was written, and got lost on the way.
    let answer = first.read();
    assert_eq!(answer["id"], quick, "{answer}");
    drop(first);

    let mut second = connect(&guest, "the link");
    ask(&mut second, &[slow, quick, 77]);
    let mut answers: BTreeMap<i64, Value> = BTreeMap::new();
    while answers.len() < 3 {
        let answer = second.read();
        let is_new = answers.insert(answer["id"].as_i64().unwrap(), answer).is_none();
        assert!(is_new, "{answers:?}");
        if answers.len() == 2 {
            std::fs::write(&go_on, "").unwrap();
        }
    }
    assert_eq!(answers[&1000]["result"], json!({ "lost": [77] }));
    assert!(answers[&slow]["result"].to_string().contains("slow"), "{answers:?}");
    assert_eq!(answers[&quick], answer);
    // Nothing comes twice.
    let pong = second.request("ping", json!({}));
    assert_eq!(pong["result"], json!({}));
}

#[test]
fn calls_that_are_not_asked_for_are_detached_from() {
    let guest = Guest::start();
    let mut first = connect(&guest, "the link");
    let ended = guest.path("ended");
    let go_on = guest.path("go-on");
    let call = run(&mut first, &format!("while ! [ -e {go_on} ]; do sleep 0.02; done; echo > {ended}"));
    // Another link knows nothing of it.
    let mut other = connect(&guest, "another link");
    ask(&mut other, &[call]);
    assert_eq!(other.read()["result"], json!({ "lost": [call] }));
    drop(first);
    let mut second = connect(&guest, "the link");
    ask(&mut second, &[]);
    assert_eq!(second.read()["result"], json!({ "lost": [] }));
    until("the call has ended", || {
        ask(&mut second, &[call]);
        second.read()["result"] == json!({ "lost": [call] })
    });
    // The command itself goes on.
    std::fs::write(go_on, "").unwrap();
    until("the command has ended", || std::path::Path::new(&ended).exists());
}

#[test]
fn a_guest_that_is_told_of_its_restore_says_hello_with_the_nonce() {
    let guest = Guest::start();
    let mut port = dial(guest.directory.path(), b"CONNECT 202\n").unwrap();
    port.get_mut().write_all(b"no nonce!\n").unwrap();
    let mut rest = Vec::new();
    // It hangs up without an answer.
    let _ = port.read_to_end(&mut rest);
    assert_eq!(rest, b"");

    let nonce = "00ff".repeat(16);
    let mut port = dial(guest.directory.path(), b"CONNECT 202\n").unwrap();
    port.get_mut().write_all(format!("{nonce}\n").as_bytes()).unwrap();
    let mut line = String::new();
    port.read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), nonce);
    let mut stream = guest.host.accept();
    let GuestMessage::Hello(hello) = Host::hear(&mut stream) else { panic!("expected a hello") };
    assert_eq!((hello.resumed.as_deref(), hello.token.as_deref()), (Some(nonce.as_str()), Some(TOKEN)));
    Host::say(&mut stream, &HostMessage::Configure(configure()));
    let GuestMessage::Ack(_) = Host::hear(&mut stream) else { panic!("expected an ack") };
    Host::say(&mut stream, &HostMessage::Welcome {});
}

/// What the agent answers to a line on the port of the host's shim; nothing if it hangs up.
fn lease(guest: &Guest, line: &str) -> String {
    let mut port = dial(guest.directory.path(), b"CONNECT 203\n").expect("the agent listens");
    port.get_mut().write_all(format!("{line}\n").as_bytes()).expect("it reads");
    let mut answer = Vec::new();
    let _ = port.read_to_end(&mut answer);
    String::from_utf8(answer).expect("it answers with text")
}

#[test]
fn only_the_secret_that_a_guest_was_told_last_lets_its_commands_go_on_and_only_once() {
    let guest = Guest::start();
    let hold = |secret: &str| json!({ "hold": { "secret": secret } });
    let go_on = |secret: &str| json!({ "go_on": { "secret": secret, "time_unix_ns": 1 } });
    for (request, known) in [
        (go_on("first"), false),
        (hold("first"), true),
        (hold("second"), true),
        (go_on("first"), false),
        (go_on("second"), true),
        (go_on("second"), false),
    ] {
        let answer = lease(&guest, &request.to_string());
        assert_eq!(answer, format!("{{\"known\":{known}}}\n"), "{request}");
    }
    for line in ["{}", "nonsense", "", &"x".repeat(1000)] {
        assert_eq!(lease(&guest, line), "", "{line}");
    }
}
