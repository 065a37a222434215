//! The audit log: every call that was allowed or denied is in it, also after the daemon was killed, and nothing of what it contained.

use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::wait::{stay, until};
use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

fn all_tools(world: &World) -> Client {
    Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects")
}

fn listed(client: &mut Client, arguments: Value) -> Vec<Value> {
    client.must("audit_list", arguments)["calls"].as_array().expect("a list").clone()
}

#[test]
fn each_call_is_recorded_with_what_decided_and_none_of_its_contents() {
    let place = tempfile::tempdir().expect("a directory");
    let file = place.path().join("audit.jsonl");
    let mut world = World::with(&[("NEXUS_AUDIT_FILE", file.to_str().expect("UTF-8"))]);
    let mut owner = all_tools(&world);
    let vm = world.create(&mut owner, "web");
    let made = owner.must("token_create", json!({ "scopes": ["exec"], "vms": ["web"], "tools": "all" }));
    let (secret, caller) =
        (made["token"].as_str().expect("a secret"), format!("token:{}", made["id"].as_str().expect("an id")));
    let mut agent = Client::connect_with(&world.daemon.socket(), secret).expect("a holder");
    agent.run("web", "echo swordfish");
    refused(&mut agent, "vm_stop", json!({ "vm": "web" }));
    refused(&mut agent, "vm_inspect", json!({ "vm": "nowhere" }));
    let query = json!({ "caller": caller });
    let calls = until(SOON, || Some(listed(&mut owner, query.clone())).filter(|calls| calls.len() == 3))
        .expect("three calls");
    let [unknown, denied, ran] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!([&ran["tool"], &ran["outcome"], &ran["rule"]], ["run_command", "ok", "exec"], "{ran}");
    assert_eq!([&ran["vm"], &ran["boot_id"]], [&vm["id"], &vm["boot_id"]], "{ran}");
    assert!(ran["bytes_in"].as_u64() > Some(10) && ran["bytes_out"].as_u64() > Some(10), "{ran}");
    assert_eq!([&denied["tool"], &denied["outcome"], &denied["rule"]], ["vm_stop", "forbidden", "no scope"]);
    assert_eq!(unknown["outcome"], "vm_not_found");

    // Each filter, pages, and what comes after.
    for (arguments, count) in [
        (json!({ "caller": caller, "tool": "vm_stop" }), 1),
        (json!({ "caller": caller, "outcome": "denied" }), 1),
        (json!({ "caller": caller, "outcome": "ok" }), 1),
        (json!({ "caller": caller, "vm": "web" }), 2),
        (json!({ "caller": caller, "since": ran["at"] }), 3),
        (json!({ "caller": caller, "until": ran["at"] }), 0),
        (json!({ "caller": caller, "after": ran["seq"] }), 2),
        (json!({ "caller": "nobody" }), 0),
    ] {
        assert_eq!(listed(&mut owner, arguments.clone()).len(), count, "{arguments}");
    }
    let page = owner.must("audit_list", json!({ "caller": caller, "limit": 2 }));
    let next = page["next_cursor"].as_str().expect("a cursor");
    let rest = listed(&mut owner, json!({ "caller": caller, "limit": 2, "cursor": next }));
    assert_eq!(rest.len(), 1);
    let last = owner.must("audit_list", json!({}))["last"].clone();
    let waits = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            listed(&mut all_tools(&world), json!({ "caller": caller, "after": last, "wait_s": 30 }))
        });
        agent.must("vm_list", json!({}));
        waiting.join().expect("no panic")
    });
    assert_eq!(waits.len(), 1, "{waits:?}");

    // Killed 100 ms after a call, the daemon has it, in the file as well; contents and secrets are nowhere.
    agent.must("system_info", json!({}));
    stay(Duration::from_millis(150));
    drop((owner, agent));
    world.daemon.kill();
    let text = std::fs::read_to_string(&file).expect("the exported log");
    assert!(!text.contains("swordfish") && !text.contains(secret) && !text.contains("echo"), "{text}");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert!(lines.iter().any(|line| line["tool"] == "system_info" && line["caller"] == json!(caller)));
    world.daemon.restart();
    let mut owner = all_tools(&world);
    assert_eq!(listed(&mut owner, json!({ "caller": caller, "tool": "system_info" })).len(), 1);

    // At SIGTERM nothing is lost.
    owner.must("image_list", json!({}));
    drop(owner);
    world.daemon.stop();
    let text = std::fs::read_to_string(&file).expect("the exported log");
    assert!(text.lines().last().expect("a line").contains("image_list"), "{text}");
    world.daemon.restart();
}

#[test]
fn subscriptions_are_recorded_as_calls_are() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    owner.request("resources/subscribe", &json!({ "uri": "nexus://vms" })).expect("it is subscribed");
    owner.request("resources/subscribe", &json!({ "uri": "nexus://vm/nowhere" })).expect_err("no such VM");
    owner.must("image_list", json!({}));
    let count = |owner: &mut Client, tool: &str| {
        let query = json!({ "tool": tool, "limit": 500 });
        listed(owner, query).into_iter().map(|call| call["outcome"].clone()).collect::<Vec<_>>()
    };
    until(SOON, || (count(&mut owner, "image_list").len() == 1).then_some(())).expect("all is recorded");
    let subscribed = count(&mut owner, "resources/subscribe");
    assert_eq!(subscribed, [json!("invalid_argument"), json!("ok")]);
}

#[test]
fn calls_go_on_when_the_log_cannot_be_written_and_the_loss_is_told() {
    // A device without any room.
    let world = World::hostile(&[("NEXUS_AUDIT_FILE", "/dev/full")]);
    let mut owner = all_tools(&world);
    owner.must("vm_list", json!({}));
    let lost =
        until(SOON, || owner.must("system_info", json!({}))["audit_lost"].as_u64().filter(|lost| *lost > 0));
    assert!(lost.is_some(), "nothing is told");
}
