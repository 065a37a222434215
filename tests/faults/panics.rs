//! Panics in the daemon's own tasks, caused by failpoints: a panic ends only the work that it happens in.

use serde_json::json;

use crate::kills::last_op;
use crate::world::{SOON, World, refused, soon};

/// A world whose daemon panics once at a point.
fn with_panic_at(point: &str) -> World {
    World::with(&[("NEXUS_FAILPOINT", &format!("panic:{point}"))])
}

#[test]
fn a_panic_in_a_creation_fails_it_and_leaves_nothing() {
    for point in ["create-drive-begun", "create-drive-cloned", "create-drive-ready"] {
        let world = with_panic_at(point);
        let mut client = world.client();
        let failure = world.create_in_vain(&mut client, "unlucky");
        assert_eq!(failure.code, "internal", "{point}: {}", failure.text);
        assert!(failure.text.contains(&format!("at the failpoint {point}")), "{}", failure.text);
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("vm_create"), &json!("failed")), "{op}");
        assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "unlucky" })).code, "vm_not_found");
        world.assert_in_order();
        world.create(&mut client, "unlucky");
        assert_eq!(client.run("unlucky", "echo up").stdout, "up\n");
    }
}

#[test]
fn a_vm_whose_task_panics_is_taken_up_anew() {
    for point in ["start-recorded", "running", "start-configured", "ready", "stopping", "stop-down"] {
        let world = with_panic_at(point);
        let mut client = world.client();
        let created = client.call("vm_create", world.arguments("lucky"));
        if point.starts_with("stop") {
            created.expect("a VM");
            // Either the waiting caller gets the error, or the VM is stopped in time.
            client.call("vm_stop", json!({ "vm": "lucky", "wait_s": 45 })).ok();
            client.wait_for_state("lucky", "stopped");
            client.to_the_end("vm_start", json!({ "vm": "lucky" }), SOON);
        } else if let Err(failure) = created {
            assert_eq!(failure.code, "internal", "{point}: {}", failure.text);
            assert!(failure.text.contains("bug in nexusd"), "{point}: {}", failure.text);
        }
        // On a busy host the call may have been answered before the point was reached.
        soon(point, || world.daemon.log().contains("restarting the task").then_some(()));
        client.wait_for_state("lucky", "ready");
        assert_eq!(client.run("lucky", "echo up").stdout, "up\n", "{point}");
        world.assert_in_order();
        client.must("vm_delete", json!({ "vm": "lucky", "force": true }));
        world.assert_in_order();
    }
}
