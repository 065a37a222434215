//! Kills the daemon at every step of creating, starting, stopping and deleting. At its next start everything is either
//! finished or undone, and nothing is orphaned.
//!
//! Debug builds kill themselves with SIGKILL at the point named in `NEXUS_FAILPOINT`.

use nexus_tests::client::Client;
use nexus_tests::daemon::Daemon;
use serde_json::{Value, json};

use crate::world::{SOON, World, soon};

/// Calls a tool of a daemon that is killed meanwhile. Whether it still answered does not matter.
pub(crate) fn call_in_vain(client: &mut Client, tool: &str, arguments: &Value) {
    client.request("tools/call", &json!({ "name": tool, "arguments": arguments })).ok();
}

/// Kills the daemon at a point during a call, and starts it again.
pub(crate) fn kill_at(world: &mut World, point: &str, tool: &str, arguments: &Value) -> Client {
    kill_daemon_at(&mut world.daemon, point, tool, arguments)
}

pub(crate) fn kill_daemon_at(daemon: &mut Daemon, point: &str, tool: &str, arguments: &Value) -> Client {
    daemon.kill_at(point, |client| call_in_vain(client, tool, arguments))
}

/// The newest operation, once it has ended.
pub(crate) fn last_op(client: &mut Client) -> Value {
    soon("the operation's end", || {
        let ops = client.must("op_list", json!({ "limit": 1 }));
        Some(ops["ops"][0].clone()).filter(|op| op["state"] != "running")
    })
}

#[test]
fn a_creation_that_is_cut_off_is_undone() {
    let mut world = World::new();
    // The image already exists.
    let mut client = world.client();
    world.create(&mut client, "first");
    for point in [
        "create-begun",
        "create-drive-begun",
        "drive-staged",
        "drive-named",
        "create-drive-cloned",
        "create-drive-ready",
    ] {
        let arguments = world.arguments("cut");
        let mut client = kill_at(&mut world, point, "vm_create", &arguments);
        let failure = client.call("vm_inspect", json!({ "vm": "cut" })).expect_err("it is undone");
        assert_eq!(failure.code, "vm_not_found", "{point}: {}", failure.text);
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("vm_create"), &json!("failed")), "{point}: {op}");
        let history = client.must("vm_history", json!({ "vm": "cut" }));
        assert!(history["transitions"][0]["reason"].to_string().contains("daemon ended"), "{history}");
        // The running VM is not affected.
        assert_eq!(client.wait_for_state("first", "ready")["name"], "first");
        world.assert_in_order();
    }
    // The name is free again.
    let mut client = world.client();
    world.create(&mut client, "cut");
    world.assert_in_order();
}

#[test]
fn a_start_that_is_cut_off_is_finished_or_fails() {
    let mut world = World::new();
    for (point, state) in [
        ("created", "ready"),
        ("starting", "failed"),
        ("start-hello-bound", "failed"),
        ("start-launched", "ready"),
        ("start-recorded", "ready"),
        ("running", "ready"),
        ("start-configured", "ready"),
        ("start-welcomed", "ready"),
        ("ready", "ready"),
    ] {
        let arguments = world.arguments("cut");
        let mut client = kill_at(&mut world, point, "vm_create", &arguments);
        let vm = client.wait_for_state("cut", state);
        let op = last_op(&mut client);
        let ended = if state == "ready" { "succeeded" } else { "failed" };
        assert_eq!(op["state"], ended, "{point}: {op}");
        world.assert_in_order();
        if state == "failed" {
            assert!(vm["reason"].is_string(), "{point}: {vm}");
            client.to_the_end("vm_start", json!({ "vm": "cut" }), SOON);
        }
        assert_eq!(client.run("cut", "echo up").stdout, "up\n", "{point}");
        client.must("vm_delete", json!({ "vm": "cut", "force": true }));
        world.assert_in_order();
    }
}

#[test]
fn a_stop_that_is_cut_off_is_finished() {
    let mut world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "cut");
    for point in ["stop-begun", "stopping", "stop-asked", "stop-down", "stopped"] {
        let mut client = kill_at(&mut world, point, "vm_stop", &json!({ "vm": "cut" }));
        client.wait_for_state("cut", "stopped");
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("vm_stop"), &json!("succeeded")), "{point}: {op}");
        world.assert_in_order();
        let again = client.to_the_end("vm_start", json!({ "vm": "cut" }), SOON);
        assert_ne!(again["boot_id"], vm["boot_id"]);
    }
    // The same for a forced stop.
    let mut client = kill_at(&mut world, "stopping", "vm_stop", &json!({ "vm": "cut", "force": true }));
    client.wait_for_state("cut", "stopped");
    world.assert_in_order();
}

#[test]
fn a_deletion_that_is_cut_off_is_finished_or_was_none() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "cut");
    let deletion = json!({ "vm": "cut", "force": true });
    let mut client = kill_at(&mut world, "delete-down", "vm_delete", &deletion);
    let vm = client.inspect("cut");
    assert!(["crashed", "stopped"].contains(&vm["state"].as_str().unwrap_or_default()), "{vm}");
    world.assert_in_order();
    let mut client = kill_at(&mut world, "delete-rows-gone", "vm_delete", &deletion);
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    world.assert_in_order();
}

#[test]
fn programs_that_outlive_the_daemon_are_ended_before_anything_is_tidied_up() {
    let mut world = World::new();
    let daemon = world.daemon.pid();
    let stat =
        nexus_core::internals::process::stat(daemon).expect("its stat is read").expect("the daemon is there");
    let mut sleep = std::process::Command::new("sleep");
    sleep.arg("1000").env("NEXUS_STARTED_BY", format!("{daemon}:{}", stat.start_time));
    let mut left = sleep.spawn().expect("sleep starts");
    world.daemon.kill();
    world.daemon.restart();
    let ended = left.try_wait().expect("a child can be waited for");
    assert!(ended.is_some_and(|status| !status.success()), "{ended:?}\n{}", world.daemon.log());
    assert!(
        world.daemon.log().contains("killed leftover programs of an earlier daemon ended=1"),
        "{}",
        world.daemon.log()
    );
}
