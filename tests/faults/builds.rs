//! Kills the daemon at every step of making an image. At its next start there is either a complete image or none, and the
//! same call makes it.

use std::fs;
use std::path::Path;
use std::process::Command;

use data_encoding::HEXLOWER;
use nexus_tests::client::Client;
use nexus_tests::registry::{Entry, Registry};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::kills::{kill_at, last_op};
use crate::world::{SOON, World, refused};

/// The existing images; the file of each matches its row, and its filesystem is intact.
#[track_caller]
pub(crate) fn installed(client: &mut Client) -> Vec<Value> {
    let listed = client.must("image_list", json!({ "limit": 500 }));
    let images = listed["images"].as_array().expect("a list");
    let installed: Vec<Value> = images.iter().filter(|image| image["installed"] == true).cloned().collect();
    for image in &installed {
        let path = image["path"].as_str().expect("a path");
        let digest = HEXLOWER.encode(&Sha256::digest(fs::read(path).expect("the image is read")));
        assert_eq!(image["sha256"], digest, "{image}");
        assert_whole(Path::new(path));
    }
    installed
}

/// Checks a filesystem.
#[track_caller]
pub(crate) fn assert_whole(disk: &Path) {
    let checked = Command::new("e2fsck").arg("-fn").arg(disk).output().expect("e2fsck runs");
    assert!(checked.status.success(), "{}: {}", disk.display(), String::from_utf8_lossy(&checked.stdout));
}

/// Failpoints in the making of every image.
const POINTS: [&str; 5] = ["image-begun", "image-staged", "image-filled", "image-checked", "image-named"];

#[test]
fn an_image_that_is_cut_off_is_gone_and_can_be_made() {
    let mut world = World::new();
    let wanted = json!({ "from": world.from, "name": "cut", "wait_s": 45 });
    for point in POINTS {
        let mut client = kill_at(&mut world, point, "image_create", &wanted);
        assert_eq!(installed(&mut client), Vec::<Value>::new(), "{point}");
        assert_eq!(refused(&mut client, "image_inspect", json!({ "image": "cut" })).code, "image_not_found");
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("image_create"), &json!("failed")), "{point}: {op}");
        world.assert_in_order();
        let image = client.to_the_end("image_create", wanted.clone(), SOON);
        assert_eq!(installed(&mut client), [client.must("image_inspect", json!({ "image": "cut" }))]);
        world.assert_in_order();
        client.must("image_delete", json!({ "image": image["id"] }));
    }
    // One that was already complete is finished.
    let mut client = kill_at(&mut world, "image-ready", "image_create", &wanted);
    let op = last_op(&mut client);
    assert_eq!((&op["tool"], &op["state"]), (&json!("image_create"), &json!("succeeded")), "{op}");
    let outcome = client.must("op_get", json!({ "op_id": op["op_id"] }));
    assert_eq!(installed(&mut client), [outcome["result"].clone()]);
    world.assert_in_order();
    // So is one made for a VM, on its second attempt.
    let mut arguments = world.arguments("box");
    arguments["from"] = "image:cut".into();
    client.create(arguments);
    world.assert_in_order();
}

#[test]
fn an_image_of_a_filesystem_that_is_cut_off_is_gone_and_can_be_made() {
    let mut world = World::new();
    let mut client = world.client();
    let first = client.to_the_end("image_create", json!({ "from": world.from, "name": "first" }), SOON);
    for (name, from) in [
        ("of-image", "image:first".to_owned()),
        ("of-file", format!("file:{}", first["path"].as_str().expect("a path"))),
    ] {
        let wanted = json!({ "from": from, "name": name, "wait_s": 45 });
        let before = installed(&mut world.client());
        for point in ["image-begun", "image-filled", "image-named"] {
            let mut client = kill_at(&mut world, point, "image_create", &wanted);
            assert_eq!(installed(&mut client), before, "{point}");
            assert_eq!(last_op(&mut client)["state"], "failed", "{point}");
            world.assert_in_order();
        }
        let mut client = world.client();
        client.to_the_end("image_create", wanted, SOON);
        assert_eq!(installed(&mut client).len(), before.len() + 1);
        world.assert_in_order();
    }
}

#[test]
fn an_image_of_a_registry_that_is_cut_off_is_gone_and_can_be_made() {
    let registry = Registry::start();
    let layer: &[(&str, Entry<'_>)] =
        &[("bin", Entry::Directory), ("bin/sh", Entry::Program(b"\x7fELF")), ("etc", Entry::Directory)];
    registry.put(
        "tool",
        "1",
        &[layer, &[("etc/release", Entry::Text("one\n"))]],
        &json!({ "Cmd": ["/bin/sh"] }),
    );
    let mut world = World::with(&[("NO_PROXY", "127.0.0.1")]);
    let from = format!("oci:{}/tool:1", registry.address());
    for point in ["image-blob", "image-staged", "image-named"] {
        let wanted = json!({ "from": from, "name": "cut", "wait_s": 45 });
        let mut client = kill_at(&mut world, point, "image_create", &wanted);
        assert_eq!(installed(&mut client), Vec::<Value>::new(), "{point}");
        assert_eq!(last_op(&mut client)["state"], "failed", "{point}");
        world.assert_in_order();
    }
    let mut arguments = world.arguments("box");
    arguments["from"] = from.into();
    let mut client = world.client();
    client.create(arguments);
    assert_eq!(installed(&mut client).len(), 1);
    world.assert_in_order();
}

#[test]
fn a_build_that_is_cut_off_says_so_and_the_next_one_succeeds() {
    let mut world = World::new();
    let template =
        json!({ "name": "web", "source": world.from, "overlays": { "/etc/motd": { "content": "hello\n" } } });
    world.client().must("template_create", template);
    let wanted = json!({ "template": "web", "wait_s": 45 });
    let points =
        ["build-begun", "build-prepared"].into_iter().chain(POINTS).chain(["image-ready", "build-made"]);
    for point in points {
        let mut client = kill_at(&mut world, point, "build_start", &wanted);
        let build = client.must("build_inspect", json!({ "build": "web" }));
        assert_eq!((&build["status"], &build["image"]), (&json!("failed"), &Value::Null), "{point}: {build}");
        assert_eq!(build["error"]["code"], "shutting_down", "{point}: {build}");
        assert!(build["ended_at"].is_string(), "{point}: {build}");
        let logs = client.call_whole("build_logs", json!({ "build": "web" })).expect("a build has a log");
        assert_eq!(logs["_meta"]["dev.nexus/result"]["status"], "failed", "{point}: {logs}");
        let op = last_op(&mut client);
        assert_eq!((&op["op_id"], &op["state"]), (&build["op_id"], &json!("failed")), "{point}: {op}");
        assert_eq!(installed(&mut client), Vec::<Value>::new(), "{point}");
        world.assert_in_order();
    }
    let mut client = kill_at(&mut world, "build-ended", "build_start", &wanted);
    let build = client.must("build_inspect", json!({ "build": "web" }));
    assert_eq!((&build["status"], &build["cached"]), (&json!("success"), &json!(false)), "{build}");
    let op = last_op(&mut client);
    assert_eq!((&op["op_id"], &op["state"]), (&build["op_id"], &json!("succeeded")), "{op}");
    let outcome = client.must("op_get", json!({ "op_id": op["op_id"] }));
    assert_eq!(outcome["result"], build);
    let [image] = &installed(&mut client)[..] else { panic!("there is no one image") };
    assert_eq!(image["id"], build["image"]["id"]);
    let again = client.to_the_end("build_start", wanted, SOON);
    assert_eq!((&again["cached"], &again["image"]), (&json!(true), &build["image"]), "{again}");
    world.assert_in_order();
}
