//! Data drives in real machines: mounted by label, grown under a running guest, moved from one machine to another.

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use serde_json::{Value, json};

fn refused(client: &mut Client, tool: &str, arguments: Value) -> String {
    client.call(tool, arguments).expect_err("this is refused").code
}

/// The size of the filesystem at a path in the guest, in KiB.
fn kib(client: &mut Client, vm: &str, place: &str) -> u64 {
    let line = client.run(vm, &format!("df -k {place} | tail -n 1 | awk '{{print $2}}'"));
    line.stdout.trim().parse().expect("a number")
}

/// How many blocks the filesystem of a drive has (`s_blocks_count_lo` of its superblock).
fn blocks(drive: &Value) -> u32 {
    use std::os::unix::fs::FileExt;
    let disk = std::fs::File::open(drive["path"].as_str().expect("a path")).expect("a disk");
    let mut count = [0; 4];
    disk.read_exact_at(&mut count, 1024 + 4).expect("a superblock");
    u32::from_le_bytes(count)
}

fn names(listed: &Value) -> Vec<&str> {
    let drives = listed["drives"].as_array().expect("a list");
    drives.iter().map(|drive| drive["name"].as_str().expect("a name")).collect()
}

#[test]
fn data_outlives_its_machine_and_drives_grow_under_it() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let vm =
        client.to_the_end("vm_create", json!({ "name": "first", "from": "busybox", "start": false }), BOOT);
    let root = vm["drives"][0]["name"].as_str().expect("a root drive").to_owned();
    let empty = client.to_the_end("drive_create", json!({ "name": "data", "size": "64MiB" }), BOOT);
    assert_eq!((&empty["size"], &empty["deleted_with_vm"]), (&json!("64MiB"), &json!(false)), "{empty}");
    client.to_the_end("drive_create", json!({ "name": "tools", "from": "busybox", "read_only": true }), BOOT);

    client.must("drive_attach", json!({ "drive": "data", "vm": "first", "mount": "/data" }));
    let tools = client.must("drive_attach", json!({ "drive": "tools", "vm": "first" }));
    assert_eq!(tools["attached_to"]["mount"], "/mnt/tools", "{tools}");
    assert_eq!(refused(&mut client, "drive_delete", json!({ "drive": "data" })), "in_use");

    client.to_the_end("vm_start", json!({ "vm": "first" }), BOOT);
    let ready = client.wait_for_state("first", "ready");
    assert_eq!(ready["drives"].as_array().map(Vec::len), Some(3), "{ready}");
    assert_eq!(
        client.run("first", "echo kept > /data/file && sync && /mnt/tools/bin/busybox true").exit_code,
        Some(0)
    );
    assert_ne!(client.run("first", "touch /mnt/tools/file").exit_code, Some(0));

    // Those of the root drive and the data drives, but not of the modules.
    let read_ahead = client.run("first", "cat /sys/block/vd*/queue/read_ahead_kb | grep -c '^512$'");
    assert_eq!(read_ahead.stdout, "3\n");

    // The new size is visible at once, on the data drive and on the root drive.
    assert!(kib(&mut client, "first", "/data") < 64 << 10);
    for (drive, size, place, least) in [("data", "256MiB", "/data", 200 << 10), (&root, "9GiB", "/", 8 << 20)]
    {
        let grown = client.must("drive_resize", json!({ "drive": drive, "size": size }));
        assert_eq!(grown["in_effect"], true, "{grown}");
        assert!(kib(&mut client, "first", place) > least);
    }
    // A drive that a guest writes to can be neither detached nor copied.
    assert_eq!(refused(&mut client, "drive_detach", json!({ "drive": "data" })), "vm_wrong_state");
    assert_eq!(refused(&mut client, "drive_create", json!({ "from": "drive:data" })), "vm_wrong_state");

    // Deleting the machine deletes only its root drive.
    let gone = client.must_confirmed("vm_delete", json!({ "vm": "first", "force": true }));
    assert_eq!(gone["deleted"][0]["drives"], json!([root]));
    let left = client.must("drive_list", json!({ "attached": false }));
    assert_eq!(names(&left), ["data", "tools"]);

    // Clones it, with a journal that was never closed, for another machine; and chooses a root drive.
    client.to_the_end(
        "drive_create",
        json!({ "name": "copy", "from": "drive:data", "size": "300MiB" }),
        BOOT,
    );
    let second = json!({ "name": "second", "from": "busybox", "start": false });
    let second = client.to_the_end("vm_create", second, BOOT);
    let own = second["drives"][0]["name"].as_str().expect("a root drive").to_owned();
    client.must("drive_detach", json!({ "drive": own }));
    assert_eq!(refused(&mut client, "vm_start", json!({ "vm": "second" })), "drive_not_found");
    client.to_the_end("drive_create", json!({ "name": "start", "from": "busybox" }), BOOT);
    // The first drive of a machine without drives becomes its root.
    let start = client.must("drive_attach", json!({ "drive": "start", "vm": "second" }));
    assert_eq!(start["attached_to"]["root"], true, "{start}");
    client.must("drive_attach", json!({ "drive": "copy", "vm": "second", "mount": "/srv/copy" }));
    client.to_the_end("vm_start", json!({ "vm": "second" }), BOOT);
    client.wait_for_state("second", "ready");
    assert_eq!(client.run("second", "cat /srv/copy/file").stdout, "kept\n");
    assert!(kib(&mut client, "second", "/srv/copy") > 250 << 10);

    // If a drive is made larger while the machine is stopped, the guest grows a filesystem that it has written to
    // at its next start.
    client.must("vm_stop", json!({ "vm": "second" }));
    client.wait_for_state("second", "stopped");
    for (drive, size) in [("copy", "500MiB"), ("start", "9GiB")] {
        let before = blocks(&client.must("drive_inspect", json!({ "drive": drive })));
        let grown = client.must("drive_resize", json!({ "drive": drive, "size": size }));
        assert_eq!(blocks(&grown["drive"]), before, "the host grew what a guest wrote");
    }
    client.to_the_end("vm_start", json!({ "vm": "second" }), BOOT);
    client.wait_for_state("second", "ready");
    assert!(kib(&mut client, "second", "/srv/copy") > 450 << 10);
    assert!(kib(&mut client, "second", "/") > 8 << 20);
    assert_eq!(client.run("second", "cat /srv/copy/file").stdout, "kept\n");
    client.must_confirmed("vm_delete", json!({ "vm": "second", "force": true }));

    // Nothing is left after all are deleted.
    // What a guest wrote is not deleted without a confirmation.
    assert_eq!(refused(&mut client, "drive_delete", json!({ "drive": "copy" })), "confirmation_required");
    for drive in ["copy", "data", "start", "tools", own.as_str()] {
        client.must_confirmed("drive_delete", json!({ "drive": drive }));
    }
    let disks = std::fs::read_dir(daemon.state().join("drives")).expect("the drives' directory").count();
    assert_eq!(disks, 0);
}

#[test]
fn impossible_drives_are_refused_before_anything_changes() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    for (arguments, code) in [
        (json!({ "size": "1MiB" }), "invalid_argument"),
        (json!({ "size": "100TiB" }), "invalid_argument"),
        (json!({ "size": 20_000_001 }), "invalid_argument"),
        (json!({ "from": "drive:nobody" }), "drive_not_found"),
        (json!({ "from": "nothing-of-the-kind" }), "image_not_found"),
    ] {
        assert_eq!(refused(&mut client, "drive_create", arguments.clone()), code, "{arguments}");
    }
    client.to_the_end("drive_create", json!({ "name": "data", "size": "32MiB" }), BOOT);
    assert_eq!(refused(&mut client, "drive_create", json!({ "name": "data" })), "name_taken");
    assert_eq!(
        refused(&mut client, "drive_resize", json!({ "drive": "data", "size": "16MiB" })),
        "invalid_argument"
    );
    let clone = json!({ "from": "drive:data", "size": "16MiB" });
    assert_eq!(refused(&mut client, "drive_create", clone), "invalid_argument");
    client.to_the_end("vm_create", json!({ "name": "one", "from": "busybox", "start": false }), BOOT);
    for mount in ["data", "/", "/proc/x", "/a/../b"] {
        let attach = json!({ "drive": "data", "vm": "one", "mount": mount });
        assert_eq!(refused(&mut client, "drive_attach", attach), "invalid_argument", "{mount}");
    }
    assert_eq!(
        refused(&mut client, "drive_attach", json!({ "drive": "data", "vm": "one", "root": true })),
        "in_use"
    );
    assert_eq!(
        refused(&mut client, "drive_attach", json!({ "drive": "data", "vm": "none" })),
        "vm_not_found"
    );
    assert_eq!(names(&client.must("drive_list", json!({ "attached": false }))), ["data"]);
    assert_eq!(client.must("drive_inspect", json!({ "drive": "data" }))["size"], "32MiB");
    client.must_confirmed("vm_delete", json!({ "vm": "one" }));
    client.must("drive_delete", json!({ "drive": "data" }));
}
