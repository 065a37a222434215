//! A disk that fills up: unfinished work is undone, running machines continue, and there is a way out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;

use crate::world::{SOON, World, refused, soon};

/// A small separate filesystem; unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Self {
        let place = tempfile::Builder::new().prefix("nexus-disk-").tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size},mode=700"), "nexus-test"]).arg(place.path());
        assert!(mount.status().expect("mount runs").success(), "mounting a tmpfs takes root");
        Self(place)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("state")
    }

    /// Uses up all space except for this many KiB.
    fn fill(&self, but_kib: u64) {
        self.release();
        let file = fs::File::create(self.ballast()).expect("ballast is made");
        let free = || {
            let stat = rustix::fs::statvfs(self.0.path()).expect("the free space");
            (stat.f_bavail * stat.f_frsize).saturating_sub(but_kib << 10)
        };
        // Other programs write here too, so space that was just free may be gone.
        soon("the room to be taken", || {
            let (taken, more) = (file.metadata().ok()?.len(), free());
            let flags = rustix::fs::FallocateFlags::empty();
            (more == 0 || rustix::fs::fallocate(&file, flags, taken, more).is_ok()).then_some(())
        });
    }

    fn release(&self) {
        fs::remove_file(self.ballast()).ok();
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmount = |path: &Path| Command::new("umount").args(["--lazy"]).arg(path).status();
        assert!(unmount(self.0.path()).is_ok_and(|status| status.success()), "the disk is unmounted");
    }
}

#[test]
fn a_full_disk_undoes_a_creation_and_stops_nothing_else() {
    let disk = SmallDisk::mount("192m");
    let world = World::hostile_at(&disk.path());
    let mut client = world.client();
    world.create(&mut client, "good-1");

    // Too little space for another drive.
    disk.fill(48 << 10);
    let failure = world.create_in_vain(&mut client, "good-2");
    assert_eq!(failure.code, "disk_full", "{}", failure.text);
    world.assert_in_order();
    assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "good-2" })).code, "vm_not_found");

    // No space at all: nothing can be recorded any more.
    disk.fill(0);
    for at in 0..20 {
        let failure = world.create_in_vain(&mut client, &format!("good-{}", at + 2));
        assert_eq!(failure.code, "disk_full", "{}", failure.text);
    }
    let listed = client.must("vm_list", json!({}));
    assert_eq!(listed["vms"].as_array().map(Vec::len), Some(1), "{listed}");
    client
        .call_whole("guest_file_read", json!({ "vm": "good-1", "path": "/x" }))
        .expect("what runs can be used");

    // With free space again, everything continues.
    disk.release();
    world.assert_in_order();
    world.create(&mut client, "good-2");
    client.to_the_end("vm_stop", json!({ "vm": "good-1" }), SOON);
    world.assert_in_order();
}

#[test]
fn what_ends_on_a_full_disk_is_told_and_written_down_later() {
    let disk = SmallDisk::mount("192m");
    let world = World::hostile_at(&disk.path());
    let mut client = world.client();
    world.create(&mut client, "good-1");
    disk.fill(0);
    // Stopping needs a row: either there is space for it, or it fails with a full disk.
    match client.call("vm_stop", json!({ "vm": "good-1", "wait_s": 45 })) {
        Ok(outcome) => assert_eq!(outcome["result"]["state"], "stopped", "{outcome}"),
        Err(failure) => {
            assert_eq!(failure.code, "disk_full", "{}", failure.text);
            assert_eq!(client.inspect("good-1")["state"], "ready");
        }
    }
    disk.release();

    let mut arguments = world.arguments("slow-1");
    arguments["wait_s"] = 0.into();
    let begun = client.must("vm_create", arguments);
    let op = begun["op_id"].clone();
    client.wait_for_state("slow-1", "starting");
    let id = begun["subject_id"].as_str().expect("an id");
    let held = disk.path().join("vms").join(id).join("held");
    soon("the guest", || held.exists().then_some(()));
    disk.fill(0);
    fs::remove_file(held).expect("the guest is told");
    let ended = client.must("op_get", json!({ "op_id": op, "wait_s": 45 }));
    assert_eq!(ended["done"], true, "{ended}");
    let seen = client.inspect("slow-1")["state"].clone();
    assert!(["failed", "ready", "running"].contains(&seen.as_str().unwrap_or_default()), "{seen}");
    disk.release();
    // With free space again, the rows are updated.
    soon("the row", || {
        let listed = client.must("vm_list", json!({}));
        let vm = listed["vms"].as_array()?.iter().find(|vm| vm["name"] == "slow-1")?;
        (vm["state"] == client.inspect("slow-1")["state"]).then_some(())
    });
    world.assert_in_order();
}

#[test]
fn a_vm_is_deleted_on_a_full_disk_or_says_why_not() {
    let disk = SmallDisk::mount("192m");
    let world = World::hostile_at(&disk.path());
    let mut client = world.client();
    for at in 0..3 {
        let name = format!("good-{at}");
        world.create(&mut client, &name);
        disk.fill(0);
        match client.call("vm_delete", json!({ "vm": name, "force": true })) {
            Ok(_) => {
                assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": name })).code, "vm_not_found")
            }
            Err(failure) => {
                assert_eq!(failure.code, "disk_full", "{}", failure.text);
                let vm = client.inspect(&name);
                assert!(vm["process"].is_null(), "its power was cut, and it says so: {vm}");
                disk.release();
                client.must("vm_delete", json!({ "vm": name }));
            }
        }
        disk.release();
        world.assert_in_order();
    }
}
