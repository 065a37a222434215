//! Disks without any free space, on real filesystems: the daemon starts on one and can delete what uses the space; guests that
//! write wait for space.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use nexus_tests::client::BOOT;
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::world::{SOON, World, refused, soon};

/// A filesystem in a file, mounted; unmounted when dropped.
pub(crate) struct LoopDisk {
    place: TempDir,
}

impl LoopDisk {
    pub(crate) fn mount(kind: &str, mebibytes: u64) -> Self {
        let place = tempfile::Builder::new().prefix("nexus-loop-").tempdir().expect("a directory");
        let file = place.path().join("disk");
        File::create(&file).and_then(|file| file.set_len(mebibytes << 20)).expect("a file for the disk");
        let made = Command::new(format!("mkfs.{kind}")).arg("-q").arg(&file).output();
        let made = made.unwrap_or_else(|error| panic!("mkfs.{kind}, which `make setup` installs: {error}"));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        fs::create_dir(place.path().join("root")).expect("a directory");
        let disk = Self { place };
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&file).arg(disk.root()).output();
        let mounted = mounted.expect("mount runs");
        assert!(
            mounted.status.success(),
            "mounting takes root and a loop device: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        disk
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.place.path().join("root")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.root().join("state")
    }

    fn ballast(&self) -> PathBuf {
        self.root().join("ballast")
    }

    /// Uses up all free space, to the last byte.
    fn fill(&self) {
        let mut ballast =
            File::options().create(true).append(true).open(self.ballast()).expect("ballast is made");
        for size in [1 << 20, 64 << 10, 4 << 10, 1] {
            let piece = vec![0x5a; size];
            while ballast.write_all(&piece).and_then(|()| ballast.sync_data()).is_ok() {}
        }
    }

    /// Uses up all space except for this many MiB.
    pub(crate) fn leave(&self, mebibytes: u64) {
        let file = File::create(self.ballast()).expect("ballast is made");
        let stat = rustix::fs::statvfs(self.root()).expect("the free space");
        let more = (stat.f_bavail * stat.f_frsize).saturating_sub(mebibytes << 20);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, more).expect("room is taken");
    }

    pub(crate) fn release(&self) {
        fs::remove_file(self.ballast()).ok();
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let unmount = |path: &Path| Command::new("umount").args(["--lazy"]).arg(path).status();
        let unmounted = unmount(&self.root()).is_ok_and(|status| status.success());
        assert!(unmounted || std::thread::panicking(), "{} stays mounted", self.root().display());
    }
}

/// What `system_info` says of the disk.
fn disk_check(info: &Value) -> Option<&Value> {
    info["doctor"]["checks"].as_array()?.iter().find(|check| check["name"] == "disk")
}

fn starts_and_lets_one_delete_on_a_full(kind: &str) {
    let disk = LoopDisk::mount(kind, 400);
    let mut world = World::hostile_at(&disk.state());
    let mut client = world.client();
    for name in ["good-1", "good-2"] {
        world.create(&mut client, name);
    }
    assert_eq!(disk_check(&client.must("system_info", json!({}))), None);
    let reserve = disk.state().join("reserve");
    soon("the reserve", || reserve.exists().then_some(()));
    drop(client);
    world.daemon.kill();
    disk.fill();
    world.daemon.restart();

    let mut client = world.client();
    assert!(!reserve.exists(), "{kind}: it is given up");
    let info = client.must("system_info", json!({}));
    let said = disk_check(&info).unwrap_or_else(|| panic!("{kind}: nothing is said of the disk: {info}"));
    assert!(["warn", "fail"].contains(&said["status"].as_str().unwrap_or_default()), "{said}");
    assert_eq!(client.must("vm_list", json!({}))["vms"].as_array().map(Vec::len), Some(2));
    client.wait_for_state("good-1", "ready");
    client.must("vm_history", json!({ "vm": "good-1" }));
    client.must("vm_delete", json!({ "vm": "good-1", "force": true }));
    assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "good-1" })).code, "vm_not_found");
    client.to_the_end("prune", json!({}), SOON);
    drop(client);

    // Full again, with no reserve left: it serves what exists.
    world.daemon.kill();
    disk.fill();
    world.daemon.restart();
    let mut client = world.client();
    client.must("vm_inspect", json!({ "vm": "good-2" }));
    client.must("system_info", json!({}));
    disk.release();
    client.wait_for_state("good-2", "ready");
    client.must("vm_delete", json!({ "vm": "good-2", "force": true }));
    drop(client);
    // With free space, two connections can read the database again.
    world.daemon.stop();
    world.daemon.restart();
    world.assert_in_order();
}

#[test]
fn the_daemon_starts_on_a_full_disk_of_ext4() {
    starts_and_lets_one_delete_on_a_full("ext4");
}

#[test]
fn the_daemon_starts_on_a_full_disk_of_xfs() {
    starts_and_lets_one_delete_on_a_full("xfs");
}

#[test]
fn the_daemon_starts_on_a_full_disk_of_btrfs() {
    starts_and_lets_one_delete_on_a_full("btrfs");
}

#[test]
fn a_guest_that_finds_a_full_disk_waits_and_goes_on() {
    let disk = LoopDisk::mount("ext4", 700);
    let daemon = Daemon::start_at(&disk.state());
    let mut client = daemon.client();
    let vm = client.to_the_end(
        "vm_create",
        json!({ "name": "writer", "from": "busybox", "disk": "1GiB", "driver": "qemu", "wait_s": 0 }),
        BOOT,
    );
    let drive = vm["drives"][0]["name"].as_str().expect("a drive").to_owned();
    disk.leave(24);
    let mut writing = daemon.client();
    let command = "dd if=/dev/zero of=/big bs=1M count=100 && sync";
    let call = json!({ "name": "guest_run_command", "arguments": { "vm": "writer", "command": command, "timeout_s": 600 } });
    writing.start("tools/call", &call).expect("the call is sent");
    let full = client.wait_for_state("writer", "unreachable");
    let reason = soon("the reason", || {
        let reason = client.inspect("writer")["reason"].as_str().map(str::to_owned)?;
        reason.starts_with("disk_full: ").then_some(reason)
    });
    assert!(reason.contains(&drive), "{reason}");
    assert_eq!(full["boot_id"], vm["boot_id"]);
    // It is an event of the VM, as the little space of the daemon's own disk is one of the host.
    for arguments in [json!({ "vm": "writer" }), json!({})] {
        soon("an event of it", || {
            let mut wanted = arguments.clone();
            (wanted["kinds"], wanted["limit"]) = (json!(["pressure"]), 500.into());
            let told = client.must("events_wait", wanted);
            let is_it = |event: &Value| {
                event["state"] == "low" && event.get("vm").is_some() == arguments.get("vm").is_some()
            };
            told["events"].as_array().expect("a list").iter().any(is_it).then_some(())
        });
    }
    let failure = refused(&mut client, "guest_os_info", json!({ "vm": "writer" }));
    assert_eq!(failure.code, "disk_full", "{}", failure.text);
    // A later daemon knows it too.
    drop((client, writing));
    let mut daemon = daemon;
    daemon.kill();
    daemon.restart();
    let mut client = daemon.client();
    soon("the reason again", || {
        let vm = client.inspect("writer");
        (vm["state"] == "unreachable" && vm["reason"].to_string().contains("disk_full: ")).then_some(())
    });

    disk.release();
    let ready = client.wait_for_state("writer", "ready");
    assert_eq!(ready["boot_id"], vm["boot_id"], "it went on by itself");
    let done = soon("what was written", || {
        let listed = client.run("writer", "stat -c %s /big && dmesg | grep -ci 'i/o error'").stdout;
        listed.ends_with("\n0\n").then_some(listed)
    });
    assert!(!done.is_empty());
    let history = client.must("vm_history", json!({ "vm": "writer" }))["transitions"].to_string();
    // Either the link to the shim or the link to the guest may notice it first.
    let goes_on = history.contains("has space again") || history.contains("the agent answers again");
    assert!(history.contains("disk_full: ") && goes_on, "{history}");
    assert_in_order(&daemon);
}
