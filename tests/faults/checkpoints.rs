//! Checkpoints without a VMM that can save: what is refused and how, who sees what, and what is left of half-made ones.
//!
//! Machines here are processes, which cannot be saved; so rows and files of checkpoints are planted.

use std::fs;
use std::path::PathBuf;

use nexus_schema::id::CheckpointId;
use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused, soon};

/// The directory of a checkpoint.
pub(crate) fn place(world: &World, name: &str) -> PathBuf {
    world.daemon.state().join("checkpoints").join(name)
}

pub(crate) fn database(world: &World) -> rusqlite::Connection {
    let database = rusqlite::Connection::open(world.daemon.state().join("nexus.db")).expect("the database");
    database.busy_timeout(SOON).expect("a timeout");
    database
}

/// Plants a checkpoint of a VM, as if a VMM of another version had saved it; returns its id.
pub(crate) fn plant(world: &World, vm: &str, number: i64, name: &str, owner: &str) -> String {
    let database = database(world);
    let id = CheckpointId::from_i64(number).expect("a number").to_string();
    let (of, spec, guest): (i64, String, Option<String>) = database
        .query_row("SELECT id, spec, guest FROM vms WHERE name = ?1", [vm], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .expect("the VM has a row");
    let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    let hello = json!({ "protocol": 1, "min_protocol": 1, "build": "", "kernel": "", "arch": "", "kernel_boot_id": "",
        "uptime_ms": 1, "init": "agent" });
    let manifest = json!({
        "version": 1, "checkpoint": id, "vm": "aaaaaaaaaaaac", "boot_id": "aaaaaaaaaaaac", "spec": parse(&spec),
        "image_id": null, "image_name": "small", "kernel_id": null, "arch": "x86_64",
        "guest": guest.map_or_else(|| json!({ "hello": hello, "protocol": 1 }), |text| parse(&text)),
        "host": { "driver": "qemu", "driver_version": "0.0.1", "binary_sha256": "00", "accel": "tcg", "cpu_sha256": "00",
            "tsc_khz": null },
        "private": false, "state_sha256": "00", "ram_sha256": "00", "quiesced": true, "drive_bytes": [],
    });
    let files = place(world, &id);
    fs::create_dir_all(files.join("drives")).expect("a directory is made");
    for (name, text) in [("manifest.json", manifest.to_string()), ("state", "s".into()), ("ram", "r".into())]
    {
        fs::write(files.join(name), text).expect("a file is written");
    }
    database
        .execute(
            "INSERT INTO checkpoints (id, vm_id, vm_name, name, owner, state, token, manifest, memory_bytes, disk_bytes, created_at)
             VALUES (?1, ?2, ?3, ?4, ?5, 'ready', 'secret', ?6, 1000, 24, 1764000000000)",
            rusqlite::params![number, of, vm, name, owner, manifest.to_string()],
        )
        .expect("a row is planted");
    id
}

fn names(listed: &Value) -> Vec<&str> {
    let rows = listed["checkpoints"].as_array().expect("a list");
    rows.iter().map(|row| row["name"].as_str().expect("a name")).collect()
}

#[test]
fn a_vm_that_cannot_be_saved_is_refused_with_how_to_make_one_that_can() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    for (tool, arguments) in [
        ("vm_checkpoint", json!({ "vm": "web" })),
        ("vm_fork", json!({ "vm": "web", "count": 2 })),
        ("vm_rollback", json!({ "vm": "web", "checkpoint": "clean" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "host_unsuitable", "{tool}: {}", failure.text);
        assert!(failure.text.contains("vm_create with checkpoints: true"), "{tool}: {}", failure.text);
    }
    for (arguments, code) in [
        (json!({ "vm": "nobody" }), "vm_not_found"),
        (json!({ "checkpoint": "nothing" }), "checkpoint_not_found"),
        (json!({}), "invalid_argument"),
        (json!({ "vm": "web", "count": 17 }), "invalid_argument"),
        (json!({ "vm": "web", "count": 3, "names": ["a", "b"] }), "invalid_argument"),
        (json!({ "vm": "web", "names": ["a", "a"] }), "invalid_argument"),
    ] {
        let failure = refused(&mut client, "vm_fork", arguments.clone());
        assert_eq!(failure.code, code, "{arguments}: {}", failure.text);
    }
    // It runs on, and nothing was made.
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    assert!(names(&client.must("checkpoint_list", json!({}))).is_empty());
    assert_eq!(client.must("vm_list", json!({}))["vms"].as_array().map(Vec::len), Some(1));
    world.assert_in_order();
}

#[test]
fn a_checkpoint_of_another_vmm_is_listed_with_its_problem_and_not_restored() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    plant(&world, "web", 1001, "clean", "uid:0");
    let listed = client.must("checkpoint_list", json!({ "vm": "web" }));
    let row = &listed["checkpoints"][0];
    assert_eq!((&row["name"], &row["restored_by"]), (&json!("clean"), &json!("qemu 0.0.1")), "{row}");
    assert!(row["problem"].is_string(), "{row}");
    let op = client.call("vm_fork", json!({ "checkpoint": "clean", "wait_s": 45 }));
    let failure = op.expect_err("it cannot be restored here");
    assert!(["host_unsuitable", "verification_failed"].contains(&failure.code.as_str()), "{}", failure.text);
    assert_eq!(client.must("vm_list", json!({}))["vms"].as_array().map(Vec::len), Some(1));
    world.assert_in_order();
}

#[test]
fn a_deletion_is_confirmed_and_takes_the_files_along() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    let id = plant(&world, "web", 1001, "clean", "uid:0");
    let asked = refused(&mut client, "checkpoint_delete", json!({ "checkpoint": "clean" }));
    assert_eq!(asked.code, "confirmation_required", "{}", asked.text);
    assert!(
        asked.text.contains(&format!("delete the checkpoint clean ({id}) of the VM web")),
        "{}",
        asked.text
    );
    assert!(place(&world, &id).exists());
    let gone = client.must_confirmed("checkpoint_delete", json!({ "checkpoint": id }));
    assert_eq!((&gone["name"], &gone["freed_bytes"]), (&json!("clean"), &json!(1024)));
    assert!(!place(&world, &id).exists());
    assert_eq!(
        refused(&mut client, "checkpoint_delete", json!({ "checkpoint": id })).code,
        "checkpoint_not_found"
    );
    world.assert_in_order();
}

#[test]
fn checkpoints_of_others_do_not_exist_for_a_token() {
    let world = World::new();
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner");
    world.create(&mut owner, "theirs");
    plant(&world, "theirs", 1001, "clean", "uid:0");
    let token = |owner: &mut Client, arguments: Value| {
        let secret = owner.must("token_create", arguments)["token"].as_str().expect("a secret").to_owned();
        Client::connect_with(&world.daemon.socket(), &secret).expect("its holder")
    };
    let mut blind = token(&mut owner, json!({ "name": "blind", "tools": "all" }));
    assert!(names(&blind.must("checkpoint_list", json!({}))).is_empty());
    for (tool, arguments, code) in [
        ("checkpoint_list", json!({ "vm": "theirs" }), "vm_not_found"),
        ("checkpoint_delete", json!({ "checkpoint": "clean" }), "checkpoint_not_found"),
        ("vm_fork", json!({ "checkpoint": "clean" }), "checkpoint_not_found"),
        ("vm_rollback", json!({ "vm": "theirs", "checkpoint": "clean" }), "vm_not_found"),
    ] {
        assert_eq!(refused(&mut blind, tool, arguments).code, code, "{tool}");
    }
    // One that sees the VM sees what was taken of it; to change anything it needs the scope for that.
    let mut reader =
        token(&mut owner, json!({ "name": "reader", "tools": "all", "scopes": ["read"], "all_vms": true }));
    assert_eq!(names(&reader.must("checkpoint_list", json!({}))), ["clean"]);
    for (tool, arguments) in [
        ("vm_checkpoint", json!({ "vm": "theirs" })),
        ("checkpoint_delete", json!({ "checkpoint": "clean" })),
        ("vm_fork", json!({ "checkpoint": "clean" })),
        ("vm_rollback", json!({ "vm": "theirs", "checkpoint": "clean" })),
    ] {
        assert_eq!(refused(&mut reader, tool, arguments).code, "forbidden", "{tool}");
    }
    assert_eq!(names(&owner.must("checkpoint_list", json!({}))), ["clean"]);
}

#[test]
fn names_are_of_one_vm_and_pages_are_read_in_order() {
    let world = World::new();
    let mut client = world.client();
    for vm in ["a", "b"] {
        world.create(&mut client, vm);
    }
    let first = plant(&world, "a", 1001, "clean", "uid:0");
    plant(&world, "b", 1002, "clean", "uid:0");
    plant(&world, "a", 1003, "later", "uid:0");
    let several = refused(&mut client, "checkpoint_delete", json!({ "checkpoint": "clean" }));
    assert_eq!(several.code, "invalid_argument");
    assert!(several.text.contains(&first), "{}", several.text);
    assert_eq!(names(&client.must("checkpoint_list", json!({ "vm": "a" }))), ["clean", "later"]);
    // What is of another VM, or no VM but a checkpoint, is said.
    let other = refused(&mut client, "vm_fork", json!({ "vm": "b", "checkpoint": "later" }));
    assert_eq!(other.code, "checkpoint_not_found");
    assert!(other.text.contains("is of the VM a"), "{}", other.text);
    for (vm, hint) in [
        ("later", "later is a checkpoint: call vm_fork with checkpoint: "),
        ("clean", "call checkpoint_list"),
    ] {
        let no_vm = refused(&mut client, "vm_fork", json!({ "vm": vm }));
        assert_eq!(no_vm.code, "vm_not_found");
        assert!(no_vm.text.contains(hint), "{}", no_vm.text);
    }
    let page = client.must("checkpoint_list", json!({ "limit": 2 }));
    let rest = client.must("checkpoint_list", json!({ "limit": 2, "cursor": page["next_cursor"] }));
    assert_eq!((names(&page).len(), names(&rest)), (2, vec!["later"]));
    // They outlive their VM.
    client.must("vm_delete", json!({ "vm": "b", "force": true }));
    assert_eq!(names(&client.must("checkpoint_list", json!({}))).len(), 3);
}

#[test]
fn half_made_and_expired_ones_are_removed() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    let whole = plant(&world, "web", 1001, "whole", "uid:0");
    let half = plant(&world, "web", 1002, "half", "uid:0");
    let old = plant(&world, "web", 1003, "old", "uid:0");
    database(&world)
        .execute_batch(
            "UPDATE checkpoints SET state = 'making' WHERE id = 1002; UPDATE checkpoints SET expires_at = 5 WHERE id = 1003;",
        )
        .expect("rows are changed");
    fs::create_dir_all(place(&world, &format!("{half}.part")).join("drives")).expect("a directory is made");
    fs::create_dir_all(place(&world, "aaaaaaaaaaaae")).expect("a directory is made");
    world.daemon.stop();
    world.daemon.restart();
    let mut client = world.client();
    soon("the expired one is gone", || (!place(&world, &old).exists()).then_some(()));
    assert_eq!(names(&client.must("checkpoint_list", json!({}))), ["whole"]);
    let left: Vec<_> = fs::read_dir(place(&world, "")).expect("the directory").flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(place(&world, &whole).join("ram").exists());
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
}
