//! What cannot be undone needs a confirmation of exactly what would be done: by the user where the client can ask, else by a token that
//! the second call brings.

use std::os::unix::fs::FileExt;
use std::process::Command;

use nexus_tests::client::{Client, Failure};
use nexus_tests::daemon::program;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

/// The token in a refusal.
#[track_caller]
fn token_of(failure: &Failure) -> String {
    assert_eq!(failure.code, "confirmation_required", "{}", failure.text);
    let (_, rest) = failure.text.split_once(r#""confirm":""#).expect("a token in the hint");
    rest.split('"').next().expect("a token").to_owned()
}

/// Makes an image for VMs of tokens, which may not name files of the host.
fn image(world: &World, owner: &mut Client) {
    owner.to_the_end("image_create", json!({ "from": world.from, "name": "small", "wait_s": 45 }), SOON);
}

fn create(client: &mut Client, name: &str) {
    client.must(
        "vm_create",
        json!({ "name": name, "from": "small", "disk": "128MiB", "start": false, "wait_s": 45 }),
    );
}

#[test]
fn a_deletion_is_confirmed_by_the_token_of_its_plan() {
    let world = World::hostile(&[]);
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner");
    let token = |client: &mut Client, arguments: Value| {
        client.must("token_create", arguments)["token"].as_str().expect("a secret").to_owned()
    };
    image(&world, &mut owner);
    // By default a token confirms like anybody else; this one sees all.
    let agent = token(&mut owner, json!({ "name": "agent", "all_vms": true, "tools": "all" }));
    let waives = json!({ "scopes": ["lifecycle", "waive_confirmation"], "all_vms": true });
    let trusted = token(&mut owner, waives);
    let connect = |secret: &str| Client::connect_with(&world.daemon.socket(), secret).expect("a holder");
    let (mut agent, mut trusted) = (connect(&agent), connect(&trusted));
    for name in ["a", "b", "c"] {
        create(&mut owner, name);
    }
    create(&mut agent, "own");
    owner.must("vm_update", json!({ "vm": "a", "tags": { "go": "1" } }));

    // One's own goes without a question, another's does not; nothing has changed before the token comes.
    agent.must("vm_delete", json!({ "vm": "own" }));
    let asked = refused(&mut agent, "vm_delete", json!({ "vm": "a" }));
    assert!(
        asked.text.contains("delete the VM a (") && asked.text.contains("was made by uid:"),
        "{}",
        asked.text
    );
    let first = token_of(&asked);
    owner.inspect("a");
    // Neither another plan nor another caller can use it, and what is made up is worth nothing.
    for arguments in [
        json!({ "vm": "b", "confirm": first }),
        json!({ "tags": { "go": "1" }, "confirm": "0".repeat(64) }),
        json!({ "vm": "a", "confirm": "" }),
    ] {
        token_of(&refused(&mut agent, "vm_delete", arguments));
    }
    create(&mut agent, "mine");
    let foreign = refused(&mut owner, "vm_delete", json!({ "vm": "mine", "confirm": first }));
    assert!(foreign.text.contains("unknown, used or expired"), "{}", foreign.text);
    agent.must("vm_delete", json!({ "vm": "a", "confirm": first }));
    let replayed = refused(&mut agent, "vm_delete", json!({ "vm": "b", "confirm": first }));
    assert!(replayed.text.contains("unknown, used or expired"), "{}", replayed.text);

    // The plan of several is confirmed as a whole: one more makes it another one.
    owner.must("vm_update", json!({ "vm": "b", "tags": { "go": "2" } }));
    let plan = token_of(&refused(&mut agent, "vm_delete", json!({ "tags": { "go": "2" } })));
    owner.must("vm_update", json!({ "vm": "c", "tags": { "go": "2" } }));
    let changed = refused(&mut agent, "vm_delete", json!({ "tags": { "go": "2" }, "confirm": plan }));
    assert!(changed.text.contains("another plan"), "{}", changed.text);
    let gone = agent.must("vm_delete", json!({ "tags": { "go": "2" }, "confirm": token_of(&changed) }));
    assert_eq!(gone["deleted"].as_array().expect("a list").len(), 2);

    // Data drives, protection, and networks.
    create(&mut owner, "d");
    owner.must("drive_create", json!({ "name": "data", "size": "16MiB", "wait_s": 45 }));
    owner.must("drive_attach", json!({ "drive": "data", "vm": "d", "mount": "/data" }));
    let asked = refused(&mut owner, "vm_delete", json!({ "vm": "d" }));
    assert!(asked.text.contains("has the data drives data"), "{}", asked.text);
    owner.must("vm_delete", json!({ "vm": "d", "confirm": token_of(&asked) }));
    // Nobody wrote to this one, and the caller made it.
    owner.must("drive_delete", json!({ "drive": "data" }));
    agent.must("drive_create", json!({ "name": "foreign", "size": "16MiB", "wait_s": 45 }));
    let asked = refused(&mut owner, "drive_delete", json!({ "drive": "foreign" }));
    assert!(
        asked.text.contains("delete the drive foreign (") && asked.text.contains("was made by token:"),
        "{}",
        asked.text
    );
    owner.must("drive_inspect", json!({ "drive": "foreign" }));
    owner.must("drive_delete", json!({ "drive": "foreign", "confirm": token_of(&asked) }));
    create(&mut owner, "e");
    owner.must("vm_update", json!({ "vm": "e", "protected": true }));
    assert_eq!(refused(&mut owner, "vm_delete", json!({ "vm": "e" })).code, "vm_protected");
    let asked = refused(&mut owner, "vm_update", json!({ "vm": "e", "protected": false }));
    owner.must("vm_update", json!({ "vm": "e", "protected": false, "confirm": token_of(&asked) }));
    for network in [json!({ "preset": "open" }), json!({ "allow": ["*", "10.0.0.1:80"] })] {
        let asked = refused(&mut agent, "vm_update", json!({ "vm": "e", "network": network }));
        assert!(asked.text.contains("private networks") || asked.text.contains("10.0.0.1"), "{}", asked.text);
        token_of(&asked);
        agent.must("vm_update", json!({ "vm": "e", "network": { "allow": ["example.org"] } }));
        agent.must("vm_update", json!({ "vm": "e", "network": { "mode": "none" } }));
        owner.must("vm_update", json!({ "vm": "e", "network": { "mode": "proxy", "allow": [] } }));
    }
    // Who has the scope for it is not asked.
    trusted.must("vm_update", json!({ "vm": "e", "network": { "preset": "open" } }));
    trusted.must("vm_delete", json!({ "vm": "e" }));

    // Tokens of others; pruning of what was made on purpose.
    let admin = token(&mut owner, json!({ "scopes": ["admin"], "tools": "all" }));
    let mut admin = connect(&admin);
    let asked = refused(&mut admin, "token_revoke", json!({ "token": "agent" }));
    admin.must("token_revoke", json!({ "token": "agent", "confirm": token_of(&asked) }));
    // Only what nothing uses is pruned; a VM of a token that is gone is deleted by the daemon's user.
    owner.must_confirmed("vm_delete", json!({ "vm": "mine" }));
    owner.must("prune", json!({ "wait_s": 45 }));
    owner.must("prune", json!({ "images": true, "dry_run": true, "wait_s": 45 }));
    let asked = refused(&mut owner, "prune", json!({ "images": true, "wait_s": 45 }));
    assert!(asked.text.contains("remove the image "), "{}", asked.text);
    owner.must("prune", json!({ "images": true, "wait_s": 45, "confirm": token_of(&asked) }));
}

#[test]
fn a_client_that_can_asks_its_user() {
    let world = World::hostile(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner");
    image(&world, &mut owner);
    let secret = owner.must("token_create", json!({}))["token"].as_str().expect("a secret").to_owned();
    let mut maker = Client::connect_with(&world.daemon.socket(), &secret).expect("a holder");
    for name in ["a", "b", "c"] {
        create(&mut maker, name);
    }
    // Within the call, in revisions with sessions.
    let mut asks =
        Client::connect_as(&world.daemon.socket(), "/mcp?tools=all", "", json!({ "elicitation": {} }))
            .expect("a client that can ask");
    for (answer, expected) in [
        (json!({ "action": "decline" }), "cancelled"),
        (json!({ "action": "accept", "content": { "confirm": false } }), "cancelled"),
        // Only an explicit yes counts.
        (json!({ "action": "accept" }), "cancelled"),
        (json!({ "action": "accept", "content": {} }), "cancelled"),
        (json!({ "action": "accept", "content": { "confirm": "true" } }), "cancelled"),
        (json!({ "action": "accept", "content": { "confirm": true } }), "deleted"),
    ] {
        let id = asks
            .start("tools/call", &json!({ "name": "vm_delete", "arguments": { "vm": "a" } }))
            .expect("a call");
        let question = asks.next_message().expect("a question");
        assert_eq!(question["method"], "elicitation/create", "{question}");
        let message = question["params"]["message"].as_str().expect("a text");
        assert!(message.contains("delete the VM a (") && message.contains("made by token:"), "{message}");
        assert_eq!(question["params"]["requestedSchema"]["required"], json!(["confirm"]), "{question}");
        let line = json!({ "jsonrpc": "2.0", "id": question["id"], "result": answer }).to_string();
        asks.send_line(&line).expect("an answer is sent");
        let outcome = asks.answer(id).expect("an outcome");
        assert!(outcome.contains(expected), "{expected}: {outcome}");
    }

    // By a result that asks for input, in the stateless revision: the state is the token, good once.
    let call = |more: Value| {
        let mut params = json!({ "name": "vm_delete", "arguments": { "vm": "b" }, "_meta": {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientCapabilities": { "elicitation": { "form": {} } },
            "io.modelcontextprotocol/clientInfo": { "name": "test", "version": "0" } } });
        params.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params }).to_string();
        let text = post(&world, &body);
        let start = text.find(r#"{"jsonrpc""#).unwrap_or_else(|| panic!("no answer: {text}"));
        let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
        values.next().expect("an answer").expect("JSON")["result"].clone()
    };
    let asked = call(json!({}));
    assert_eq!(asked["resultType"], "input_required", "{asked}");
    assert_eq!(asked["inputRequests"]["confirm"]["method"], "elicitation/create");
    let state = asked["requestState"].clone();
    let yes = json!({ "confirm": { "action": "accept", "content": { "confirm": true } } });
    let declined =
        call(json!({ "inputResponses": { "confirm": { "action": "decline" } }, "requestState": state }));
    assert_eq!(declined["isError"], true, "{declined}");
    let empty = json!({ "confirm": { "action": "accept", "content": {} } });
    let unsaid = call(json!({ "inputResponses": empty, "requestState": state }));
    assert_eq!(unsaid["isError"], true, "{unsaid}");
    let forged = call(json!({ "inputResponses": yes, "requestState": "0".repeat(64) }));
    assert_eq!(forged["resultType"], "input_required", "{forged}");
    let done = call(json!({ "inputResponses": yes, "requestState": state }));
    assert!(done["isError"] != true && done.to_string().contains("deleted"), "{done}");

    // The command line asks at a terminal; a script says --yes.
    let nexusctl = |arguments: &[&str]| {
        let mut command = Command::new(program("nexusctl"));
        command.args(arguments).envs(world.daemon.environment()).env("NEXUS_SOCKET", world.daemon.socket());
        let output = command.output().expect("nexusctl runs");
        (output.status.code(), String::from_utf8(output.stderr).expect("UTF-8"))
    };
    let (code, error) = nexusctl(&["rm", "c"]);
    assert!(code == Some(4) && error.contains("--yes") && error.contains("made by token:"), "{error}");
    let (code, error) = nexusctl(&["rm", "c", "--yes"]);
    assert_eq!(code, Some(0), "{error}");
}

#[test]
fn a_guest_cannot_make_its_drive_look_unused() {
    let world = World::new();
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner");
    let mut arguments = world.arguments("web");
    arguments["start"] = false.into();
    owner.must("vm_create", arguments);
    owner.must("drive_create", json!({ "name": "data", "size": "16MiB", "wait_s": 45 }));
    owner.must("drive_attach", json!({ "drive": "data", "vm": "web", "mount": "/data" }));
    owner.must("drive_create", json!({ "name": "before", "from": "drive:data", "wait_s": 45 }));
    owner.must("vm_start", json!({ "vm": "web", "wait_s": 45 }));
    owner.must("vm_stop", json!({ "vm": "web", "force": true, "wait_s": 45 }));
    let data = owner.must("drive_detach", json!({ "drive": "data" }));
    // As it can write to its disk, the guest can say that it never mounted it.
    let disk = std::fs::OpenOptions::new().write(true).open(data["path"].as_str().expect("a path"));
    disk.and_then(|disk| disk.write_all_at(&[0; 4], 1024 + 0x2c))
        .expect("the time of the last mount is cleared");
    owner.must("drive_create", json!({ "name": "after", "from": "drive:data", "wait_s": 45 }));
    owner.must("drive_create", json!({ "name": "unused", "size": "16MiB", "wait_s": 45 }));
    for drive in ["data", "after"] {
        let asked = refused(&mut owner, "drive_delete", json!({ "drive": drive }));
        assert!(asked.text.contains("may hold data of a VM"), "{}", asked.text);
        owner.must("drive_inspect", json!({ "drive": drive }));
        owner.must("drive_delete", json!({ "drive": drive, "confirm": token_of(&asked) }));
    }
    for drive in ["before", "unused"] {
        owner.must("drive_delete", json!({ "drive": drive }));
    }
    world.assert_in_order();
}

fn post(world: &World, body: &str) -> String {
    use std::io::{Read, Write};
    let (url, token) = world.daemon.http();
    let address = url.trim_start_matches("http://").trim_end_matches("/mcp");
    let mut stream = std::net::TcpStream::connect(address).expect("connect by HTTP");
    let head = format!(
        "POST /mcp?tools=all HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nAccept: application/json, text/event-stream\r\n\
         MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/call\r\nMcp-Name: vm_delete\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("a request is sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}
