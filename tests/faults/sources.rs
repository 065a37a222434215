//! Kernels, images and VMMs that are missing or damaged. No machine boots here, but the kernel and QEMU are real.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nexus_tests::client::Client;
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

/// The only entry of a directory of the state.
fn only(daemon: &Daemon, directory: &str) -> PathBuf {
    let mut entries = fs::read_dir(daemon.state().join(directory)).expect("a directory").flatten();
    let entry = entries.next().expect("an entry").path();
    assert!(entries.next().is_none(), "more than one in {directory}");
    entry
}

#[track_caller]
fn create_in_vain(client: &mut Client, arguments: &Value) -> nexus_tests::client::Failure {
    let failure = refused(client, "vm_create", arguments.clone());
    assert_ne!(failure.code, "internal", "{arguments}: {}", failure.text);
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]), "{arguments} leaves a VM");
    failure
}

#[test]
fn kernels_that_are_none_are_refused() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let real = fs::read(only(&daemon, "assets").join("vmlinux")).expect("the kernel is read");
    let file = |name: &str, content: &[u8]| {
        let path = daemon.root().join(name);
        fs::write(&path, content).expect("a file is written");
        format!("file:{}", path.display())
    };
    let mut bzimage = vec![0; 64 << 10];
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    for (kernel, told) in [
        (format!("file:{}/nowhere", daemon.root().display()), "nowhere"),
        (format!("file:{}", daemon.root().display()), ""),
        ("file:relative".to_owned(), "relative"),
        ("nothing-like-it".to_owned(), "nothing-like-it"),
        (file("empty", b""), "empty"),
        (file("text", b"no kernel at all\n"), "text"),
        (file("garbage", &vec![0xa5; 1 << 20]), "garbage"),
        (file("cut-off", &real[..4096]), "cut-off"),
        (file("bzimage", &bzimage), "bzimage"),
    ] {
        let arguments =
            json!({ "name": "vain", "from": "busybox", "kernel": kernel, "start": false, "wait_s": 45 });
        let failure = create_in_vain(&mut client, &arguments);
        assert!(failure.text.contains(told), "{kernel}: {}", failure.text);
    }
    assert_in_order(&daemon);
    let listed = client.must("asset_list", json!({ "limit": 500, "available": false }));
    let assets = listed["assets"].as_array().expect("a list");
    assert_eq!(assets.iter().filter(|asset| asset["installed"] == true).count(), 1, "{listed}");
}

#[test]
fn images_that_are_none_are_refused() {
    let world = World::new();
    let mut client = world.client();
    let file = |name: &str, content: &[u8]| {
        let path = world.path(name);
        fs::write(&path, content).expect("a file is written");
        format!("file:{}", path.display())
    };
    let mut ext4 = vec![0; 1 << 20];
    ext4[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
    for (from, told) in [
        (format!("file:{}", world.path("nowhere").display()), "nowhere"),
        ("nothing-like-it".to_owned(), "nothing-like-it"),
        (file("empty.tar", b""), "empty"),
        (file("text.tar.gz", b"no archive at all\n"), "text.tar.gz"),
        (file("cut-off.tar.gz", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1, 2]), "incomplete"),
        (file("hollow.ext4", &ext4), "damaged"),
    ] {
        let mut arguments = world.arguments("vain");
        arguments["from"] = from.clone().into();
        let failure = create_in_vain(&mut client, &arguments);
        assert!(failure.text.contains(told), "{from}: {}", failure.text);
        world.assert_in_order();
    }
    let listed = client.must("image_list", json!({}));
    let images = listed["images"].as_array().expect("a list");
    assert!(images.iter().all(|image| image["installed"] == false), "{listed}");
}

#[test]
fn what_was_damaged_since_is_told_by_name() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let arguments = json!({ "name": "box", "from": "busybox", "start": false });
    let vm = client.to_the_end("vm_create", arguments.clone(), SOON);
    let start = json!({ "vm": "box", "wait_s": 45 });
    let kernel = only(&daemon, "assets").join("vmlinux");
    let whole = fs::read(&kernel).expect("the kernel is read");

    // A kernel whose file is missing: nothing is started, nothing changes.
    fs::remove_file(&kernel).expect("the kernel is removed");
    let failure = refused(&mut client, "vm_start", start.clone());
    assert!(
        failure.text.contains("vmlinux") && failure.code != "internal",
        "{} {}",
        failure.code,
        failure.text
    );
    assert_eq!(client.inspect("box")["state"], "created");
    // A truncated kernel is reported by whoever notices it first.
    fs::write(&kernel, &whole[..4096]).expect("half a kernel is written");
    let failure = refused(&mut client, "vm_start", start.clone());
    assert!(
        ["boot_failed", "verification_failed"].contains(&&*failure.code),
        "{} {}",
        failure.code,
        failure.text
    );
    assert_in_order(&daemon);
    fs::write(&kernel, whole).expect("the kernel is put back");

    // A drive whose file is missing.
    let disk = Path::new(vm["drives"][0]["path"].as_str().expect("a path"));
    fs::remove_file(disk).expect("the disk is removed");
    let failure = refused(&mut client, "vm_start", start);
    assert_eq!(failure.code, "drive_not_found", "{}", failure.text);
    client.must("vm_delete", json!({ "vm": "box" }));

    // An image whose file is missing.
    fs::remove_file(only(&daemon, "images").join("rootfs.ext4")).expect("the image is removed");
    let failure = create_in_vain(&mut client, &arguments);
    assert!(failure.text.contains("rootfs.ext4"), "{}", failure.text);
    assert_in_order(&daemon);
}

#[test]
fn a_qemu_that_exits_at_once_is_told_with_its_last_words() {
    let place = tempfile::tempdir().expect("a directory");
    let qemu = place.path().join("qemu-system-x86_64");
    let script = "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'QEMU emulator version 8.0.0'; exit; }\necho 'the flux capacitor is missing' >&2\nexit 3\n";
    fs::write(&qemu, script).expect("a script is written");
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).expect("it is made executable");
    let qemu = qemu.to_str().expect("a path of UTF-8");
    let daemon = Daemon::start_set(&[("NEXUS_DRIVER", "qemu"), ("NEXUS_QEMU", qemu)]);
    let mut client = daemon.client();
    let failure =
        refused(&mut client, "vm_create", json!({ "name": "box", "from": "busybox", "wait_s": 45 }));
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    for told in ["exited with status 3", "the flux capacitor is missing"] {
        assert!(failure.text.contains(told), "{}", failure.text);
    }
    let vm = client.inspect("box");
    assert_eq!(vm["state"], "failed", "{vm}");
    assert!(vm["reason"].to_string().contains("flux capacitor"), "{vm}");
    assert_in_order(&daemon);
}

#[test]
fn an_image_of_an_image_knows_where_it_comes_from() {
    let world = World::new();
    let mut client = world.client();
    client.to_the_end("image_create", json!({ "from": world.from, "name": "base" }), SOON);
    for (name, from) in [("middle", "image:base"), ("top", "image:middle")] {
        client.to_the_end("image_create", json!({ "from": from, "name": name }), SOON);
    }
    let mut arguments = world.arguments("box");
    arguments["from"] = "image:top".into();
    let vm = client.create(arguments);
    let image = &client.inspect("box")["image"];
    assert_eq!((&image["name"], &image["source"]), (&json!("top"), &json!("image:middle")), "{vm}");
    let lineage = [json!("middle (image:base)"), json!(format!("base ({})", world.from))];
    assert_eq!(image["lineage"], json!(lineage), "{image}");
    assert!(vm["guest"]["os"].is_string(), "{vm}");
    world.assert_in_order();
}
