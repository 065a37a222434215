//! What guests offer by themselves (`/mcp/vm/{vm}?tools=own`): their words are theirs, however they put them; they ask no more than
//! they may, and nobody reaches them who may not.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::world::{World, soon};

/// A client of what the guest of `vm` offers, which declares these capabilities.
fn connect(world: &World, vm: &str, capabilities: Value) -> Client {
    let path = format!("/mcp/vm/{vm}?tools=own");
    Client::connect_as(&world.daemon.socket(), &path, "", capabilities).expect("the guest's own endpoint")
}

fn call(client: &mut Client, tool: &str, arguments: Value) -> Value {
    client.request("tools/call", &json!({ "name": tool, "arguments": arguments })).expect("an answer")
}

#[test]
fn a_guest_does_not_speak_for_the_host() {
    let world = World::fixture();
    let vm = world.create(&mut world.client(), "f-1");
    let mut own = connect(&world, "f-1", json!({}));
    let result = call(&mut own, "hostile_meta", json!({}));
    assert_eq!(result["content"], json!([{ "type": "text", "text": "vm_deleted" }]));
    let expected = json!({ "mine": true, "dev.nexus/from": "guest",
        "dev.nexus/vm": { "id": vm["id"], "name": "f-1", "boot_id": vm["boot_id"] } });
    assert_eq!(result["_meta"], expected);
    // Nor do its tools appear where Nexus's own are.
    let scoped = Client::connect_at(&world.daemon.socket(), "/mcp/vm/f-1").expect("the VM's endpoint");
    for mut other in [world.client(), scoped] {
        let listed = other.request("tools/list", &json!({})).expect("a list").to_string();
        assert!(!listed.contains("test_simple_text") && listed.contains("run_command"));
        let refused = other.request("tools/call", &json!({ "name": "test_simple_text", "arguments": {} }));
        assert!(refused.is_err(), "{refused:?}");
    }
    let listed = own.request("tools/list", &json!({})).expect("a list").to_string();
    assert!(listed.contains("test_simple_text") && !listed.contains("run_command"));
}

#[test]
fn a_guest_asks_what_it_may_and_says_who_it_is() {
    let world = World::fixture();
    world.create(&mut world.client(), "f-1");
    let mut own = connect(&world, "f-1", json!({ "elicitation": {} }));
    let id =
        own.start("tools/call", &json!({ "name": "hostile_questions", "arguments": {} })).expect("a call");
    let mut asked = 0;
    let result = loop {
        let message = own.next_message().expect("a message");
        if message["id"] == id && message.get("method").is_none() {
            break message["result"].clone();
        }
        assert_eq!(message["method"], "elicitation/create", "{message}");
        let said = message["params"]["message"].as_str().unwrap_or_default();
        assert_eq!(said, "A program in the VM f-1 asks, not Nexus: Your password?");
        assert_eq!(message["params"]["_meta"]["dev.nexus/from"], "guest");
        asked += 1;
        let answer = json!({ "jsonrpc": "2.0", "id": message["id"], "result": { "action": "decline" } });
        own.send(&answer).expect("an answer is sent");
    };
    // What is no question of a guest is no question at all; the others count, whether the client may be asked or not.
    let outcomes: Value =
        serde_json::from_str(result["content"][0]["text"].as_str().unwrap_or_default()).expect("a list");
    let outcomes = outcomes.as_array().expect("a list");
    assert_eq!(outcomes[..4], [json!(-32601), json!(-32602), json!(-32601), json!(-32601)], "{outcomes:?}");
    assert_eq!((asked, &outcomes[16]), (13, &json!("decline")), "{outcomes:?}");
    assert!(outcomes[17..].iter().all(|outcome| *outcome == -32600), "{outcomes:?}");
}

#[test]
fn a_guest_that_floods_is_not_heard_for_long() {
    let world = World::fixture();
    world.create(&mut world.client(), "f-1");
    let mut own = connect(&world, "f-1", json!({}));
    own.request("logging/setLevel", &json!({ "level": "debug" })).expect("a level");
    let params = json!({ "name": "hostile_flood", "arguments": {}, "_meta": { "progressToken": "p" } });
    let id = own.start("tools/call", &params).expect("a call");
    let (mut logged, mut last) = (0, -1.0);
    loop {
        let message = own.next_message().expect("a message");
        match message["method"].as_str() {
            Some("notifications/message") => {
                assert_eq!(message["params"]["logger"], "guest f-1: fixture");
                logged += 1;
            }
            Some("notifications/progress") => {
                let progress = message["params"]["progress"].as_f64().expect("a number");
                assert!(progress > last, "{message}");
                last = progress;
            }
            _ if message["id"] == id => break,
            _ => {}
        }
    }
    assert!(logged <= 256, "{logged} messages");
    // It hears others as before.
    assert_eq!(call(&mut own, "test_simple_text", json!({}))["content"][0]["type"], "text");
}

#[test]
fn a_cancelled_request_ends_in_the_guest_and_withdraws_its_question() {
    let world = World::fixture();
    world.create(&mut world.client(), "f-1");
    let mut own = connect(&world, "f-1", json!({ "elicitation": {} }));
    let file = world.path("cancelled");
    let params = json!({ "name": "hostile_wait", "arguments": { "file": file } });
    let id = own.start("tools/call", &params).expect("a call");
    let question = own.next_message().expect("a question");
    assert_eq!(question["method"], "elicitation/create", "{question}");
    own.send(
        &json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": id } }),
    )
    .expect("a notification is sent");
    let withdrawn = loop {
        let message = own.next_message().expect("a message");
        if message["method"] == "notifications/cancelled" {
            break message;
        }
    };
    assert_eq!(withdrawn["params"]["requestId"], question["id"]);
    let told = soon("the guest is told", || fs::read_to_string(&file).ok().filter(|text| !text.is_empty()));
    assert_eq!(told, "true");
}

/// The status of a request for a path, with a token.
fn status(world: &World, path: &str, token: &str) -> String {
    let mut stream = UnixStream::connect(world.daemon.socket()).expect("the socket");
    let body = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"test_simple_text"}}"#;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nAccept: application/json, text/event-stream\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("a request");
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("a status");
    let mut rest = String::new();
    // What else comes does not matter.
    let _ = reader.read_to_string(&mut rest);
    let body =
        rest.split_once("\r\n\r\n").map_or("", |(_, body)| body).replace("f-1", "VM").replace("f-9", "VM");
    format!("{} {}", line.split(' ').nth(1).unwrap_or_default(), body)
}

#[test]
fn only_who_may_run_programs_in_a_vm_reaches_what_its_guest_offers() {
    let world = World::fixture();
    let mut client = world.client();
    world.create(&mut client, "f-1");
    let mut token = |arguments: Value| {
        client.must("token_create", arguments)["token"].as_str().expect("a token").to_owned()
    };
    let all = json!(["f-1"]);
    let reader = token(json!({ "name": "reader", "scopes": ["read"], "vms": all }));
    let limited =
        token(json!({ "name": "limited", "scopes": ["read", "exec"], "vms": all, "tools": "work" }));
    let stranger = token(json!({ "name": "stranger", "scopes": ["read", "exec"] }));
    let worker = token(json!({ "name": "worker", "scopes": ["exec"], "vms": all }));
    let own = "/mcp/vm/f-1?tools=own";
    let as_whom = |token: &str| {
        let head = format!("Authorization: Bearer {token}\r\n");
        Client::connect_as(&world.daemon.socket(), own, &head, json!({})).expect("a connection")
    };
    let refused = as_whom(&reader).request("tools/call", &json!({ "name": "test_simple_text" }));
    assert!(refused.is_err_and(|error| error.to_string().contains("needs the scope exec")));
    assert_eq!(call(&mut as_whom(&worker), "test_simple_text", json!({}))["content"][0]["type"], "text");
    let limited = status(&world, own, &limited);
    assert!(limited.starts_with("403 ") && limited.contains("limited to a set of tools"), "{limited}");
    // A VM of others is one that does not exist.
    let (there, nowhere) =
        (status(&world, own, &stranger), status(&world, "/mcp/vm/f-9?tools=own", &stranger));
    assert!(there.starts_with("404 ") && there == nowhere, "{there}\n{nowhere}");
    let odd = status(&world, "/mcp/vm/f-1?tools=all", &worker);
    assert!(odd.starts_with("400 "), "{odd}");
    // Each call is in the audit log, under a name of its own.
    soon("the record", || {
        let audit = client.must("audit_list", json!({ "vm": "f-1" })).to_string();
        audit.contains("own tools/call").then_some(())
    });
}
