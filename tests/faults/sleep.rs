//! Suspended VMs without a VMM that can save: what does not wake one, what is refused, and how its memory is given up.
//!
//! Machines here are processes, which cannot be saved; so the rows and files of suspended VMs are planted.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use nexus_schema::id::CheckpointId;
use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

/// The saved memories.
fn memories(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.daemon.state().join("suspended")).expect("the directory");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

/// Stops a VM, and makes it one that a VMM of another version suspended.
fn suspend(world: &mut World, vm: &str, number: i64) {
    let mut client = world.client();
    client.to_the_end("vm_stop", json!({ "vm": vm }), SOON);
    let details = client.inspect(vm);
    world.daemon.stop();
    let database = rusqlite::Connection::open(world.daemon.state().join("nexus.db")).expect("the database");
    let (spec, guest): (String, String) = database
        .query_row("SELECT spec, guest FROM vms WHERE name = ?1", [vm], |row| Ok((row.get(0)?, row.get(1)?)))
        .expect("the VM has a row");
    let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    let id = CheckpointId::from_i64(number).expect("a number").to_string();
    let manifest = json!({
        "version": 1, "checkpoint": id, "vm": details["id"], "boot_id": details["boot_id"], "spec": parse(&spec),
        "image_id": null, "image_name": "small", "kernel_id": null, "arch": "x86_64", "guest": parse(&guest),
        "host": { "driver": "qemu", "driver_version": "0.0.1", "binary_sha256": "00", "accel": "tcg", "cpu_sha256": "00",
            "tsc_khz": null },
        "private": false, "state_sha256": "00", "ram_sha256": "00", "quiesced": true, "drive_bytes": [],
    });
    let drives = details["drives"].as_array().expect("drives").iter().map(|drive| {
        let file = fs::metadata(drive["path"].as_str().expect("a path")).expect("a file");
        let modified_ns = file.mtime() * 1_000_000_000 + file.mtime_nsec();
        json!({ "drive": drive["id"], "modified_ns": modified_ns, "size_bytes": file.len() })
    });
    let suspended = json!({
        "manifest": manifest, "token": "secret", "drives": drives.collect::<Vec<_>>(), "memory_bytes": 4096,
        "at": "2025-11-24T16:01:50.000Z",
    });
    let directory = world.daemon.state().join("suspended").join(&id);
    fs::create_dir_all(directory.join("drives")).expect("a directory is made");
    for (name, text) in [("manifest.json", manifest.to_string()), ("state", "s".into()), ("ram", "r".into())]
    {
        fs::write(directory.join(name), text).expect("a file is written");
    }
    // Of a daemon that ended while it saved one.
    fs::create_dir_all(world.daemon.state().join("suspended/half.part/drives")).expect("a directory is made");
    database
        .execute(
            "UPDATE vms SET state = 'suspended', suspended = ?2 WHERE name = ?1",
            rusqlite::params![vm, suspended.to_string()],
        )
        .expect("a row is planted");
    drop(database);
    world.daemon.restart();
}

#[test]
fn a_vm_that_cannot_be_woken_stays_suspended_until_its_memory_is_given_up() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    let mut client = world.client();
    let before = client.inspect("web");
    assert_eq!((&before["state"], before.get("process")), (&json!("suspended"), None), "{before}");
    assert_eq!(memories(&world).len(), 1, "what was half made is gone");
    // None of these wakes it.
    client.must("vm_list", json!({}));
    assert_eq!(
        refused(&mut client, "vm_wait", json!({ "vm": "web", "port": 1, "wait_s": 1 })).code,
        "vm_not_running"
    );
    assert_eq!(client.must("vm_pause", json!({ "vm": "web", "suspend": true }))["state"], "suspended");
    assert!(client.inspect("web").get("reason").is_none());
    // A call does, and is told why that is not possible here.
    let run = json!({ "vm": "web", "command": "true" });
    for (tool, arguments) in [
        ("guest_run_command", run),
        ("guest_stream_open", json!({ "vm": "web", "open": { "tcp": { "port": 1 } } })),
        ("vm_resume", json!({ "vm": "web" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        let codes = ["host_unsuitable", "verification_failed"];
        assert!(codes.contains(&failure.code.as_str()), "{tool}: {} {}", failure.code, failure.text);
        assert!(failure.text.contains("cold: true"), "{tool}: {}", failure.text);
    }
    let after = client.inspect("web");
    assert_eq!((&after["state"], &after["boot_id"]), (&json!("suspended"), &before["boot_id"]), "{after}");
    assert!(after["reason"].as_str().is_some_and(|why| why.contains("could not be woken")), "{after}");
    // Its memory knows its drives.
    let drive = &after["drives"][0]["name"];
    for (tool, arguments) in [
        ("drive_resize", json!({ "drive": drive, "size": "256MiB" })),
        ("drive_detach", json!({ "drive": drive })),
        ("drive_create", json!({ "from": format!("drive:{}", drive.as_str().expect("a name")) })),
        ("vm_pause", json!({ "vm": "web" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "vm_wrong_state", "{tool}: {}", failure.text);
    }
    let network = json!({ "vm": "web", "network": { "mode": "nat" } });
    refused(&mut client, "vm_update", network);
    assert_eq!(memories(&world).len(), 1);
    client.to_the_end("vm_start", json!({ "vm": "web", "cold": true }), SOON);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    assert!(memories(&world).is_empty());
    world.assert_in_order();
}

#[test]
fn a_stop_and_a_deletion_give_the_memory_up() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    let mut client = world.client();
    let stopped = client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON);
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    assert!(memories(&world).is_empty());
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    suspend(&mut world, "web", 2002);
    // A restart is a cold start.
    let mut client = world.client();
    client.to_the_end("vm_restart", json!({ "vm": "web" }), SOON);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    assert!(memories(&world).is_empty());
    suspend(&mut world, "web", 2003);
    let mut client = world.client();
    client.must_confirmed("vm_delete", json!({ "vm": "web" }));
    assert!(memories(&world).is_empty());
    world.assert_in_order();
}

#[test]
fn a_daemon_that_ends_while_it_gives_a_memory_up_has_done_so() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    let mut client =
        crate::kills::kill_at(&mut world, "suspend-given-up", "vm_stop", &json!({ "vm": "web" }));
    assert_eq!(client.inspect("web")["state"], "stopped");
    assert!(memories(&world).is_empty());
    world.assert_in_order();
}

#[test]
fn a_stop_that_is_cut_off_once_its_vm_sleeps_gives_the_memory_up() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    let mut client = crate::kills::kill_at(&mut world, "stop-begun", "vm_stop", &json!({ "vm": "web" }));
    client.wait_for_state("web", "stopped");
    let op = crate::kills::last_op(&mut client);
    assert_eq!((&op["tool"], &op["state"]), (&json!("vm_stop"), &json!("succeeded")), "{op}");
    assert!(memories(&world).is_empty());
    world.assert_in_order();
}

#[test]
fn a_memory_is_not_restored_onto_drives_that_were_written_to() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    let mut client = world.client();
    let path = client.inspect("web")["drives"][0]["path"].as_str().expect("a path").to_owned();
    let file = File::options().write(true).open(path).expect("it opens");
    file.set_modified(SystemTime::now()).expect("it has a time");
    let failure = refused(&mut client, "guest_run_command", json!({ "vm": "web", "command": "true" }));
    assert_eq!(failure.code, "changed", "{}", failure.text);
    assert!(failure.text.contains("drives were written to"), "{}", failure.text);
    assert_eq!(client.inspect("web")["state"], "suspended");
}

#[test]
fn a_memory_for_which_the_host_has_no_room_is_kept_on_the_disk() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    // As if it had had more in use than any host has.
    world.daemon.stop();
    let database = rusqlite::Connection::open(world.daemon.state().join("nexus.db")).expect("the database");
    let changed = database.execute(
        "UPDATE vms SET suspended = json_set(suspended, '$.memory_bytes', ?2) WHERE name = ?1",
        rusqlite::params!["web", 1_i64 << 50],
    );
    assert_eq!(changed.expect("the row is changed"), 1);
    drop(database);
    world.daemon.restart();
    let mut client = world.client();
    for (tool, arguments) in [
        ("guest_run_command", json!({ "vm": "web", "command": "true" })),
        ("vm_resume", json!({ "vm": "web" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "host_out_of_memory", "{tool}: {}", failure.text);
        assert!(failure.text.contains("the host has"), "{tool}: {}", failure.text);
    }
    assert_eq!(client.inspect("web")["state"], "suspended");
    assert_eq!(memories(&world).len(), 1);
    client.to_the_end("vm_start", json!({ "vm": "web", "cold": true }), SOON);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    world.assert_in_order();
}

#[test]
fn who_may_not_call_a_tool_wakes_nothing() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    suspend(&mut world, "web", 2001);
    let mut owner = world.client();
    let made = owner.must(
        "token_create",
        json!({ "name": "reader", "scopes": ["read"], "vms": ["web"], "tools": "all" }),
    );
    let secret = made["token"].as_str().expect("a secret");
    let mut reader = Client::connect_with(&world.daemon.socket(), secret).expect("its holder");
    let failure = refused(&mut reader, "guest_run_command", json!({ "vm": "web", "command": "true" }));
    assert_eq!(failure.code, "forbidden", "{}", failure.text);
    let vm = owner.inspect("web");
    assert!(vm["state"] == "suspended" && vm.get("reason").is_none(), "{vm}");
}

#[test]
fn a_vm_that_cannot_be_suspended_is_told_how_to_make_one_that_can() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    for (tool, arguments) in [
        ("vm_pause", json!({ "vm": "web", "suspend": true })),
        ("vm_update", json!({ "vm": "web", "idle_action": "suspend" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "host_unsuitable", "{tool}: {}", failure.text);
        assert!(failure.text.contains("vm_create with checkpoints: true"), "{tool}: {}", failure.text);
    }
    let mut arguments = world.arguments("other");
    arguments["idle_action"] = "suspend".into();
    let failure = refused(&mut client, "vm_create", arguments);
    assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
    let settings = json!({ "values": { "default.idle_action": "sleep" } });
    assert_eq!(refused(&mut client, "settings_set", settings).code, "invalid_argument");
    // The default is not for VMs that cannot be suspended.
    client.must("settings_set", json!({ "values": { "default.idle_action": "suspend" } }));
    let vm = client.create(world.arguments("third"));
    assert!(vm.get("idle_action").is_none(), "{vm}");
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    world.assert_in_order();
}
