//! Memories of checkpoints that are packed because nobody uses them: cut off at each step, without room, deleted meanwhile; and checkpoints that are
//! too many.
//!
//! Machines here are processes, which cannot be saved; so checkpoints are planted, with memories of the tests' own.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use nexus_tests::client::Client;
use nexus_tests::saved::kill_at;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::checkpoints::{database, place, plant};
use crate::full_checkpoints::SmallDisk;
use crate::world::{World, refused, soon};

const PAGE: usize = 4096;

/// A page that is another one for each number, and half of which compresses.
fn page(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    let mut next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    let mut page: Vec<u8> = (0..PAGE / 2).map(&mut next).collect();
    page.resize(PAGE, 7);
    page
}

/// The digest of a memory, as a manifest has it.
fn digest(ram: &Path) -> String {
    let file = File::open(ram).expect("the memory");
    let mut digest = Sha256::new();
    let mut page = vec![0; PAGE];
    for at in (0..file.metadata().expect("its length").len()).step_by(PAGE) {
        file.read_exact_at(&mut page, at).expect("a page");
        if page.iter().any(|byte| *byte != 0) {
            digest.update(at.to_le_bytes());
            digest.update(&page);
        }
    }
    data_encoding::HEXLOWER.encode(&digest.finalize())
}

fn occupied(path: &Path) -> u64 {
    fs::metadata(path).expect("a file").blocks() * 512
}

/// Plants a checkpoint of `web` with a memory of so many MiB, after as many of zeros, that was used two hours ago; returns its id.
fn plant_memory(world: &World, number: i64, name: &str, mebibytes: u64) -> String {
    plant_changed(world, number, name, mebibytes, 0)
}

/// The same with so many pages that are others than those of memories of the same size.
fn plant_changed(world: &World, number: i64, name: &str, mebibytes: u64, changed: u64) -> String {
    let id = plant(world, "web", number, name, "uid:0");
    let ram = place(world, &id).join("ram");
    let file = File::create(&ram).expect("the memory");
    let zeros = mebibytes << 20;
    file.set_len(2 * zeros).expect("its length");
    for at in (zeros..2 * zeros).step_by(PAGE) {
        let is_other = at < zeros + changed * PAGE as u64;
        file.write_all_at(&page(if is_other { at + 1 } else { at }), at).expect("a page is written");
    }
    file.sync_all().expect("it is on the disk");
    let manifest = place(world, &id).join("manifest.json");
    let mut text: Value = serde_json::from_str(&fs::read_to_string(&manifest).expect("it")).expect("JSON");
    text["ram_sha256"] = digest(&ram).into();
    fs::write(manifest, text.to_string()).expect("it is written");
    let bytes = i64::try_from(occupied(&ram)).expect("a size");
    database(world)
        .execute(
            "UPDATE checkpoints SET manifest = ?1, memory_bytes = ?2 WHERE id = ?3",
            rusqlite::params![text.to_string(), bytes, number],
        )
        .expect("the row is changed");
    file.set_modified(SystemTime::now() - Duration::from_secs(2 * 60 * 60)).expect("its time is set");
    id
}

/// The files of a checkpoint's memory.
fn memories(world: &World, id: &str) -> Vec<String> {
    let entries = fs::read_dir(place(world, id)).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("ram")).collect();
    names.sort();
    names
}

/// The row of a checkpoint in the list.
#[track_caller]
fn row(client: &mut Client, id: &str) -> Value {
    let listed = client.must("checkpoint_list", json!({}));
    let rows = listed["checkpoints"].as_array().expect("a list");
    rows.iter().find(|row| row["id"] == id).unwrap_or_else(|| panic!("no {id} in {listed}")).clone()
}

fn pack_after(client: &mut Client, time: &str) {
    client.must("settings_set", json!({ "values": { "checkpoint.pack_after": time } }));
}

#[track_caller]
fn until_packed(world: &World, id: &str) {
    soon("the memory is packed", || (memories(world, id) == ["ram.packed"]).then_some(()));
}

#[test]
fn a_memory_that_is_not_used_is_packed_and_listed_with_what_it_occupies() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    pack_after(&mut client, "3h");
    let id = plant_memory(&world, 1001, "old", 8);
    let before = occupied(&place(&world, &id).join("ram"));
    assert!(row(&mut client, &id)["unpacked_bytes"].is_null());
    // It was used two hours ago.
    pack_after(&mut client, "1h");
    until_packed(&world, &id);
    let after = occupied(&place(&world, &id).join("ram.packed"));
    assert!(after < before / 4 * 3, "{after} of {before}");
    let row = soon("the row says so", || {
        Some(row(&mut client, &id)).filter(|row| row["memory_bytes"] == json!(after))
    });
    assert_eq!(row["unpacked_bytes"], json!(before), "{row}");
    assert!(!row["problem"].to_string().contains("missing"), "{row}");
    // What it occupies is what is freed.
    let gone = client.must_confirmed("checkpoint_delete", json!({ "checkpoint": id }));
    assert_eq!(gone["freed_bytes"], json!(after + 24));
    assert!(!place(&world, &id).exists());
    world.assert_in_order();
}

#[test]
fn a_memory_whose_packing_is_cut_off_is_there_in_one_form() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    pack_after(&mut client, "off");
    let id = plant_memory(&world, 1001, "old", 8);
    let ram = place(&world, &id).join("ram");
    let (whole, before) = (digest(&ram), occupied(&ram));
    for (point, cut, is_packed) in [
        ("checkpoint-packing", &["ram", "ram.packed.part"][..], false),
        ("checkpoint-pack-written", &["ram", "ram.packed.part"][..], false),
        ("checkpoint-pack-named", &["ram", "ram.packed"][..], false),
        ("checkpoint-pack-alone", &["ram.packed"][..], true),
    ] {
        world.daemon.stop();
        world.daemon.set("NEXUS_FAILPOINT", Some(point));
        world.daemon.restart();
        let set =
            json!({ "name": "settings_set", "arguments": { "values": { "checkpoint.pack_after": "1h" } } });
        world.client().request("tools/call", &set).ok();
        world.daemon.wait_until_ended();
        assert_eq!(memories(&world, &id), cut, "{point}");
        // So that the next one does not go on with it.
        database(&world)
            .execute(
                "INSERT INTO settings (key, value, at, who) VALUES ('checkpoint.pack_after', 'off', 1, 'test')",
                [],
            )
            .expect("a setting is planted");
        world.daemon.set("NEXUS_FAILPOINT", None);
        world.daemon.restart();
        let row = row(&mut world.client(), &id);
        if is_packed {
            assert_eq!(memories(&world, &id), ["ram.packed"], "{point}");
            let now = occupied(&place(&world, &id).join("ram.packed"));
            assert_eq!(
                (&row["memory_bytes"], &row["unpacked_bytes"]),
                (&json!(now), &json!(before)),
                "{row}"
            );
        } else {
            assert_eq!(memories(&world, &id), ["ram"], "{point}");
            assert_eq!(digest(&ram), whole, "{point}");
            assert_eq!(
                (&row["memory_bytes"], &row["unpacked_bytes"]),
                (&json!(before), &Value::Null),
                "{row}"
            );
        }
    }
    world.assert_in_order();
}

#[test]
fn a_checkpoint_that_is_being_packed_is_deleted_at_once() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    pack_after(&mut client, "off");
    let id = plant_memory(&world, 1001, "large", 128);
    pack_after(&mut client, "1h");
    soon("it is being packed", || {
        memories(&world, &id).contains(&"ram.packed.part".to_owned()).then_some(())
    });
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": id }));
    assert!(!place(&world, &id).exists());
    // The next one is packed as if nothing had been.
    let next = plant_memory(&world, 1002, "next", 4);
    pack_after(&mut client, "1h");
    until_packed(&world, &next);
    assert_eq!(fs::read_dir(place(&world, "")).expect("the directory").count(), 1);
    world.assert_in_order();
}

#[test]
fn a_memory_is_not_packed_on_a_mounted_disk_without_room_for_both_forms() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    pack_after(&mut client, "off");
    let small = SmallDisk::mount(&world.daemon, 80);
    let id = plant_memory(&world, 1001, "old", 24);
    let whole = digest(&place(&world, &id).join("ram"));
    pack_after(&mut client, "1h");
    soon("it is not packed", || world.daemon.log().contains("has no room for it").then_some(()));
    assert_eq!(memories(&world, &id), ["ram"]);
    assert_eq!(digest(&place(&world, &id).join("ram")), whole);
    // With more room it is.
    let larger = Command::new("mount").args(["-o", "remount,size=200m"]).arg(place(&world, "")).status();
    assert!(larger.expect("mount runs").success());
    pack_after(&mut client, "1h");
    until_packed(&world, &id);
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": id }));
    drop(small);
    world.assert_in_order();
}

#[test]
fn a_memory_is_packed_by_what_differs_from_an_earlier_one_until_that_is_deleted() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    pack_after(&mut client, "off");
    let first = plant_memory(&world, 1001, "first", 8);
    let others = [(1002, "second", 3), (1003, "third", 100)];
    let others = others.map(|(number, name, changed)| plant_changed(&world, number, name, 8, changed));
    pack_after(&mut client, "1h");
    for id in others.iter().chain([&first]) {
        until_packed(&world, id);
    }
    let packed = |world: &World, id: &str| occupied(&place(world, id).join("ram.packed"));
    let whole = packed(&world, &first);
    for id in &others {
        assert!(packed(&world, id) < whole / 4, "{} and {whole}", packed(&world, id));
    }
    // One that is deleted is nothing that others need.
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": others[1] }));
    assert_eq!(packed(&world, &first), whole);
    // The one that they need is deleted once they are whole; cut off before that, all is as it was.
    let delete = json!({ "checkpoint": first });
    let small = packed(&world, &others[0]);
    let mut client = kill_at(&mut world.daemon, "checkpoint-made-whole", "web", "checkpoint_delete", delete);
    assert_eq!(memories(&world, &others[0]), ["ram.packed"]);
    assert_eq!((packed(&world, &first), packed(&world, &others[0])), (whole, small));
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": first }));
    assert!(!place(&world, &first).exists());
    let now = packed(&world, &others[0]);
    assert!(now > whole / 2, "{now} and {whole}");
    assert_eq!(row(&mut client, &others[0])["memory_bytes"], json!(now));
    assert!(!world.daemon.log().contains("is lost with its base"), "{}", world.daemon.log());
    world.assert_in_order();
}

#[test]
fn a_memory_that_is_not_what_was_saved_is_left_alone() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    pack_after(&mut client, "off");
    let id = plant_memory(&world, 1001, "damaged", 4);
    let ram = place(&world, &id).join("ram");
    let time = fs::metadata(&ram).and_then(|found| found.modified()).expect("its time");
    let mut file = File::options().write(true).open(&ram).expect("the memory");
    file.write_all(b"other").expect("it is changed");
    file.set_modified(time).expect("its time is set");
    let other = plant_memory(&world, 1002, "whole", 4);
    pack_after(&mut client, "1h");
    until_packed(&world, &other);
    assert_eq!(memories(&world, &id), ["ram"]);
    assert!(world.daemon.log().contains("its checksum is another one"), "{}", world.daemon.log());
    world.assert_in_order();
}

#[test]
fn the_oldest_that_nobody_named_go_when_there_are_too_many_and_their_vm_says_so() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    let plant_as = |number: i64, what: &str| {
        let id = plant(&world, "web", number, what, "uid:0");
        // A name that is made up ends as the id does.
        let name = format!("{what}-{}", &id[id.len() - 6..]);
        database(&world)
            .execute("UPDATE checkpoints SET name = ?1 WHERE id = ?2", rusqlite::params![name, number])
            .expect("the row is changed");
        (id, name)
    };
    let clean = plant(&world, "web", 1001, "clean", "uid:0");
    let (run, run_name) = plant_as(1002, "before-run");
    let (taken, _) = plant_as(1003, "checkpoint");
    let (back, _) = plant_as(1004, "before-rollback");
    let left = |client: &mut Client| -> Vec<String> {
        let listed = client.must("checkpoint_list", json!({}));
        let rows = listed["checkpoints"].as_array().expect("a list").iter();
        rows.map(|row| row["id"].as_str().expect("an id").to_owned()).collect()
    };
    let mut becomes = |values: Value, ids: &[&String]| {
        client.must("settings_set", json!({ "values": values }));
        soon("the others are gone", || left(&mut client).iter().eq(ids.iter().copied()).then_some(()));
    };
    becomes(json!({ "checkpoint.max_count": "3" }), &[&clean, &taken, &back]);
    assert!(!place(&world, &run).exists());
    // Each has 1024 bytes; the newest one stays, and so does the named one.
    becomes(json!({ "checkpoint.max_bytes": "1KiB" }), &[&clean, &back]);
    becomes(json!({ "checkpoint.cap_named": "true" }), &[&back]);
    becomes(json!({ "checkpoint.max_age": "1d" }), &[]);
    let history = client.must("vm_history", json!({ "vm": "web" }))["transitions"].to_string();
    assert!(
        history.contains(&format!("checkpoint {run_name} was removed: its VM has more than 3")),
        "{history}"
    );
    for why in ["occupy more than 1KiB", "is older than 1d"] {
        assert!(history.contains(why), "{history}");
    }
    let mut all = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects");
    let told = all.must("events_wait", json!({}))["events"].to_string();
    assert!(told.contains(&format!("checkpoint {run_name} was removed")), "{told}");
    let wrong = refused(
        &mut client,
        "settings_set",
        json!({ "values": { "checkpoint.max_count": "1", "checkpoint.pack_after": "never" } }),
    );
    assert_eq!(wrong.code, "invalid_argument", "{}", wrong.text);
    // It runs on.
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    world.assert_in_order();
}
