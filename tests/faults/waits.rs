//! `vm_wait`: one call until something is so, instead of many.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::wait::stay;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

/// Starts to wait in a thread of its own.
fn waiting(
    mut client: Client,
    arguments: Value,
) -> thread::JoinHandle<Result<Value, nexus_tests::client::Failure>> {
    thread::spawn(move || client.call("vm_wait", arguments))
}

#[test]
fn a_call_waits_for_a_state_a_port_a_file_or_a_commands_end() {
    let world = World::new();
    let mut client = world.client();
    let mut arguments = world.arguments("web");
    arguments["wait_s"] = 0.into();
    client.must("vm_create", arguments);
    let ready = client.must("vm_wait", json!({ "vm": "web", "wait_s": 45 }));
    assert_eq!((&ready["done"], &ready["state"]), (&json!(true), &json!("ready")), "{ready}");
    assert_eq!(ready["boot_id"], client.inspect("web")["boot_id"]);

    // What is not so yet is told with what is missing.
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port is free").port();
    let file = world.path("made");
    let start = json!({ "vm": "web", "command": "read line; exit 3", "stdin_open": true });
    let started = client.call_whole("guest_command_start", start).expect("it is started");
    let id = started["_meta"]["dev.nexus/result"]["command_id"].clone();
    let goals = [
        (json!({ "state": "stopped" }), "state stopped".to_owned()),
        (json!({ "port": port }), format!("a server on port {port}")),
        (json!({ "file": file }), format!("the file {}", file.display())),
        (json!({ "command_id": id }), format!("the end of command {}", id.as_str().expect("an id"))),
    ];
    let with = |goal: &Value, wait_s: u32| {
        let mut arguments = goal.clone();
        arguments["vm"] = "web".into();
        arguments["wait_s"] = wait_s.into();
        arguments
    };
    for (goal, missing) in &goals {
        let not_yet = client.must("vm_wait", with(goal, 0));
        assert_eq!(not_yet["done"], false, "{not_yet}");
        assert_eq!(not_yet["waiting_for"], *missing);
    }
    // And then it comes to pass.
    let waits: Vec<_> = goals.iter().map(|(goal, _)| waiting(world.client(), with(goal, 45))).collect();
    stay(Duration::from_millis(300));
    let _server = TcpListener::bind(("127.0.0.1", port)).expect("it is free");
    std::fs::write(&file, "").expect("a file is written");
    let input = json!({ "vm": "web", "id": id, "input": "go\n" });
    client.call_whole("guest_command_input", input).expect("it reads");
    let mut waits: Vec<_> = waits.into_iter().collect();
    for wait in waits.drain(1..) {
        let done = wait.join().expect("an answer").expect("no failure");
        assert_eq!((&done["done"], &done["state"]), (&json!(true), &json!("ready")), "{done}");
    }
    let ended = client.must("vm_wait", with(&goals[3].0, 0));
    assert_eq!((&ended["done"], &ended["status"]), (&json!(true), &json!(3)), "{ended}");
    client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON);
    let stopped = waits.remove(0).join().expect("an answer").expect("no failure");
    assert_eq!((&stopped["done"], &stopped["state"]), (&json!(true), &json!("stopped")), "{stopped}");
}

#[test]
fn what_cannot_come_to_pass_is_said_at_once() {
    let world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "web");
    for (arguments, code) in [
        (json!({ "state": "ready", "port": 80 }), "invalid_argument"),
        (json!({ "file": "relative" }), "invalid_argument"),
        (json!({ "port": 0 }), "invalid_argument"),
        (json!({ "wait_s": 46 }), "invalid_argument"),
        (json!({ "command_id": "aaaaaaaaaaaac" }), "command_not_found"),
    ] {
        let mut arguments = arguments;
        arguments["vm"] = "web".into();
        assert_eq!(refused(&mut client, "vm_wait", arguments.clone()).code, code, "{arguments}");
    }
    // A VM that goes down meanwhile, is deleted, or boots anew.
    let file = json!({ "vm": "web", "file": "/there/is/nothing", "wait_s": 45 });
    let boot = json!({ "vm": "web", "state": "crashed", "wait_s": 45, "if_boot_id": vm["boot_id"] });
    let (down, anew) = (waiting(world.client(), file.clone()), waiting(world.client(), boot));
    stay(Duration::from_millis(200));
    client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON);
    let failure = down.join().expect("an answer").expect_err("it is down");
    assert_eq!(failure.code, "vm_not_running", "{}", failure.text);
    assert!(failure.text.contains("vm_start") || failure.text.contains("vm_restart"), "{}", failure.text);
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    assert_eq!(anew.join().expect("an answer").expect_err("it has booted anew").code, "boot_changed");
    let gone = waiting(world.client(), json!({ "vm": "web", "state": "crashed", "wait_s": 45 }));
    stay(Duration::from_millis(200));
    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    assert_eq!(gone.join().expect("an answer").expect_err("it is gone").code, "vm_not_found");
}
