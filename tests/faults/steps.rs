//! What results for a model say next works, in each state of a VM.

use nexus_schema::tools::vm::VmState;
use nexus_tests::client::Client;
use nexus_tests::daemon::kill_process;
use serde_json::{Value, json};

use crate::world::{SOON, World, process, refused, soon};

/// The call that a result names as the next one.
fn next(told: &Value) -> (String, Value) {
    let text = told["next"].as_str().unwrap_or_else(|| panic!("nothing is next: {told}"));
    let (tool, arguments) = text.split_once(' ').expect("a tool and its arguments");
    let mut arguments: Value = serde_json::from_str(arguments).expect("arguments are JSON");
    if arguments["command"] == "..." {
        arguments["command"] = "echo here".into();
    }
    (tool.to_owned(), arguments)
}

/// A reply about a VM that costs a model little.
#[track_caller]
fn short(told: &Value) {
    let length = told.to_string().len();
    assert!(length <= 300, "{length} bytes: {told}");
}

/// Does what is next; the result.
#[track_caller]
fn follow(client: &mut Client, told: &Value) -> Value {
    let (tool, arguments) = next(told);
    client.call_whole(&tool, arguments.clone()).unwrap_or_else(|e| panic!("{tool} {arguments}: {}", e.text))
}

#[test]
fn what_is_next_works() {
    let world = World::new();
    let (mut all, socket) = (world.client(), world.daemon.socket());
    let mut work = Client::connect_at(&socket, "/mcp?tools=work").expect("it connects");
    let mut arguments = world.arguments("web");
    arguments["start"] = false.into();
    let mut told = work.must("vm_create", arguments);
    // created -> vm_start -> ready -> guest_run_command
    for round in ["created", "stopped", "crashed"] {
        assert_eq!(told["result"]["state"], round, "{told}");
        short(&told);
        let started = follow(&mut work, &told)["structuredContent"].clone();
        assert_eq!(started["result"]["state"], "ready", "{started}");
        short(&started);
        let ran = follow(&mut work, &started);
        assert_eq!(nexus_tests::client::stream(&ran, "stdout"), "here\n", "{ran}");
        if round == "created" {
            told = work.must("vm_stop", json!({ "vm": "web" }));
        } else if round == "stopped" {
            kill_process(process(&all.inspect("web"), "pid"));
            all.wait_for_state("web", "crashed");
            told = work.must("vm_stop", json!({ "vm": "web" }));
        }
    }
    // paused -> vm_start, as the error of a call says, too
    all.must("vm_pause", json!({ "vm": "web" }));
    let paused = refused(&mut work, "guest_run_command", json!({ "vm": "web", "command": "true" }));
    assert!(paused.code == "vm_paused" && paused.text.contains("vm_start"), "{}", paused.text);
    let resumed = work.must(VmState::Paused.next().tool, json!({ "vm": "web" }));
    assert_eq!(resumed["result"]["state"], "ready", "{resumed}");
    short(&resumed);
    // What is the host's own is told to those who ask for it.
    for (arguments, is_told) in
        [(json!({ "vm": "web" }), false), (json!({ "vm": "web", "verbose": true }), true)]
    {
        let told = work.must("vm_inspect", arguments);
        for key in ["process", "console_log", "owner"] {
            assert_eq!(told.get(key).is_some(), is_told, "{key}: {told}");
        }
        assert_eq!(told["drives"][0].get("path").is_some(), is_told, "{told}");
    }
    // What goes on names the operation.
    all.must("vm_delete", json!({ "vm": "web", "force": true }));
    let mut arguments = world.arguments("web");
    arguments["wait_s"] = 0.into();
    let mut told = work.must("vm_create", arguments);
    soon("the VM is ready", || {
        if told["done"] == false {
            told = follow(&mut work, &told)["structuredContent"].clone();
        }
        (told["result"]["state"] == "ready").then_some(())
    });

    // Lists for a model are short: 20 operations, names of files.
    for _ in 0..12 {
        work.must("vm_stop", json!({ "vm": "web" }));
        work.must("vm_start", json!({ "vm": "web" }));
    }
    let ops = work.must("op_list", json!({}));
    assert_eq!(ops["ops"].as_array().map(Vec::len), Some(20));
    assert!(ops.to_string().len() < 3000, "{}: {ops}", ops.to_string().len());
    assert_eq!(all.must("op_list", json!({ "limit": 30 }))["ops"].as_array().map(Vec::len), Some(30));
    let directory = world.path("many");
    std::fs::create_dir(&directory).expect("a directory");
    for number in 0..200 {
        std::fs::write(directory.join(format!("file-{number:03}")), "").expect("a file is written");
    }
    let path = json!({ "vm": "web", "path": directory });
    let short = work.must("guest_file_list", path.clone());
    assert!(short["tree"].as_str().is_some_and(|tree| tree.contains("file-199")), "{short}");
    assert!(short.to_string().len() < 4000, "{}", short.to_string().len());
    let mut whole = path.clone();
    whole["compact"] = false.into();
    for listed in [work.must("guest_file_list", whole), all.must("guest_file_list", path)] {
        assert_eq!(listed["entries"].as_array().map(Vec::len), Some(200));
    }
    world.assert_in_order();
}

#[test]
fn a_vm_that_hangs_or_fails_has_a_way_out() {
    let world = World::hostile(&[]);
    let mut all = world.client();
    let mut work = Client::connect_at(&world.daemon.socket(), "/mcp?tools=work").expect("it connects");
    // starting: what is next waits for it, and does not start a second one.
    let mut arguments = world.arguments("silent-1");
    arguments["wait_s"] = 0.into();
    work.must("vm_create", arguments);
    all.wait_for_state("silent-1", "starting");
    let waits = work.must("vm_start", json!({ "vm": "silent-1", "wait_s": 0 }));
    assert_eq!(waits["done"], false, "{waits}");
    let down = all.to_the_end("vm_stop", json!({ "vm": "silent-1", "force": true }), SOON);
    assert_eq!(down["state"], "stopped");
    // failed: it may be started again.
    let failure = world.create_in_vain(&mut all, "exits-1");
    assert!(failure.text.contains("vm_logs") && failure.text.contains("vm_start"), "{}", failure.text);
    let told = work.must("vm_stop", json!({ "vm": "exits-1" }));
    assert_eq!(next(&told).0, "vm_start", "{told}");
    let again = work.call("vm_start", json!({ "vm": "exits-1" })).expect_err("it fails again");
    assert_eq!(again.code, "boot_failed", "{}", again.text);
    world.assert_in_order();
}
