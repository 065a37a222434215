//! Images of VMs, and images that are saved to files: what is refused, what is left of one that was cut off, and that the VM goes on.
//!
//! Machines here are processes, which do not write to their drives; `tests/e2e/prepared.rs` has one that does.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::builds::assert_whole;
use crate::kills::{call_in_vain, kill_at, last_op};
use crate::world::{SOON, World, refused};

/// The names of the images that are here; each is whole.
fn images(client: &mut Client) -> Vec<String> {
    let listed = client.must("image_list", json!({ "limit": 500 }));
    let here = listed["images"].as_array().expect("a list").iter().filter(|image| image["installed"] == true);
    let look = |image: &Value| {
        assert_whole(Path::new(image["path"].as_str().expect("a path")));
        image["name"].as_str().expect("a name").to_owned()
    };
    here.map(look).collect()
}

#[test]
fn an_image_of_a_vm_outlives_it_and_makes_others() {
    let world = World::new();
    let mut client = world.client();
    let boot = world.create(&mut client, "web")["boot_id"].clone();
    let base = client.inspect("web")["image"]["name"].as_str().expect("its image").to_owned();
    // By default it has the VM's name; a running one goes on as it was.
    let plan = client.must("image_create", json!({ "from": "vm:web", "dry_run": true }))["plan"].take();
    assert_eq!((&plan["name"], &plan["steps"][0]["what"]), (&json!("web"), &json!("drive")), "{plan}");
    let made = client.to_the_end("image_create", json!({ "from": "vm:web" }), SOON);
    assert_eq!((&made["name"], &made["source"]), (&json!("web"), &json!("vm:web")), "{made}");
    assert_eq!(client.inspect("web")["boot_id"], boot);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    // A stopped one, by its id.
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    let id = client.wait_for_state("web", "stopped")["id"].as_str().expect("an id").to_owned();
    client.to_the_end("image_create", json!({ "from": format!("vm:{id}"), "name": "stopped" }), SOON);
    let taken = refused(&mut client, "image_create", json!({ "from": "vm:web", "name": "stopped" }));
    assert_eq!(taken.code, "name_taken", "{}", taken.text);
    client.must_confirmed("vm_delete", json!({ "vm": "web" }));
    for name in ["web", "stopped"] {
        let mut arguments = world.arguments(&format!("of-{name}"));
        arguments["from"] = format!("image:{name}").into();
        let vm = client.create(arguments);
        let image = client.inspect(vm["name"].as_str().expect("a name"))["image"].take();
        assert_eq!(image["lineage"][0].as_str().expect("where it is from").split(' ').next(), Some(&*base));
        assert_eq!(image["source"], "vm", "who sees this VM need not see the other: {image}");
    }
    assert!(images(&mut client).contains(&"stopped".to_owned()));
    world.assert_in_order();
}

#[test]
fn vms_that_cannot_be_copied_or_seen_are_refused() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    let before = images(&mut client);
    for (from, code) in
        [("vm:nobody", "vm_not_found"), ("vm:", "invalid_argument"), ("vm:a b", "invalid_argument")]
    {
        let failure = refused(&mut client, "image_create", json!({ "from": from, "name": "image" }));
        assert_eq!(failure.code, code, "{from}: {}", failure.text);
    }
    client.must("vm_pause", json!({ "vm": "web" }));
    let paused = refused(&mut client, "image_create", json!({ "from": "vm:web" }));
    assert_eq!(paused.code, "vm_wrong_state", "{}", paused.text);
    client.must("vm_resume", json!({ "vm": "web" }));
    // For a token, others' VMs do not exist; and one that may make images may not send them away.
    let made = client.must("token_create", json!({ "name": "maker", "scopes": ["images"], "tools": "all" }));
    let secret = made["token"].as_str().expect("a secret");
    let mut maker = Client::connect_with(&world.daemon.socket(), secret).expect("its holder");
    let unseen = refused(&mut maker, "image_create", json!({ "from": "vm:web" }));
    assert_eq!(unseen.code, "vm_not_found", "{}", unseen.text);
    let image = before.first().expect("the VM's own").clone();
    let push = json!({ "image": image, "to": "127.0.0.1:9/a/b:1" });
    let kept = refused(&mut maker, "image_push", push);
    assert_eq!(kept.code, "forbidden", "{}", kept.text);
    assert!(kept.text.contains("network"), "{}", kept.text);
    // One whose quota has no room for the drive is refused before anything is copied.
    let narrow = json!({ "name": "narrow", "scopes": ["images"], "all_vms": true, "tools": "all", "quota": { "disk": "4KiB" } });
    let narrow = client.must("token_create", narrow);
    let mut narrow =
        Client::connect_with(&world.daemon.socket(), narrow["token"].as_str().expect("a secret"))
            .expect("its holder");
    let full = refused(&mut narrow, "image_create", json!({ "from": "vm:web", "wait_s": 45 }));
    assert_eq!(full.code, "quota_exceeded", "{}", full.text);
    assert!(full.text.contains("this takes"), "{}", full.text);
    assert_eq!(images(&mut client), before);
    // Of an image of a VM, only its owner is told which VM that was.
    client.to_the_end("image_create", json!({ "from": "vm:web", "name": "of-web" }), SOON);
    assert_eq!(client.must("image_inspect", json!({ "image": "of-web" }))["source"], "vm:web");
    assert_eq!(maker.must("image_inspect", json!({ "image": "of-web" }))["source"], "vm");
    let listed = maker.must("image_list", json!({ "limit": 500 })).to_string();
    assert!(listed.contains("of-web") && !listed.contains("vm:web"), "{listed}");
    world.assert_in_order();
}

/// Kills the daemon at a point of `image_create`, once it has taken up the VM; returns a client of the next one.
fn cut_off(world: &mut World, point: &str, wanted: &Value) -> Client {
    world.daemon.kill_at(point, |client| {
        client.wait_for_state("web", "ready");
        call_in_vain(client, "image_create", wanted);
    })
}

#[test]
fn an_image_of_a_vm_that_is_cut_off_leaves_nothing_and_the_vm_goes_on() {
    let mut world = World::new();
    let mut client = world.client();
    let boot = world.create(&mut client, "web")["boot_id"].clone();
    let before = images(&mut client);
    let wanted = json!({ "from": "vm:web", "name": "cut", "wait_s": 45 });
    for point in ["copy-quiet", "copy-made", "image-vm-copied", "image-staged", "image-checked"] {
        let mut client = cut_off(&mut world, point, &wanted);
        client.wait_for_state("web", "ready");
        assert_eq!(client.run("web", "echo up").stdout, "up\n", "{point}");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{point}");
        assert_eq!(images(&mut client), before, "{point}");
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("image_create"), &json!("failed")), "{point}: {op}");
        world.assert_in_order();
    }
    let mut client = cut_off(&mut world, "image-ready", &wanted);
    assert_eq!(last_op(&mut client)["state"], "succeeded");
    assert!(images(&mut client).contains(&"cut".to_owned()));
    world.assert_in_order();
}

#[test]
fn a_vm_goes_on_after_a_copy_that_failed() {
    let mut world = World::new();
    let mut client = world.client();
    let boot = world.create(&mut client, "web")["boot_id"].clone();
    let before = images(&mut client);
    for point in ["panic:copy-quiet", "panic:copy-made"] {
        world.daemon.stop();
        world.daemon.set("NEXUS_FAILPOINT", Some(point));
        world.daemon.restart();
        let mut client = world.client();
        client.wait_for_state("web", "ready");
        let failure =
            refused(&mut client, "image_create", json!({ "from": "vm:web", "name": "image", "wait_s": 45 }));
        assert_eq!(failure.code, "internal", "{point}: {}", failure.text);
        client.wait_for_state("web", "ready");
        assert_eq!(client.run("web", "echo up").stdout, "up\n", "{point}");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{point}");
        assert_eq!(images(&mut client), before, "{point}");
        world.assert_in_order();
    }
    world.daemon.stop();
    world.daemon.set("NEXUS_FAILPOINT", None);
    world.daemon.restart();
    let mut client = world.client();
    client.wait_for_state("web", "ready");
    client.to_the_end("image_create", json!({ "from": "vm:web", "name": "image" }), SOON);
}

#[test]
fn an_image_is_saved_where_its_client_may_write_and_nothing_is_replaced() {
    let place = tempfile::tempdir().expect("a directory");
    let allowed = place.path().join("allowed");
    fs::create_dir(&allowed).expect("a directory");
    let mut world = World::with(&[("NEXUS_COPY_ROOTS", allowed.to_str().expect("UTF-8"))]);
    let mut client = world.client();
    let image = client.to_the_end("image_create", json!({ "from": world.from, "name": "small" }), SOON);
    let at = |name: &str| allowed.join(name).to_str().expect("UTF-8").to_owned();
    for (to, code) in [
        (place.path().join("outside.tar").display().to_string(), "forbidden"),
        (format!("{}/", at("directory")), "invalid_argument"),
        ("../up.tar".to_owned(), "invalid_argument"),
    ] {
        let failure = refused(&mut client, "image_save", json!({ "image": "small", "to": to }));
        assert_eq!(failure.code, code, "{to}: {}", failure.text);
    }
    let missing = refused(&mut client, "image_save", json!({ "image": "nothing", "to": at("a.tar") }));
    assert_eq!(missing.code, "image_not_found", "{}", missing.text);
    let wanted = json!({ "image": "small", "to": at("small.tar"), "wait_s": 45 });
    for point in ["image-packed", "image-saved"] {
        let mut client = kill_at(&mut world, point, "image_save", &wanted);
        assert_eq!(last_op(&mut client)["state"], "failed", "{point}");
        assert!(!Path::new(&at("small.tar")).exists(), "{point}");
        world.assert_in_order();
    }
    let mut client = world.client();
    let saved = client.to_the_end("image_save", wanted.clone(), SOON);
    let written = fs::metadata(at("small.tar")).expect("the file is there");
    assert_eq!(written.permissions().mode() & 0o777, 0o600, "it may hold secrets");
    let length = written.len();
    assert_eq!((&saved["path"], &saved["bytes"]), (&json!(at("small.tar")), &json!(length)), "{saved}");
    let again = refused(&mut client, "image_save", wanted);
    assert_eq!(again.code, "file_refused", "{}", again.text);
    // The archive makes the image again, under each of its names.
    for form in ["docker-archive", "oci-archive", "file"] {
        let from = format!("{form}:{}", at("small.tar"));
        let back = client.to_the_end("image_create", json!({ "from": from, "name": form }), SOON);
        assert_eq!(back["distro"], image["distro"], "{form}");
    }
    let mut arguments = world.arguments("back");
    arguments["from"] = "image:oci-archive".into();
    client.create(arguments);
    assert_eq!(client.run("back", "echo up").stdout, "up\n");
    world.assert_in_order();
}
