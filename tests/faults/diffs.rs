//! `checkpoint_diff` over checkpoints whose files were planted, and commands that begin with a checkpoint.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nexus_schema::id::{CheckpointId, DriveId};
use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::checkpoints::{database, place, plant};
use crate::world::{World, refused};

/// Plants a copy of a drive in a checkpoint; returns its path.
fn plant_drive(world: &World, checkpoint: i64, position: i64, mount: Option<&str>) -> PathBuf {
    let id = DriveId::from_i64(9_000 + position).expect("a number");
    let row = rusqlite::params![checkpoint, position, 9_000 + position, format!("drive-{position}"), mount];
    database(world)
        .execute(
            "INSERT INTO checkpoint_drives (checkpoint_id, position, drive_id, name, mount, size_bytes, read_only)
             VALUES (?1, ?2, ?3, ?4, ?5, 16777216, 0)",
            row,
        )
        .expect("a row is planted");
    let checkpoint = CheckpointId::from_i64(checkpoint).expect("a number").to_string();
    place(world, &checkpoint).join("drives").join(format!("{id}.ext4"))
}

/// Makes a filesystem of a directory.
fn make(disk: &Path, content: &Path) {
    fs::File::create(disk).expect("a file").set_len(16 << 20).expect("a size");
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([content, disk])
        .output()
        .expect("mke2fs runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn lines(diff: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let files = diff["files"].as_array().expect("a list");
    let line = |file: &Value| {
        let what: Vec<String> = file["what"].as_array().into_iter().flatten().map(text).collect();
        format!("{} {} {}", text(&file["change"]), text(&file["path"]), what.join(" ")).trim_end().to_owned()
    };
    files.iter().map(line).collect()
}

#[test]
fn two_checkpoints_are_compared_drive_by_drive() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    plant(&world, "web", 1001, "before", "uid:0");
    plant(&world, "web", 1002, "after", "uid:0");
    let content = world.path("content");
    fs::create_dir_all(content.join("etc")).expect("a directory");
    for (name, text) in [("motd", "hello\n"), ("hosts", "one\ntwo\n"), ("gone", "x")] {
        fs::write(content.join("etc").join(name), text).expect("a file is written");
    }
    make(&plant_drive(&world, 1001, 0, None), &content);
    make(&plant_drive(&world, 1001, 1, Some("/data")), &content);
    fs::write(content.join("etc/hosts"), "one\nthree\n").expect("a file is written");
    fs::remove_file(content.join("etc/gone")).expect("a file is removed");
    fs::write(content.join("etc/new\n"), "new").expect("a file is written");
    make(&plant_drive(&world, 1002, 0, None), &content);
    make(&plant_drive(&world, 1002, 1, Some("/data")), &content);

    let diff = client.must("checkpoint_diff", json!({ "from": "before", "to": "after", "text": true }));
    let of = |place: &str| {
        [
            format!("removed {place}/etc/gone"),
            format!("changed {place}/etc/hosts content"),
            format!("added {place}/etc/new\\x0a"),
        ]
    };
    assert_eq!(lines(&diff), [of(""), of("/data")].concat(), "{diff}");
    assert_eq!((&diff["added"], &diff["changed"], &diff["removed"]), (&json!(2), &json!(2), &json!(2)));
    assert!(diff["diff"].as_str().expect("a diff").contains("-two\n+three\n"), "{diff}");
    assert!(diff["processes"].is_null() && diff["notes"].is_null(), "{diff}");
    let narrowed = json!({ "from": "before", "to": "after", "vm": "web", "path": "/data/etc/hosts" });
    assert_eq!(lines(&client.must("checkpoint_diff", narrowed)), ["changed /data/etc/hosts content"]);
    let cut = client.must("checkpoint_diff", json!({ "from": "before", "to": "after", "limit": 1 }));
    assert_eq!((lines(&cut).len(), &cut["is_cut"], &cut["added"]), (1, &json!(true), &json!(2)), "{cut}");
    let same = client.must("checkpoint_diff", json!({ "from": "after", "to": "after" }));
    assert!(lines(&same).is_empty() && same["removed"] == 0, "{same}");

    for (arguments, code) in [
        (json!({ "from": "nothing", "to": "after" }), "checkpoint_not_found"),
        (json!({ "from": "before", "to": "after", "path": "etc" }), "invalid_argument"),
        (json!({ "from": "before", "to": "after", "path": "/a/../b" }), "invalid_argument"),
        (json!({ "from": "before", "to": "after", "limit": 0 }), "invalid_argument"),
        (json!({ "from": "before", "to": "after", "limit": 501 }), "invalid_argument"),
    ] {
        assert_eq!(refused(&mut client, "checkpoint_diff", arguments.clone()).code, code, "{arguments}");
    }
    // Damaged copies are an error or a note, and nothing else.
    let damaged = place(&world, &CheckpointId::from_i64(1002).expect("a number").to_string()).join("drives");
    let root = damaged.join(format!("{}.ext4", DriveId::from_i64(9_000).expect("a number")));
    fs::write(&root, vec![0xff; 1 << 20]).expect("a file is written");
    let noted = client.must("checkpoint_diff", json!({ "from": "before", "to": "after" }));
    assert!(noted["notes"][0].as_str().expect("a note").contains("no ext4 filesystem"), "{noted}");
    assert_eq!(lines(&noted), of("/data"));
    fs::remove_file(&root).expect("a file is removed");
    let failure = refused(&mut client, "checkpoint_diff", json!({ "from": "before", "to": "after" }));
    assert_eq!(failure.code, "verification_failed", "{}", failure.text);
}

#[test]
fn a_stopped_vm_is_compared_as_it_is_and_no_copy_is_left() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "stopped");
    plant(&world, "web", 1001, "before", "uid:0");
    let disk = client.inspect("web")["drives"][0]["path"].as_str().expect("a path").to_owned();
    fs::copy(disk, plant_drive(&world, 1001, 0, None)).expect("the drive is copied");
    let diff = client.must("checkpoint_diff", json!({ "from": "before" }));
    assert!(lines(&diff).is_empty() && diff["notes"].is_null() && diff["to"].is_null(), "{diff}");
    let left: Vec<_> = fs::read_dir(world.daemon.state().join("scratch")).expect("it").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    let failure = refused(&mut client, "checkpoint_diff", json!({ "from": "before" }));
    assert!(failure.code == "vm_not_found" && failure.text.contains("`to`"), "{}", failure.text);
}

#[test]
fn a_command_that_cannot_be_undone_is_not_run() {
    let world = World::new();
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner");
    world.create(&mut owner, "web");
    let marker = world.path("marker");
    let command = format!("touch {}", marker.display());
    let risky = json!({ "vm": "web", "command": command, "checkpoint": true });
    let failure = refused(&mut owner, "guest_run_command", risky.clone());
    assert_eq!(failure.code, "host_unsuitable", "{}", failure.text);
    assert!(failure.text.contains("the command was not run"), "{}", failure.text);
    let odd = json!({ "vm": "web", "command": command, "checkpoint": 1 });
    assert_eq!(refused(&mut owner, "guest_run_command", odd).code, "invalid_argument");
    let made = owner.must(
        "token_create",
        json!({ "name": "worker", "tools": "all", "scopes": ["exec"], "all_vms": true }),
    );
    let secret = made["token"].as_str().expect("a secret");
    let mut worker = Client::connect_with(&world.daemon.socket(), secret).expect("its holder");
    let failure = refused(&mut worker, "guest_run_command", risky);
    assert!(failure.code == "forbidden" && failure.text.contains("lifecycle"), "{}", failure.text);
    assert!(!marker.exists());
    // Without it, the same command runs.
    worker
        .call("guest_run_command", json!({ "vm": "web", "command": command, "checkpoint": false }))
        .unwrap_or_else(|failure| panic!("{}", failure.text));
    assert!(marker.exists());
    world.assert_in_order();
}
