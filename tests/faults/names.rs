//! Names: renaming a VM, and suggestions for misspelt names.

use serde_json::json;

use crate::world::{World, refused};

#[test]
fn a_renamed_vm_has_its_new_name_and_no_other() {
    let world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "web");
    world.create(&mut client, "db");
    let renamed = client.must("vm_update", json!({ "vm": "web", "name": "shop", "tags": { "a": "b" } }));
    assert_eq!((&renamed["id"], &renamed["name"]), (&vm["id"], &json!("shop")));
    assert_eq!(renamed["tags"], json!({ "a": "b" }));
    assert_eq!(client.run("shop", "echo on").stdout, "on\n");
    let gone = refused(&mut client, "vm_inspect", json!({ "vm": "web" }));
    assert_eq!(gone.code, "vm_not_found", "{}", gone.text);
    let history = client.must("vm_history", json!({ "vm": "shop", "limit": 1 }));
    assert_eq!(history["transitions"][0]["reason"], "web renamed to shop");

    // With a name that is taken, nothing is changed.
    let taken = refused(&mut client, "vm_update", json!({ "vm": "shop", "name": "db", "protected": true }));
    assert_eq!(taken.code, "name_taken", "{}", taken.text);
    let unchanged = client.inspect("shop");
    assert_eq!((&unchanged["id"], &unchanged["protected"]), (&vm["id"], &json!(false)));
    // The same name is not a change, and the old one is free.
    client.must("vm_update", json!({ "vm": "shop", "name": "shop" }));
    let other = world.create(&mut client, "web");
    assert_ne!(other["id"], vm["id"]);
    world.assert_in_order();
}

#[test]
fn what_is_nearly_a_name_is_asked_about() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web-1");
    client.must("template_create", json!({ "name": "webapp", "source": "debian" }));
    client.must("drive_create", json!({ "name": "data", "size": "64MiB", "wait_s": 45 }));
    for (tool, arguments, question) in [
        ("vm_inspect", json!({ "vm": "web1" }), "did you mean web-1?"),
        ("drive_inspect", json!({ "drive": "dta" }), "did you mean data?"),
        ("template_inspect", json!({ "template": "webap" }), "did you mean webapp?"),
        ("image_inspect", json!({ "image": "debain" }), "did you mean debian?"),
        ("image_create", json!({ "from": "busybx" }), "did you mean busybox?"),
        ("image_create", json!({ "from": "python:3.12" }), "did you mean `oci:python:3.12`?"),
        ("image_create", json!({ "from": "alpine@3.21" }), "did you mean `rootfs:alpine@3.21`?"),
        ("image_create", json!({ "from": "webapp" }), "did you mean `template:webapp`?"),
        ("image_create", json!({ "from": "template:webap" }), "did you mean webapp?"),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert!(failure.text.contains(question), "{tool}: {}", failure.text);
    }
    let failure = refused(&mut client, "vm_inspect", json!({ "vm": "something-else" }));
    assert!(!failure.text.contains("did you mean"), "{}", failure.text);
    world.assert_in_order();
}
