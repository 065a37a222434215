//! Kills the daemon at every step of making, growing and deleting drives. At its next start each drive is either complete or
//! gone, and its size is as reported.

use std::fs;
use std::path::Path;

use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::builds::assert_whole;
use crate::kills::{kill_at, last_op};
use crate::world::{SOON, World, refused, soon};

/// The names of the drives; each is complete and has its reported size.
#[track_caller]
fn drives(client: &mut Client) -> Vec<String> {
    let listed = client.must("drive_list", json!({ "limit": 500 }));
    let drives = listed["drives"].as_array().expect("a list");
    let look = |drive: &Value| {
        let disk = Path::new(drive["path"].as_str().expect("a path"));
        let bytes = fs::metadata(disk).expect("the disk is there").len();
        assert_eq!(drive["size"], size(bytes), "{drive}");
        assert_whole(disk);
        drive["name"].as_str().expect("a name").to_owned()
    };
    drives.iter().map(look).collect()
}

/// A size in text form; all sizes here are whole MiB.
fn size(bytes: u64) -> Value {
    assert_eq!(bytes % (1 << 20), 0, "{bytes}");
    format!("{}MiB", bytes >> 20).into()
}

#[test]
fn a_drive_that_is_cut_off_is_gone_and_can_be_made() {
    let mut world = World::new();
    let mut client = world.client();
    client.to_the_end("drive_create", json!({ "name": "first", "from": world.from, "size": "128MiB" }), SOON);
    for (name, from) in [
        ("empty", None),
        ("of-image", Some(world.from.clone())),
        ("of-drive", Some("drive:first".to_owned())),
    ] {
        let mut wanted = json!({ "name": name, "size": "160MiB", "wait_s": 45 });
        if let Some(from) = from {
            wanted["from"] = from.into();
        }
        let before = drives(&mut world.client());
        for point in ["drive-begun", "drive-staged", "drive-named", "drive-made"] {
            let mut client = kill_at(&mut world, point, "drive_create", &wanted);
            assert_eq!(drives(&mut client), before, "{point}");
            assert_eq!(
                refused(&mut client, "drive_inspect", json!({ "drive": name })).code,
                "drive_not_found"
            );
            let op = last_op(&mut client);
            assert_eq!(
                (&op["tool"], &op["state"]),
                (&json!("drive_create"), &json!("failed")),
                "{point}: {op}"
            );
            world.assert_in_order();
        }
        let mut client = kill_at(&mut world, "drive-ready", "drive_create", &wanted);
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("drive_create"), &json!("succeeded")), "{op}");
        let drive = client.must("drive_inspect", json!({ "drive": name }));
        assert_eq!(client.must("op_get", json!({ "op_id": op["op_id"] }))["result"]["id"], drive["id"]);
        assert_eq!(drive["size"], "160MiB", "{drive}");
        client.must("drive_delete", json!({ "drive": name }));
        client.to_the_end("drive_create", wanted, SOON);
        assert_eq!(drives(&mut client).len(), before.len() + 1);
        world.assert_in_order();
    }
}

#[test]
fn a_drive_that_was_being_made_larger_is_larger() {
    let mut world = World::new();
    let mut client = world.client();
    client.to_the_end("drive_create", json!({ "name": "free", "size": "64MiB" }), SOON);
    let mut arguments = world.arguments("box");
    arguments["start"] = false.into();
    let vm = client.to_the_end("vm_create", arguments, SOON);
    let attached = vm["drives"][0]["name"].as_str().expect("a name").to_owned();
    for (at, point) in ["drive-lengthened", "drive-grown"].into_iter().enumerate() {
        for drive in ["free", &attached] {
            let wanted = format!("{}MiB", 256 + 32 * at);
            let resize = json!({ "drive": drive, "size": wanted });
            let mut client = kill_at(&mut world, point, "drive_resize", &resize);
            let drive = client.must("drive_inspect", json!({ "drive": drive }));
            assert_eq!(drive["size"], wanted, "{point}: {drive}");
            assert_eq!(filesystem_bytes(&drive), (256 + 32 * at as u64) << 20, "{point}: {drive}");
            assert_eq!(drives(&mut client).len(), 2);
            world.assert_in_order();
        }
    }
    // The VM sees what its drive reports.
    let mut client = world.client();
    client.to_the_end("vm_start", json!({ "vm": "box" }), SOON);
    assert_eq!(client.inspect("box")["drives"][0]["size"], "288MiB");
    world.assert_in_order();
}

#[test]
fn a_drive_that_was_being_made_larger_under_a_running_vm_is_larger() {
    let mut world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "box");
    let drive = vm["drives"][0]["name"].as_str().expect("a name").to_owned();
    let resize = json!({ "drive": drive, "size": "256MiB" });
    let mut client = kill_at(&mut world, "drive-lengthened-running", "drive_resize", &resize);
    let vm = client.wait_for_state("box", "ready");
    assert_eq!(vm["drives"][0]["size"], "256MiB", "{vm}");
    let disk = client.must("drive_inspect", json!({ "drive": drive }))["path"].clone();
    assert_eq!(fs::metadata(disk.as_str().expect("a path")).expect("the disk").len(), 256 << 20);
    assert_eq!(client.run("box", "echo up").stdout, "up\n");
    world.assert_in_order();
}

/// The size of the filesystem on a drive, from its superblock (linux/fs/ext4/ext4.h).
fn filesystem_bytes(drive: &Value) -> u64 {
    let disk = fs::read(drive["path"].as_str().expect("a path")).expect("the disk is read");
    let word = |at: usize| u32::from_le_bytes(disk[1024 + at..1024 + at + 4].try_into().expect("four bytes"));
    u64::from(word(0x04)) << (10 + word(0x18))
}

#[test]
fn a_deletion_of_a_drive_that_is_cut_off_is_finished() {
    let mut world = World::new();
    for point in ["drive-forgotten", "drive-unnamed"] {
        let mut client = world.client();
        client.to_the_end("drive_create", json!({ "name": "cut", "size": "64MiB" }), SOON);
        let mut client = kill_at(&mut world, point, "drive_delete", &json!({ "drive": "cut" }));
        assert_eq!(drives(&mut client), Vec::<String>::new(), "{point}");
        world.assert_in_order();
    }
}

/// Marks a drive as if the host had crashed before it was synced, and removes its content.
fn lose(drive: &Value, origin: &str) {
    let disk = Path::new(drive["path"].as_str().expect("a path"));
    let mark = disk.with_file_name(format!("unsynced-{origin}-00000000-0000-4000-8000-000000000000"));
    fs::write(mark, "").expect("the mark is written");
    let disk = fs::OpenOptions::new().write(true).open(disk).expect("the disk");
    let length = disk.metadata().expect("the disk").len();
    disk.set_len(0).and_then(|()| disk.set_len(length)).expect("it is emptied");
}

#[test]
fn drives_that_the_host_did_not_get_on_the_disk_are_made_again_or_said_to_be_lost() {
    let mut world = World::new();
    let mut client = world.client();
    client.to_the_end("image_create", json!({ "from": world.from, "name": "master", "wait_s": 45 }), SOON);
    let mut create = |name: &str, from: &str| {
        let wanted = json!({ "name": name, "from": from, "size": "128MiB", "wait_s": 45 });
        client.to_the_end("drive_create", wanted, SOON)
    };
    let (again, lost) = (create("again", "image:master"), create("lost", "drive:again"));
    assert_eq!(again["problem"], Value::Null);
    let mut arguments = world.arguments("box");
    arguments["start"] = false.into();
    let mut client = world.client();
    let vm = client.to_the_end("vm_create", arguments, SOON);
    let root = vm["drives"][0]["name"].clone();
    let root = client.must("drive_inspect", json!({ "drive": root }));

    world.daemon.stop();
    lose(&again, "image");
    lose(&lost, "drive");
    // Its origin is unknown.
    lose(&root, "nothing");
    world.daemon.restart();

    let mut client = world.client();
    let drive = client.must("drive_inspect", json!({ "drive": "again" }));
    assert_eq!(drive["problem"], Value::Null, "{drive}");
    assert_eq!(filesystem_bytes(&drive), 128 << 20);
    let drive = client.must("drive_inspect", json!({ "drive": "lost" }));
    let problem = drive["problem"].as_str().expect("a problem").to_owned();
    assert!(problem.contains("is incomplete") && problem.contains("delete it"), "{problem}");
    for (tool, arguments) in [
        ("vm_start", json!({ "vm": "box" })),
        ("drive_resize", json!({ "drive": "lost", "size": "4GiB" })),
        ("drive_create", json!({ "name": "copy", "from": "drive:lost", "wait_s": 45 })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "drive_not_found", "{tool}: {}", failure.text);
        assert!(failure.text.contains("is incomplete"), "{tool}: {}", failure.text);
    }
    client.must("drive_delete", json!({ "drive": "lost" }));
    client.must_confirmed("vm_delete", json!({ "vm": "box" }));
    assert_eq!(drives(&mut client), ["again"]);
    world.assert_in_order();
}

#[test]
fn a_copy_that_the_daemon_did_not_wait_for_is_on_the_disk_later() {
    let mut world = World::new();
    let wanted = json!({ "name": "copied", "from": world.from, "size": "128MiB", "wait_s": 45 });
    let client = kill_at(&mut world, "drive-synced", "drive_create", &wanted);
    drop(client);
    // If the drive was reported, it exists, and the work that the earlier daemon left is done.
    let mut client = world.client();
    for name in drives(&mut client) {
        let drive = client.must("drive_inspect", json!({ "drive": name }));
        let home = Path::new(drive["path"].as_str().expect("a path")).parent().expect("a directory");
        soon("the mark goes", || {
            (fs::read_dir(home).expect("the drive's directory").count() == 1).then_some(())
        });
    }
    world.assert_in_order();
}

#[test]
fn a_new_database_costs_no_drive_that_it_does_not_know() {
    let mut world = World::new();
    let made = |client: &mut Client, name: &str| {
        let drive = client.to_the_end("drive_create", json!({ "name": name, "size": "160MiB" }), SOON);
        drive["id"].as_str().expect("an id").to_owned()
    };
    let id = made(&mut world.client(), "data");
    let state = world.daemon.state().to_owned();
    let directory = state.join("drives").join(id);
    assert!(directory.exists(), "{}", directory.display());
    world.daemon.stop();
    for name in ["nexus.db", "nexus.db-wal", "nexus.db-shm"] {
        fs::remove_file(state.join(name)).ok();
    }
    // At the first start the database is new, at the second one it has a drive.
    for name in ["other", "third"] {
        world.daemon.restart();
        assert!(directory.exists(), "{}", world.daemon.log());
        made(&mut world.client(), name);
        world.daemon.stop();
    }
    world.daemon.restart();
    assert!(directory.exists(), "{}", world.daemon.log());
    assert!(world.daemon.log().contains("they are kept"), "{}", world.daemon.log());
    fs::remove_dir_all(&directory).expect("nobody else removes it");
}
