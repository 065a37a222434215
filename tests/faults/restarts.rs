//! Restarting and renaming VMs, and calls that are meant for one boot.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::echo::echo;
use crate::kills::{kill_at, last_op};
use crate::world::{SOON, World, refused};

#[test]
fn a_restarted_vm_has_another_boot_and_the_same_disk() {
    let mut world = World::new();
    let mut client = world.client();
    let mut boot = world.create(&mut client, "web")["boot_id"].clone();
    for arguments in [json!({ "vm": "web" }), json!({ "vm": "web", "force": true })] {
        let vm = client.to_the_end("vm_restart", arguments, SOON);
        assert_eq!(vm["state"], "ready");
        assert_ne!(vm["boot_id"], boot);
        boot = vm["boot_id"].clone();
    }
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    let history = client.must("vm_history", json!({ "vm": "web" }))["transitions"].to_string();
    assert!(history.contains("forced stop requested") && history.contains("it is down"), "{history}");
    // One that is down is only started; a second restart at once is another one.
    client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON);
    assert_eq!(client.to_the_end("vm_restart", json!({ "vm": "web" }), SOON)["state"], "ready");
    // Whatever cuts it off, it is finished by the next daemon.
    for point in ["stopping", "stop-down", "restart-down", "starting"] {
        let before = world.client().inspect("web")["boot_id"].clone();
        let mut client = kill_at(&mut world, point, "vm_restart", &json!({ "vm": "web" }));
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("vm_restart"), &json!("succeeded")), "{point}: {op}");
        let vm = client.wait_for_state("web", "ready");
        assert_ne!(vm["boot_id"], before, "{point}");
        world.assert_in_order();
    }
}

#[test]
fn a_call_for_an_earlier_boot_changes_nothing() {
    let world = World::new();
    let mut client = world.client();
    let old = world.create(&mut client, "web")["boot_id"].clone();
    client.to_the_end("drive_create", json!({ "name": "data", "size": "64MiB", "wait_s": 45 }), SOON);
    let port = echo();
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port, "if_boot_id": old }));
    let new =
        client.to_the_end("vm_restart", json!({ "vm": "web", "if_boot_id": old }), SOON)["boot_id"].clone();
    for (tool, arguments) in [
        ("vm_start", json!({ "vm": "web" })),
        ("vm_stop", json!({ "vm": "web" })),
        ("vm_publish", json!({ "vm": "web", "guest_port": port, "socket": true })),
        ("vm_unpublish", json!({ "vm": "web", "guest_port": port })),
        ("vm_restart", json!({ "vm": "web" })),
        ("vm_delete", json!({ "vm": "web", "force": true })),
        ("vm_update", json!({ "vm": "web", "tags": { "a": "b" } })),
        ("vm_rename", json!({ "vm": "web", "name": "shop" })),
        ("vm_wait", json!({ "vm": "web" })),
    ] {
        let with = |boot: &Value| {
            let mut arguments = arguments.clone();
            arguments["if_boot_id"] = boot.clone();
            arguments
        };
        let failure = refused(&mut client, tool, with(&old));
        assert_eq!(failure.code, "boot_changed", "{tool}: {}", failure.text);
        for id in [&old, &new] {
            assert!(failure.text.contains(id.as_str().expect("an id")), "{tool}: {}", failure.text);
        }
    }
    let vm = client.inspect("web");
    assert_eq!((&vm["boot_id"], &vm["state"], &vm["tags"]), (&new, &json!("ready"), &json!({})));
    assert_eq!(vm["published"], json!([published]));
    let failure = refused(&mut client, "vm_delete", json!({ "tags": { "a": "b" }, "if_boot_id": old }));
    assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
    // Drives change hands while the VM is down; its last boot is meant then.
    client.to_the_end("vm_stop", json!({ "vm": "web", "if_boot_id": new }), SOON);
    let attach = |boot: &Value| json!({ "vm": "web", "drive": "data", "if_boot_id": boot });
    assert_eq!(refused(&mut client, "drive_attach", attach(&old)).code, "boot_changed");
    client.must("drive_attach", attach(&new));
    let detach = |boot: &Value| json!({ "drive": "data", "if_boot_id": boot });
    assert_eq!(refused(&mut client, "drive_detach", detach(&old)).code, "boot_changed");
    client.must("drive_detach", detach(&new));
    let start = |boot: &Value| json!({ "vm": "web", "if_boot_id": boot });
    assert_eq!(refused(&mut client, "vm_start", start(&old)).code, "boot_changed");
    let vm = client.inspect("web");
    assert_eq!((&vm["boot_id"], &vm["state"]), (&new, &json!("stopped")));
    let last = client.to_the_end("vm_start", start(&new), SOON)["boot_id"].clone();
    assert_ne!(last, new);
    let gone = client.must("vm_unpublish", json!({ "vm": "web", "guest_port": port, "if_boot_id": last }));
    assert_eq!(gone["unpublished"].as_array().map(Vec::len), Some(1));
    client.to_the_end("vm_stop", json!({ "vm": "web", "if_boot_id": last }), SOON);
    // Where nothing ever booted, no boot is meant.
    let mut arguments = world.arguments("new");
    arguments["start"] = false.into();
    client.to_the_end("vm_create", arguments, SOON);
    let failure = refused(&mut client, "vm_delete", json!({ "vm": "new", "if_boot_id": old }));
    assert!(failure.text.contains("has not booted yet"), "{}", failure.text);
    client.must("vm_delete", json!({ "vm": "web", "if_boot_id": last }));
    world.assert_in_order();
}

#[test]
fn a_renamed_vm_keeps_what_is_open() {
    let (world, port) = (World::new(), echo());
    let (mut client, mut other) = (world.client(), world.client());
    world.create(&mut client, "web");
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port }));
    let mut open =
        TcpStream::connect(published["address"].as_str().expect("an address")).expect("it listens");
    open.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    open.write_all(b"before").expect("it is open");
    let call = json!({ "name": "guest_run_command", "arguments": { "vm": "web", "command": "sleep 0.5; echo done" } });
    let id = other.start("tools/call", &call).expect("it is sent");
    let renamed = client.must("vm_rename", json!({ "vm": "web", "name": "shop" }));
    assert_eq!(renamed["name"], "shop");
    assert_eq!(renamed["published"], json!([published]));
    let answer: Value = serde_json::from_str(&other.answer(id).expect("it goes on")).expect("JSON");
    assert!(answer.to_string().contains("done\\n"), "{answer}");
    open.write_all(b"after").expect("it is still open");
    let mut said = [0; 11];
    open.read_exact(&mut said).expect("it is still served");
    assert_eq!(&said, b"beforeafter");
    assert_eq!(client.run("shop", "echo on").stdout, "on\n");
    assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "web" })).code, "vm_not_found");
    // One that is down has the name at its next start.
    client.to_the_end("vm_stop", json!({ "vm": "shop" }), SOON);
    client.must("vm_rename", json!({ "vm": "shop", "name": "store" }));
    client.to_the_end("vm_start", json!({ "vm": "store" }), SOON);
    world.assert_in_order();
}
