//! VMs that end by themselves: at the end of their time, and when nothing is under way in them.

use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::wait::{stay, until};
use serde_json::{Value, json};

use crate::echo::echo;
use crate::kills::kill_at;
use crate::world::{SOON, World, refused, soon};

fn with(world: &World, name: &str, more: Value) -> Value {
    let mut arguments = world.arguments(name);
    for (key, value) in more.as_object().expect("an object") {
        arguments[key] = value.clone();
    }
    arguments
}

/// The newest reasons in a VM's history, newest first.
fn reasons(client: &mut Client, vm: &str) -> String {
    client.must("vm_history", json!({ "vm": vm, "limit": 5 }))["transitions"].to_string()
}

fn until_gone(client: &mut Client, vm: &str) {
    soon("the VM is deleted", || client.call("vm_inspect", json!({ "vm": vm })).err());
}

#[test]
fn a_vm_is_deleted_at_the_end_of_its_time_and_a_protected_one_is_stopped() {
    let mut world = World::new();
    let mut client = world.client();
    // Not even work that is under way makes it live longer.
    let short = client.create(with(&world, "short", json!({ "ttl": "3s" })));
    assert!(short["expires_at"].is_string(), "{short}");
    client.must("vm_list", json!({}));
    let begun = client.call_whole("guest_command_start", json!({ "vm": "short", "command": "sleep 600" }));
    let content = begun.expect("it is started")["content"].to_string();
    assert!(
        content.contains("note: the time to live of short ends in") && content.contains("vm_update"),
        "{content}"
    );
    client.create(with(&world, "kept", json!({ "ttl": "3", "protected": true })));
    until_gone(&mut client, "short");
    assert!(reasons(&mut client, "short").contains("deleted: its time to live is over"));
    let stopped = client.wait_for_state("kept", "stopped");
    assert!(stopped.get("expires_at").is_none(), "{stopped}");
    assert!(reasons(&mut client, "kept").contains("it is protected, so it is stopped and kept"));
    // It may be started again, and is not ended a second time.
    client.must("vm_start", json!({ "vm": "kept" }));

    // Times are changed, also while nobody watches; one that is over by then ends at the next start.
    client.create(with(&world, "long", json!({ "ttl": "1s" })));
    let update = client.call("vm_update", json!({ "vm": "long", "ttl": 3600 }));
    if let Ok(long) = update {
        assert!(long["expires_at"].is_string());
    } else {
        client.create(with(&world, "long", json!({ "ttl": "1h" })));
    }
    client.must("vm_update", json!({ "vm": "long", "ttl": "1s" }));
    world.daemon.kill();
    stay(Duration::from_secs(1));
    world.daemon.restart();
    let mut client = world.client();
    until_gone(&mut client, "long");
    assert_eq!(client.inspect("kept")["state"], "ready");
    let endless = client.must_confirmed(
        "vm_update",
        json!({ "vm": "kept", "ttl": "2h", "idle_stop": "30m", "protected": false }),
    );
    assert_eq!(endless["idle_stop"], "30m");
    let endless = client.must("vm_update", json!({ "vm": "kept", "ttl": 0, "idle_stop": "0" }));
    assert!(endless.get("expires_at").is_none() && endless.get("idle_stop").is_none(), "{endless}");
    for wrong in [json!("1 week"), json!("-1"), json!("1.5h"), json!("9999999d")] {
        let failure = refused(&mut client, "vm_update", json!({ "vm": "kept", "ttl": wrong }));
        assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
        assert!(failure.text.contains("ttl"), "{}", failure.text);
    }
    world.assert_in_order();
}

#[test]
fn an_end_that_is_cut_off_is_finished() {
    let mut world = World::new();
    let mut client = world.client();
    client.create(world.arguments("cut"));
    let update = json!({ "vm": "cut", "ttl": "1s" });
    let mut client = kill_at(&mut world, "expired", "vm_update", &update);
    until_gone(&mut client, "cut");
    world.assert_in_order();
}

/// Opens a stream to a port in a machine, and says nothing on it.
fn open(world: &World, client: &mut Client, vm: &str, port: u16) -> UnixStream {
    let ticket = client.must("guest_stream_open", json!({ "vm": vm, "open": { "tcp": { "port": port } } }));
    let mut stream = world.upgrade(ticket["path"].as_str().expect("a path"), "");
    stream.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 101");
    stream
}

#[test]
fn a_vm_that_is_idle_is_stopped_and_work_of_any_kind_keeps_it() {
    let world = World::new();
    let (mut client, mut other) = (world.client(), world.client());
    client.create(with(&world, "web", json!({ "idle_stop": "1s" })));
    let port = echo();
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port }));
    let address = published["address"].as_str().expect("an address").to_owned();
    let stays = |client: &mut Client, what: &str| {
        let is_other = || Some(client.inspect("web")).filter(|vm| vm["state"] != "ready");
        assert_eq!(until(Duration::from_millis(1700), is_other), None, "{what} is work");
    };
    let connection = TcpStream::connect(address).expect("it listens");
    stays(&mut client, "a connection of a published port");
    let stream = open(&world, &mut client, "web", port);
    drop(connection);
    stays(&mut client, "a stream");
    let call = json!({ "name": "guest_run_command", "arguments": { "vm": "web", "command": "sleep 2" } });
    let id = other.start("tools/call", &call).expect("it is sent");
    drop(stream);
    stays(&mut client, "a call");
    other.answer(id).expect("it ends");
    // Nobody waits for this one.
    client
        .call_whole("guest_command_start", json!({ "vm": "web", "command": "sleep 2" }))
        .expect("it is started");
    stays(&mut client, "a command");
    let stopped = client.wait_for_state("web", "stopped");
    assert!(stopped.get("idle_stop_at").is_none(), "{stopped}");
    assert!(reasons(&mut client, "web").contains("stopped: idle for 1s"));
    // Its disk and its limit stay.
    let again = client.to_the_end("vm_start", json!({ "vm": "web" }), crate::world::SOON);
    assert_eq!(again["idle_stop"], "1s");
    client.wait_for_state("web", "stopped");
    // The default is for VMs that say nothing.
    client.must("settings_set", json!({ "values": { "default.idle_stop": "2h", "default.ttl": "1d" } }));
    let vm = client.create(world.arguments("new"));
    assert_eq!(vm["idle_stop"], "2h");
    assert!(vm["expires_at"].is_string() && vm["idle_stop_at"].is_string(), "{vm}");
    world.assert_in_order();
}

#[test]
fn vms_of_a_template_have_its_times_unless_they_ask_for_others() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let template = json!({ "name": "web", "source": world.from, "ttl": "2h", "idle_stop": "30m", "idle_action": "suspend" });
    let made = client.must("template_create", template);
    assert_eq!([&made["spec"]["ttl"], &made["spec"]["idle_stop"]], ["2h", "30m"], "{made}");
    assert_eq!(made["spec"]["idle_action"], "suspend", "{made}");
    let create = |client: &mut Client, name: &str, more: Value| {
        let mut arguments = with(&world, name, more);
        arguments["from"] = "template:web".into();
        arguments["start"] = false.into();
        client.to_the_end("vm_create", arguments, SOON);
        client.inspect(name)
    };
    let vm = create(&mut client, "same", json!({}));
    assert!(vm["expires_at"].is_string() && vm["idle_stop"] == "30m", "{vm}");
    let vm = create(&mut client, "other", json!({ "ttl": "0", "idle_stop": "1h" }));
    assert!(vm["expires_at"].is_null() && vm["idle_stop"] == "1h", "{vm}");
    let update = json!({ "template": "web", "ttl": 0 });
    let updated = client.must("template_update", update);
    assert!(updated["version"] == 2 && updated["spec"].get("ttl").is_none(), "{updated}");
    let vm = create(&mut client, "later", json!({}));
    assert!(vm["expires_at"].is_null() && vm["idle_stop"] == "30m", "{vm}");
    // It is no part of what an image is made of.
    assert_eq!(vm["image"]["id"], client.inspect("same")["image"]["id"]);
}
