//! Events: each reader gets its own, in order, with a cursor that outlives the daemon; and a guest that causes too many harms no other.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::{kill_process, program};
use nexus_tests::wait::stay;
use serde_json::{Value, json};

use crate::world::{World, refused, soon};

fn all_tools(world: &World) -> Client {
    Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects")
}

fn events(reply: &Value) -> &Vec<Value> {
    reply["events"].as_array().expect("a list")
}

/// Reads from a cursor on until an event is there; returns it, and all that came before it.
#[track_caller]
fn until_event(
    client: &mut Client,
    cursor: &mut Value,
    filter: &Value,
    is_it: impl Fn(&Value) -> bool,
) -> (Value, Vec<Value>) {
    let mut before = Vec::new();
    let found = soon("an event", || {
        let mut arguments = filter.clone();
        (arguments["cursor"], arguments["wait_s"]) = (cursor.clone(), 10.into());
        let reply = client.must("events_wait", arguments);
        *cursor = reply["cursor"].clone();
        before.extend(events(&reply).iter().cloned());
        before.iter().find(|event| is_it(event)).cloned()
    });
    (found, before)
}

#[test]
fn what_happens_to_a_vm_is_told_in_order_and_the_cursor_outlives_the_daemon() {
    let mut world = World::new();
    let mut owner = all_tools(&world);
    let mut cursor = owner.must("events_wait", json!({}))["cursor"].clone();
    let vm = world.create(&mut owner, "web");
    let ready = |event: &Value| event["kind"] == "vm" && event["state"] == "ready";
    let (ready_at, told) = until_event(&mut owner, &mut cursor, &json!({}), ready);
    assert_eq!([&ready_at["vm"], &ready_at["vm_name"]], [&vm["id"], &json!("web")], "{ready_at}");
    assert_eq!(ready_at["boot_id"], vm["boot_id"], "{ready_at}");
    let states: Vec<_> =
        told.iter().filter(|event| event["kind"] == "vm").map(|event| event["state"].clone()).collect();
    assert_eq!(states, ["creating", "created", "starting", "running", "ready"]);
    assert!(told.is_sorted_by_key(|event| event["seq"].as_u64()), "{told:?}");
    let began = told.iter().find(|event| event["kind"] == "op").expect("the operation began");
    assert_eq!([&began["tool"], &began["state"]], [&json!("vm_create"), &json!("running")], "{began}");
    let is_end = |event: &Value| event["op_id"] == began["op_id"] && event["state"] != "running";
    // It may have come along with the VM's.
    let ended = match told.iter().find(|event| is_end(event)) {
        Some(ended) => ended.clone(),
        None => until_event(&mut owner, &mut cursor, &json!({ "kinds": ["op"] }), is_end).0,
    };
    assert_eq!(ended["state"], "succeeded", "{ended}");

    // The end of a command that goes on after its call; not that of one whose call waits for it.
    owner.run("web", "true");
    let started = owner
        .call_whole("guest_command_start", json!({ "vm": "web", "command": "exit 7" }))
        .expect("it starts");
    let id = &started["_meta"]["dev.nexus/result"]["command_id"];
    let filter = json!({ "vm": "web", "kinds": ["command"] });
    let (end, all) = until_event(&mut owner, &mut cursor, &filter, |event| event["command_id"] == *id);
    assert_eq!((&end["status"], all.len()), (&json!(7), 1), "{all:?}");
    let yielded =
        json!({ "vm": "web", "command": "read line; exit 3", "stdin_open": true, "yield_after_s": 0 });
    let yielded = owner.call_whole("guest_run_command", yielded).expect("it goes on");
    let id = yielded["_meta"]["dev.nexus/result"]["command_id"].clone();
    owner
        .call_whole("guest_command_input", json!({ "vm": "web", "id": id, "input": "\n" }))
        .expect("it reads");
    let (end, _) = until_event(&mut owner, &mut cursor, &filter, |event| event["command_id"] == id);
    assert_eq!(end["status"], 3, "{end}");

    // A caller waits until something happens.
    let waited = std::thread::scope(|scope| {
        let (at, mut other) = (cursor.clone(), all_tools(&world));
        let arguments = json!({ "cursor": at, "vm": "web", "kinds": ["vm"], "wait_s": 30 });
        let waiting = scope.spawn(move || other.must("events_wait", arguments));
        owner.must("vm_update", json!({ "vm": "web", "tags": { "team": "a" } }));
        waiting.join().expect("no panic")
    });
    assert!(
        events(&waited)[0]["text"].as_str().expect("a text").contains("changed by vm_update"),
        "{waited}"
    );

    // In order: nothing is missing. Killed: that is told.
    cursor = waited["cursor"].clone();
    world.daemon.stop();
    world.daemon.restart();
    let mut owner = all_tools(&world);
    let reply = owner.must("events_wait", json!({ "cursor": cursor, "kinds": ["daemon"], "wait_s": 0 }));
    let states: Vec<_> = events(&reply).iter().map(|event| event["state"].clone()).collect();
    assert_eq!(
        (states, &reply["missed"]),
        (vec![json!("stopped"), json!("started")], &Value::Null),
        "{reply}"
    );
    let cursor = reply["cursor"].clone();
    stay(Duration::from_millis(200));
    drop(owner);
    world.daemon.kill();
    world.daemon.restart();
    let mut owner = all_tools(&world);
    let reply = owner.must("events_wait", json!({ "cursor": cursor, "vm": "web", "wait_s": 0 }));
    assert!(reply["missed"].as_str().expect("it is told").contains("killed"), "{reply}");
    let again = json!({ "cursor": reply["cursor"], "vm": "web", "wait_s": 0 });
    assert_eq!(owner.must("events_wait", again)["missed"], Value::Null);
    let old = owner.must("events_wait", json!({ "vm": "web", "kinds": ["vm"], "limit": 500 }));
    assert!(
        events(&old).iter().any(|event| event["seq"] == ready_at["seq"]),
        "the first events are still there"
    );

    // What dies is told; deleted VMs are found by their names.
    let mut cursor = reply["cursor"].clone();
    let process = owner.inspect("web")["process"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    kill_process(process.expect("a process"));
    until_event(&mut owner, &mut cursor, &json!({ "vm": "web" }), |event| event["state"] == "crashed");
    owner.must("vm_delete", json!({ "vm": "web" }));
    let (gone, _) =
        until_event(&mut owner, &mut cursor, &json!({ "vm": "web" }), |event| event["state"] == "deleted");
    assert_eq!(gone["from"], "crashed", "{gone}");

    for (arguments, words) in [
        (json!({ "cursor": "x" }), "unknown cursor"),
        (json!({ "cursor": "9007199254740991" }), "unknown cursor"),
        (json!({ "vm": "nowhere" }), "there is no VM nowhere"),
        (json!({ "kinds": ["vms"] }), "kinds"),
        (json!({ "limit": 501 }), "limit"),
        (json!({ "cursor": cursor, "wait_s": 46 }), "wait_s"),
    ] {
        let failure = refused(&mut owner, "events_wait", arguments.clone());
        assert!(failure.text.contains(words), "{arguments}: {}", failure.text);
    }
}

#[test]
fn a_token_reads_events_of_its_own_and_learns_of_no_other() {
    let world = World::new();
    let mut owner = all_tools(&world);
    let theirs = world.create(&mut owner, "theirs");
    world.create(&mut owner, "ours");
    let made = owner.must("token_create", json!({ "vms": ["ours"], "tools": "all" }));
    let secret = made["token"].as_str().expect("a secret");
    let mut agent = Client::connect_with(&world.daemon.socket(), secret).expect("the holder connects");
    let mut cursor = agent.must("events_wait", json!({}))["cursor"].clone();
    owner.must("vm_stop", json!({ "vm": "theirs", "force": true, "wait_s": 45 }));
    owner.must("vm_delete", json!({ "vm": "theirs" }));
    owner.must("vm_stop", json!({ "vm": "ours", "force": true, "wait_s": 45 }));
    let (_, told) = until_event(&mut agent, &mut cursor, &json!({}), |event| event["state"] == "stopped");
    let old = agent.must("events_wait", json!({ "limit": 500 }));
    let their_id = theirs["id"].as_str().expect("an id");
    for text in [json!(told).to_string(), old.to_string()] {
        assert!(!text.contains("theirs") && !text.contains(their_id) && text.contains("ours"), "{text}");
    }
    for vm in ["theirs", their_id] {
        let failure = refused(&mut agent, "events_wait", json!({ "vm": vm }));
        let nowhere = refused(&mut agent, "events_wait", json!({ "vm": "nowhere" }));
        assert_eq!(failure.code, "vm_not_found");
        assert_eq!(failure.text.replace(vm, "X"), nowhere.text.replace("nowhere", "X"));
    }
    // Revoked while it waits: the call ends.
    let waiting = agent.start(
        "tools/call",
        &json!({ "name": "events_wait",
        "arguments": { "cursor": cursor, "kinds": ["denied"], "wait_s": 45 } }),
    );
    waiting.expect("it is sent");
    owner.must_confirmed("token_revoke", json!({ "token": made["id"] }));
    let begun = std::time::Instant::now();
    while agent.next_message().is_ok() {}
    let lasted = begun.elapsed();
    assert!(lasted < Duration::from_secs(1), "the call waits for events all the same: {lasted:?}");
}

#[test]
fn a_guest_that_floods_displaces_no_events_of_others_and_its_drops_are_counted() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    let mut cursor = owner.must("events_wait", json!({}))["cursor"].clone();
    world.create(&mut owner, "good-1");
    world.create(&mut owner, "floods-1");
    let filter = json!({ "vm": "floods-1", "limit": 500 });
    let mut told = 0;
    let mut dropped = 0;
    // All of the flood is either told or counted.
    soon("the whole flood", || {
        let mut arguments = filter.clone();
        (arguments["cursor"], arguments["wait_s"]) = (cursor.clone(), 5.into());
        let reply = owner.must("events_wait", arguments);
        cursor = reply["cursor"].clone();
        told += events(&reply).iter().filter(|event| event["kind"] == "command").count() as u64;
        dropped += events(&reply).iter().filter_map(|event| event["dropped"].as_u64()).sum::<u64>();
        (told + dropped >= 100_000).then_some(())
    });
    assert!((100..1000).contains(&told) && told + dropped == 100_000, "{told} told, {dropped} dropped");
    // The other's are all there, and the flooding VM's own changes of state.
    for vm in ["good-1", "floods-1"] {
        let reply = owner.must("events_wait", json!({ "vm": vm, "kinds": ["vm"], "limit": 500 }));
        let states: Vec<_> = events(&reply).iter().map(|event| event["state"].clone()).collect();
        assert_eq!(states, ["creating", "created", "starting", "running", "ready"], "{vm}");
    }
}

#[test]
fn nexusctl_follows_events_line_by_line() {
    let world = World::hostile(&[]);
    let mut owner = world.client();
    let mut following = Command::new(program("nexusctl"))
        .args(["events", "-f", "--json", "--kind", "vm,op", "--after"])
        .arg(all_tools(&world).must("events_wait", json!({}))["cursor"].as_str().expect("a cursor"))
        .envs(world.daemon.environment())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nexusctl runs");
    world.create(&mut owner, "good-1");
    let lines = BufReader::new(following.stdout.take().expect("its output")).lines();
    let mut told = lines.map(|line| serde_json::from_str::<Value>(&line.expect("a line")).expect("JSON"));
    assert!(told.any(|event| event["vm_name"] == "good-1" && event["state"] == "ready"));
    kill_process(following.id());
    following.wait().expect("it ends");
    let listed = Command::new(program("nexusctl"))
        .args(["events", "--vm", "good-1"])
        .envs(world.daemon.environment())
        .output()
        .expect("nexusctl runs");
    let text = String::from_utf8_lossy(&listed.stdout);
    assert!(text.contains("running -> ready") && text.contains("WHEN"), "{text}");
}
