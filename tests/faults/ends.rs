//! Many calls at once, clients that disconnect, and machines that are ended from outside.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::kill_process;
use serde_json::{Value, json};

use crate::world::{SOON, World, is_alive, process, refused, soon};

/// How many files the daemon has open.
fn open_files(world: &World) -> usize {
    fs::read_dir(format!("/proc/{}/fd", world.daemon.pid())).expect("its open files").count()
}

#[test]
fn twenty_at_once_all_come_and_go() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "first");
    client.must("vm_delete", json!({ "vm": "first", "force": true }));
    let before = open_files(&world);

    let creations: Vec<_> = (0..20)
        .map(|at| {
            let (mut client, arguments) = (world.client(), world.arguments(&format!("vm-{at}")));
            thread::spawn(move || client.to_the_end("vm_create", arguments, Duration::from_mins(3)))
        })
        .collect();
    let vms: Vec<Value> = creations.into_iter().map(|c| c.join().expect("it is created")).collect();
    for key in ["id", "cid", "boot_id"] {
        let different: BTreeSet<String> = vms.iter().map(|vm| vm[key].to_string()).collect();
        assert_eq!(different.len(), 20, "{key}");
    }
    assert!(vms.iter().all(|vm| vm["state"] == "ready"));
    world.assert_in_order();

    let deletions: Vec<_> = (0..20)
        .map(|at| {
            let mut client = world.client();
            let arguments = json!({ "vm": format!("vm-{at}"), "force": true });
            thread::spawn(move || client.must("vm_delete", arguments))
        })
        .collect();
    for deletion in deletions {
        deletion.join().expect("it is deleted");
    }
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    for vm in &vms {
        assert!(!is_alive(process(vm, "pid")), "{vm}");
    }
    soon("the files to be closed", || (open_files(&world) <= before + 2).then_some(()));
    world.assert_in_order();
}

#[test]
fn twenty_of_one_name_are_one() {
    let world = World::new();
    let creations: Vec<_> = (0..20)
        .map(|_| {
            let (mut client, arguments) = (world.client(), world.arguments("wanted"));
            thread::spawn(move || client.call("vm_create", arguments))
        })
        .collect();
    let outcomes: Vec<_> = creations.into_iter().map(|c| c.join().expect("an answer")).collect();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
    for failure in outcomes.into_iter().filter_map(Result::err) {
        assert_eq!(failure.code, "name_taken", "{}", failure.text);
    }
    world.assert_in_order();
}

#[test]
fn a_client_and_a_daemon_that_go_away_leave_a_command_running() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "left");
    let mut hasty = world.client();
    let mark = world.path("began");
    let command = format!("echo begun; touch {}; exec sleep 4321", mark.display());
    let call = json!({ "name": "guest_run_command", "arguments": { "vm": "left", "command": command } });
    hasty.start("tools/call", &call).expect("the call is sent");
    soon("the command", || mark.exists().then_some(()));
    soon("the command to go on", || sleeps("4321").then_some(()));
    drop(hasty);
    assert_eq!(client.run("left", "echo still here").stdout, "still here\n");
    // One call of this client is running when the daemon is killed.
    let call = json!({ "vm": "left", "command": "sleep 4322" });
    client
        .start("tools/call", &json!({ "name": "guest_run_command", "arguments": call }))
        .expect("it is sent");
    soon("another command", || sleeps("4322").then_some(()));
    world.daemon.kill();
    world.daemon.restart();
    let mut client = world.client();
    client.wait_for_state("left", "ready");
    let list = client.call_whole("guest_command_list", json!({ "vm": "left" })).expect("a list");
    let commands = list["_meta"]["dev.nexus/result"]["commands"].as_array().expect("commands").clone();
    let running: Vec<_> = commands.iter().filter(|command| command["state"] == "running").collect();
    assert_eq!(running.len(), 2, "{list}");
    for command in &running {
        assert!(command["client"].as_str().is_some_and(|who| who.starts_with("test (uid:")), "{list}");
    }
    assert!(sleeps("4321") && sleeps("4322"));
    let read = json!({ "vm": "left", "id": running[1]["command_id"] });
    let said = client.call_whole("guest_command_output", read).expect("its output is kept");
    assert_eq!(nexus_tests::client::stream(&said, "stdout"), "begun\n", "{said}");
    for command in &running {
        let signal = json!({ "vm": "left", "id": command["command_id"], "signal": "KILL" });
        client.call_whole("guest_command_signal", signal).expect("it is killed");
    }
    soon("the end of the commands", || (!sleeps("4321") && !sleeps("4322")).then_some(()));

    // A creation that nobody waits for continues.
    let mut hasty = world.client();
    let call = json!({ "name": "vm_create", "arguments": world.arguments("goes-on") });
    hasty.start("tools/call", &call).expect("the call is sent");
    soon("the VM", || client.call("vm_inspect", json!({ "vm": "goes-on" })).ok());
    drop(hasty);
    client.wait_for_state("goes-on", "ready");
    world.assert_in_order();
}

#[test]
fn a_thousand_calls_in_flight_are_each_answered_once() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "busy");
    let go = world.path("go");
    let command = format!("until [ -e {} ]; do sleep 0.1; done; echo done", go.display());
    let started = client
        .call_whole("guest_command_start", json!({ "vm": "busy", "command": command }))
        .expect("it is started");
    let id = started["_meta"]["dev.nexus/result"]["command_id"].clone();

    // Four clients, each with nearly as many calls as one may have, share the one link of the VM. Each call waits for the command's output.
    let ask = json!({ "vm": "busy", "id": id, "wait_ms": 40_000 });
    let call = json!({ "name": "guest_command_output", "arguments": ask });
    let clients: Vec<(Client, BTreeSet<u64>)> = (0..4)
        .map(|_| {
            let mut waiting = world.client();
            let start = |_| waiting.start("tools/call", &call).expect("it is sent");
            let asked = (0..250).map(start).collect();
            (waiting, asked)
        })
        .collect();
    // Others are served meanwhile.
    assert_eq!(client.run("busy", "echo still here").stdout, "still here\n");
    fs::write(&go, "").expect("the file can be made");
    for (mut waiting, mut asked) in clients {
        while !asked.is_empty() {
            let message = waiting.next_message().expect("an answer");
            let Some(id) = message["id"].as_u64() else { continue };
            assert!(asked.remove(&id), "answered twice: {message}");
            assert_eq!(nexus_tests::client::stream(&message["result"], "stdout"), "done\n", "{message}");
        }
    }
    world.assert_in_order();
}

/// Whether a `sleep` with this argument is running.
fn sleeps(seconds: &str) -> bool {
    let words = format!("sleep\0{seconds}\0");
    fs::read_dir("/proc")
        .expect("the processes")
        .flatten()
        .any(|process| fs::read(process.path().join("cmdline")).is_ok_and(|line| line == words.as_bytes()))
}

#[test]
fn a_cancelled_creation_leaves_nothing() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let mut arguments = world.arguments("silent-1");
    arguments["wait_s"] = 0.into();
    let op = client.must("vm_create", arguments)["op_id"].clone();
    client.wait_for_state("silent-1", "starting");
    client.must("op_cancel", json!({ "op_id": op }));
    let ended = client.must("op_get", json!({ "op_id": op, "wait_s": 20 }));
    assert_eq!((&ended["done"], &ended["state"]), (&json!(true), &json!("cancelled")), "{ended}");
    assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "silent-1" })).code, "vm_not_found");
    world.assert_in_order();
}

#[test]
fn a_killed_vmm_or_shim_takes_the_other_along() {
    let world = World::new();
    let mut client = world.client();
    for which in ["pid", "shim_pid"] {
        let vm = world.create(&mut client, "shot");
        kill_process(process(&vm, which));
        let crashed = client.wait_for_state("shot", "crashed");
        assert!(crashed["reason"].is_string(), "{crashed}");
        for other in ["pid", "shim_pid"] {
            soon("the end of the other", || (!is_alive(process(&vm, other))).then_some(()));
        }
        world.assert_in_order();
        let again = client.to_the_end("vm_start", json!({ "vm": "shot" }), SOON);
        assert_ne!(again["boot_id"], vm["boot_id"]);
        assert_eq!(client.run("shot", "echo up").stdout, "up\n");
        client.must("vm_delete", json!({ "vm": "shot", "force": true }));
    }
    world.assert_in_order();
}

#[test]
fn a_command_is_over_when_its_machine_is() {
    let world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "shot");
    let mut other = world.client();
    let mark = world.path("began");
    let command = format!("touch {}; exec sleep 8765", mark.display());
    let call = thread::spawn(move || {
        other.call_whole("guest_run_command", json!({ "vm": "shot", "command": command }))
    });
    soon("the command", || (mark.exists() && sleeps("8765")).then_some(()));
    kill_process(process(&vm, "pid"));
    let failure = call.join().expect("an answer").expect_err("its machine is gone");
    assert!(["vm_gone", "guest_unreachable"].contains(&&*failure.code), "{}", failure.text);
    soon("the end of the command", || (!sleeps("8765")).then_some(()));
    client.wait_for_state("shot", "crashed");
    world.assert_in_order();
}
