//! Checkpoints, memories and restored drives for which the disk has no room: seen before they are begun, or on the way. The VM is a real one. For
//! checkpoints it is on a filesystem with reflinks, and they are on another one, which is small, so that drives are copied whole.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::{assert_files, checkpoint, count, delete_all, goes_on, listed, outcome, roll_back};
use serde_json::{Value, json};

use crate::full::LoopDisk;

/// How much is on the data drive, in MiB: more than what is left of a disk that has room for the VM's memory.
const DATA: u64 = 560;

/// A small filesystem over the directory of checkpoints; unmounted when dropped.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(crate) fn mount(daemon: &Daemon, mebibytes: u64) -> Self {
        let at = daemon.state().join("checkpoints");
        Self::over(at, mebibytes)
    }

    /// The same over another directory.
    fn over(at: PathBuf, mebibytes: u64) -> Self {
        let size = format!("size={mebibytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&at).output();
        let mounted = mounted.expect("mount runs");
        let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
        assert!(mounted.status.success(), "mounting takes root: {said}");
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// A drive with a file of this many MiB on it.
fn make_data(client: &mut Client, disk: &LoopDisk, mebibytes: u64) {
    let source = disk.root().join("source");
    fs::create_dir(&source).expect("a directory");
    let mut file = File::create(source.join("large")).expect("a file");
    let piece = vec![0x5a; 1 << 20];
    (0..mebibytes).try_for_each(|_| file.write_all(&piece)).expect("it is written");
    let from = format!("file:{}", source.display());
    let size = format!("{}MiB", mebibytes + 140);
    let drive = json!({ "name": "data", "from": from, "size": size, "wait_s": 45 });
    client.to_the_end("drive_create", drive, BOOT);
    fs::remove_dir_all(source).expect("it is of no more use");
}

/// A VM that can be saved, with a large drive; returns its boot.
fn make_vm(client: &mut Client, disk: &LoopDisk, mebibytes: u64) -> Value {
    make_data(client, disk, mebibytes);
    let web = json!({ "name": "web", "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "128MiB",
        "start": false });
    client.to_the_end("vm_create", web, BOOT);
    client.must("drive_attach", json!({ "drive": "data", "vm": "web", "mount": "/data" }));
    let boot = client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT)["boot_id"].clone();
    client.wait_for_state("web", "ready");
    count(client, "web");
    boot
}

/// Removes all of it.
fn delete_vm(daemon: &Daemon, client: &mut Client) {
    delete_all(daemon, client);
    client.must_confirmed("vm_delete", json!({ "vm": "web", "force": true }));
    client.must_confirmed("drive_delete", json!({ "drive": "data" }));
}

#[test]
fn a_checkpoint_on_a_full_disk_leaves_the_vm_running_and_nothing_else() {
    let disk = LoopDisk::mount("btrfs", 4000);
    let daemon = Daemon::start_at(&disk.state());
    let mut client = daemon.client();
    let boot = make_vm(&mut client, &disk, DATA);

    // The first has no room for anything, the second one for the memory only.
    for (mebibytes, is_begun) in [(32, false), (520, true)] {
        let small = SmallDisk::mount(&daemon, mebibytes);
        let take = json!({ "vm": "web", "name": "none", "wait_s": 45 });
        let failure = outcome(&mut client, "vm_checkpoint", take).expect_err("there is no room for it");
        assert_eq!(failure.code, "disk_full", "{mebibytes} MiB: {}", failure.text);
        // It names the disk: as that of the state directory, or by the place of the file that did not fit.
        let named = if is_begun { "/checkpoints/" } else { "the disk of the state directory has" };
        assert!(failure.text.contains(named), "{mebibytes} MiB: {}", failure.text);
        goes_on(&mut client, "web");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{mebibytes} MiB");
        assert_eq!(listed(&mut client), Vec::<String>::new(), "{mebibytes} MiB");
        assert_files(&daemon, &mut client);
        drop(small);
        assert_in_order(&daemon);
    }
    // There is no room for the memory of a VM that sleeps.
    let small = SmallDisk::over(daemon.state().join("suspended"), 32);
    let sleep = json!({ "vm": "web", "suspend": true });
    let failure = client.call("vm_pause", sleep).expect_err("there is no room for its memory");
    assert_eq!(failure.code, "disk_full", "{}", failure.text);
    goes_on(&mut client, "web");
    assert_eq!(client.inspect("web")["boot_id"], boot);
    drop(small);
    assert_in_order(&daemon);
    // With room it works, and the drive takes next to none.
    checkpoint(&mut client, "web", "clean");
    goes_on(&mut client, "web");
    delete_vm(&daemon, &mut client);
}

/// Without reflinks, each restored VM has copies of all drives.
#[test]
fn a_fork_and_a_rollback_on_a_full_disk_leave_the_vm_running_and_nothing_else() {
    let disk = LoopDisk::mount("ext4", 2500);
    let daemon = Daemon::start_at(&disk.state());
    let mut client = daemon.client();
    let boot = make_vm(&mut client, &disk, 200);
    checkpoint(&mut client, "web", "clean");
    // Enough for everything but the large drive.
    disk.leave(150);
    let fork = json!({ "vm": "web", "checkpoint": "clean", "names": ["child"], "wait_s": 45 });
    let back = json!({ "vm": "web", "checkpoint": "clean", "keep_current": false, "wait_s": 45 });
    for (tool, arguments) in [("vm_fork", fork), ("vm_rollback", back)] {
        let failure = outcome(&mut client, tool, arguments).expect_err("there is no room for its drives");
        assert_eq!(failure.code, "disk_full", "{tool}: {}", failure.text);
        goes_on(&mut client, "web");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{tool}");
        assert_in_order(&daemon);
    }
    disk.release();
    roll_back(&mut client, "web", "clean");
    goes_on(&mut client, "web");
    delete_vm(&daemon, &mut client);
}
