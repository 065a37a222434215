//! Paused VMs: what they refuse, what goes on after the pause, and daemons that end in between.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::echo::echo;
use crate::kills::kill_at;
use crate::world::{SOON, World, process, refused, soon};

/// Waits until a process of a machine is stopped: its signal was sent, and a busy host delivers it a little later.
#[track_caller]
fn stopped(vm: &Value) {
    soon("its process is stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process(vm, "pid"))).expect("it runs");
        stat.rsplit_once(") ").filter(|(_, rest)| rest.starts_with('T')).map(|_| ())
    });
}

#[test]
fn a_paused_vm_refuses_calls_at_once_and_goes_on_where_it_was() {
    let (world, port) = (World::new(), echo());
    let (mut client, mut other) = (world.client(), world.client());
    let boot = world.create(&mut client, "web")["boot_id"].clone();
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port }));
    let address = published["address"].as_str().expect("an address");
    let mut open = TcpStream::connect(address).expect("it listens");
    open.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    open.write_all(b"before").expect("it is open");
    let mut said = [0; 6];
    open.read_exact(&mut said).expect("it is served");
    let go = world.path("go");
    let line = format!("until [ -e {} ]; do sleep 0.05; done; echo done", go.display());
    let call = json!({ "name": "guest_run_command", "arguments": { "vm": "web", "command": line } });
    let id = other.start("tools/call", &call).expect("it is sent");
    soon("the command runs", || {
        let listed = client.call_whole("guest_command_list", json!({ "vm": "web" })).expect("a list");
        let commands = &listed["_meta"]["dev.nexus/result"]["commands"];
        (!commands.as_array().expect("commands").is_empty()).then_some(())
    });

    assert_eq!(
        refused(&mut client, "vm_pause", json!({ "vm": "web", "if_boot_id": "aaaaaaaaaaaac" })).code,
        "boot_changed"
    );
    let paused = client.must("vm_pause", json!({ "vm": "web" }));
    assert_eq!(paused["state"], "paused");
    stopped(&paused);
    assert_eq!(client.must("vm_pause", json!({ "vm": "web" }))["state"], "paused");
    let waited = client.must("vm_wait", json!({ "vm": "web", "wait_s": 0 }));
    assert_eq!(waited["waiting_for"], "state ready; it is paused: vm_resume lets it go on", "{waited}");
    let listed = client.must("vm_list", json!({ "state": "paused" }));
    assert_eq!(listed["vms"][0]["name"], "web", "{listed}");
    for (tool, arguments) in [
        ("guest_run_command", json!({ "vm": "web", "command": "echo up" })),
        ("guest_file_read", json!({ "vm": "web", "path": "/etc/hostname" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "vm_paused", "{}", failure.text);
        assert!(failure.text.contains("vm_start"), "{}", failure.text);
    }
    assert_eq!(refused(&mut client, "vm_delete", json!({ "vm": "web" })).code, "vm_wrong_state");
    // A new client of a published port is not left waiting.
    let mut late = TcpStream::connect(address).expect("it listens");
    late.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    assert_eq!(late.read(&mut [0; 8]).unwrap_or_default(), 0);
    std::fs::write(&go, "").expect("a file is written");

    assert_eq!(client.must("vm_resume", json!({ "vm": "web" }))["state"], "ready");
    assert_eq!(client.must("vm_resume", json!({ "vm": "web" }))["state"], "ready");
    let answer: Value = serde_json::from_str(&other.answer(id).expect("it goes on")).expect("JSON");
    assert!(answer.to_string().contains("done\\n"), "{answer}");
    open.write_all(b"after!").expect("it is still open");
    open.read_exact(&mut said).expect("it is still served");
    assert_eq!(&said, b"after!");
    // What starts a VM resumes it.
    client.must("vm_pause", json!({ "vm": "web" }));
    let started = client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    assert_eq!((&started["state"], &started["boot_id"]), (&json!("ready"), &boot));
    for _ in 0..20 {
        client.must("vm_pause", json!({ "vm": "web" }));
        client.must("vm_resume", json!({ "vm": "web" }));
        assert_eq!(client.run("web", "echo up").stdout, "up\n");
    }
    // A stop is as orderly as that of one that runs.
    client.must("vm_pause", json!({ "vm": "web" }));
    assert_eq!(client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON)["state"], "stopped");
    for tool in ["vm_pause", "vm_resume"] {
        let failure = refused(&mut client, tool, json!({ "vm": "web" }));
        assert_eq!(failure.code, "vm_wrong_state", "{}", failure.text);
        assert!(failure.text.contains("vm_start"), "{}", failure.text);
    }
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    client.must("vm_pause", json!({ "vm": "web" }));
    assert_eq!(client.to_the_end("vm_restart", json!({ "vm": "web" }), SOON)["state"], "ready");
    client.must("vm_pause", json!({ "vm": "web" }));
    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    world.assert_in_order();
}

#[test]
fn a_pause_outlasts_the_daemon() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    for point in ["paused", "pause-paused"] {
        let mut client = kill_at(&mut world, point, "vm_pause", &json!({ "vm": "web" }));
        let vm = client.wait_for_state("web", "paused");
        stopped(&vm);
        assert_eq!(
            refused(&mut client, "guest_os_info", json!({ "vm": "web" })).code,
            "vm_paused",
            "{point}"
        );
        assert_eq!(client.must("vm_resume", json!({ "vm": "web" }))["state"], "ready", "{point}");
        assert_eq!(client.run("web", "echo up").stdout, "up\n", "{point}");
        world.assert_in_order();
    }
    // A resume that is not recorded is undone.
    world.client().must("vm_pause", json!({ "vm": "web" }));
    let mut client = kill_at(&mut world, "resume-resumed", "vm_resume", &json!({ "vm": "web" }));
    stopped(&client.wait_for_state("web", "paused"));
    assert_eq!(client.to_the_end("vm_start", json!({ "vm": "web" }), SOON)["state"], "ready");
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    world.assert_in_order();
}
