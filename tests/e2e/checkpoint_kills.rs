//! Daemons that are killed within a checkpoint, a rollback or a fork of a real machine: the next one has all of it or nothing, and no machine
//! stands still for ever.

use std::path::PathBuf;

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::{
    assert_files, checkpoint, count, create, delete_all, goes_on, kill_at, listed, roll_back,
};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// Waits until a VM neither starts nor ends, nor waits for its agent; returns its details.
fn settled(client: &mut Client, vm: &str) -> Value {
    client.wait_for(vm, "a state that lasts", |vm| {
        ["ready", "stopped", "failed", "crashed"].contains(&vm["state"].as_str().unwrap_or_default())
    })
}

/// Waits until no operation runs any more: what the daemon before has begun is finished or given up.
fn finished(client: &mut Client) {
    let done = until(BOOT, || {
        let ops = client.must("op_list", json!({ "limit": 100 }));
        ops["ops"].as_array()?.iter().all(|op| op["state"] != "running").then_some(())
    });
    assert!(done.is_some(), "{}", client.must("op_list", json!({ "limit": 5 })));
}

#[test]
fn a_checkpoint_and_its_deletion_that_are_cut_off_are_whole_or_gone() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    count(&mut client, "web");
    let take = json!({ "vm": "web", "name": "cut", "wait_s": 45 });
    for point in [
        "checkpoint-begun",
        "checkpoint-quiet",
        "checkpoint-saved",
        "checkpoint-copied",
        "checkpoint-released",
        "checkpoint-written",
        "checkpoint-named",
    ] {
        let mut client = kill_at(&mut daemon, point, "web", "vm_checkpoint", take.clone());
        client.wait_for_state("web", "ready");
        goes_on(&mut client, "web");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{point}");
        assert_eq!(listed(&mut client), Vec::<String>::new(), "{point}");
        assert_files(&daemon, &mut client);
    }
    // Once it is recorded it is as good as any other.
    let mut client = kill_at(&mut daemon, "checkpoint-ready", "web", "vm_checkpoint", take);
    client.wait_for_state("web", "ready");
    goes_on(&mut client, "web");
    let whole = client.must("checkpoint_list", json!({ "vm": "web" }))["checkpoints"][0].clone();
    assert_eq!((&whole["name"], &whole["problem"]), (&json!("cut"), &Value::Null), "{whole}");
    assert_files(&daemon, &mut client);
    client.to_the_end("vm_fork", json!({ "checkpoint": "cut", "names": ["child"], "wait_s": 45 }), BOOT);
    goes_on(&mut client, "child");
    client.must_confirmed("vm_delete", json!({ "vm": "child", "force": true }));

    let delete = json!({ "checkpoint": "cut" });
    let mut client = kill_at(&mut daemon, "checkpoint-forgotten", "web", "checkpoint_delete", delete);
    assert_eq!(listed(&mut client), Vec::<String>::new());
    assert_files(&daemon, &mut client);
    client.wait_for_state("web", "ready");
    assert_in_order(&daemon);
}

#[test]
fn commands_go_on_although_no_daemon_comes_back() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    let console = client.inspect("web")["console_log"].as_str().map(PathBuf::from).expect("its console");
    let line = "i=0; while true; do i=$((i+1)); echo counted $i > /dev/console; sleep 0.2; done";
    client.must("guest_command_start", json!({ "vm": "web", "command": line }));
    let counted = || -> u64 {
        let text = std::fs::read(&console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let numbers = text.lines().filter_map(|line| line.trim().strip_prefix("counted ")?.parse().ok());
        numbers.max().unwrap_or_default()
    };
    assert!(until(BOOT, || (counted() > 5).then_some(())).is_some(), "nothing is counted");
    daemon.stop();
    // The guest runs, and nobody has told it that its commands may.
    daemon.set("NEXUS_FAILPOINT", Some("checkpoint-released"));
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("web", "ready");
    let take = json!({ "name": "vm_checkpoint", "arguments": { "vm": "web", "name": "cut", "wait_s": 45 } });
    client.request("tools/call", &take).ok();
    daemon.wait_until_ended();
    let before = counted();
    let gone_on = until(BOOT, || (counted() > before + 20).then_some(()));
    assert!(gone_on.is_some(), "commands stand still at {before}, and no daemon is there");
    // The next daemon finds it as it is.
    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("web", "ready");
    assert_eq!(client.inspect("web")["boot_id"], boot);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    assert_in_order(&daemon);
}

/// Writes the same word to both drives, and waits until it is there.
fn mark(client: &mut Client, word: &str) {
    let line = format!("echo {word} > /srv/mark; echo {word} > /data/mark; sync");
    assert_eq!(client.run("web", &line).exit_code, Some(0), "{word}");
}

#[test]
fn a_rollback_that_is_cut_off_leaves_the_machine_as_it_was_or_as_it_was_then() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let web = json!({ "name": "web", "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "192MiB",
        "start": false });
    client.to_the_end("vm_create", web, BOOT);
    client.to_the_end("drive_create", json!({ "name": "data", "size": "64MiB" }), BOOT);
    client.must("drive_attach", json!({ "drive": "data", "vm": "web", "mount": "/data" }));
    client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
    client.wait_for_state("web", "ready");
    mark(&mut client, "then");
    count(&mut client, "web");
    checkpoint(&mut client, "web", "clean");
    let back = json!({ "vm": "web", "checkpoint": "clean", "keep_current": false, "wait_s": 45 });
    // The other points are in `tests/e2e/checkpoints.rs`.
    for point in ["rollback-drives", "start-launched"] {
        let mut client = daemon.client();
        mark(&mut client, point);
        let mut client = kill_at(&mut daemon, point, "web", "vm_rollback", back.clone());
        finished(&mut client);
        let vm = settled(&mut client, "web");
        if vm["state"] == "ready" {
            // What goes on from the checkpoint does so with all its commands.
            goes_on(&mut client, "web");
        } else {
            client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
            client.wait_for_state("web", "ready");
        }
        let both = client.run("web", "cat /srv/mark /data/mark").stdout;
        let is_whole = both == "then\nthen\n" || both == format!("{point}\n{point}\n");
        assert!(is_whole, "{point}: one drive is of another time than the other: {both}");
        assert_in_order(&daemon);
        assert_files(&daemon, &mut client);
    }
    // The checkpoint is as good as before.
    let mut client = daemon.client();
    roll_back(&mut client, "web", "clean");
    goes_on(&mut client, "web");
    assert_eq!(client.run("web", "cat /srv/mark /data/mark").stdout, "then\nthen\n");
    delete_all(&daemon, &mut client);
    client.must_confirmed("vm_delete", json!({ "vm": "web", "force": true }));
    client.must_confirmed("drive_delete", json!({ "drive": "data" }));
}

#[test]
fn a_fork_that_is_cut_off_is_undone_or_kept_and_its_parent_runs_on() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    count(&mut client, "web");
    checkpoint(&mut client, "web", "clean");
    let fork = json!({ "vm": "web", "checkpoint": "clean", "names": ["a", "b"], "wait_s": 45 });
    let names = |client: &mut Client| -> Vec<String> {
        let listed = client.must("vm_list", json!({}));
        let vms = listed["vms"].as_array().expect("a list").iter();
        let mut names: Vec<String> = vms.filter_map(|vm| Some(vm["name"].as_str()?.to_owned())).collect();
        names.sort();
        names
    };
    for point in ["fork-begun", "fork-drives", "start-launched", "fork-launched"] {
        let mut client = kill_at(&mut daemon, point, "web", "vm_fork", fork.clone());
        finished(&mut client);
        let is_undone = until(BOOT, || (names(&mut client) == ["web"]).then_some(()));
        assert!(is_undone.is_some(), "{point}: {:?}\n{}", names(&mut client), daemon.log());
        client.wait_for_state("web", "ready");
        goes_on(&mut client, "web");
        assert_in_order(&daemon);
        assert_files(&daemon, &mut client);
    }
    let mut client = kill_at(&mut daemon, "fork-kept", "web", "vm_fork", fork);
    finished(&mut client);
    assert_eq!(names(&mut client), ["a", "b", "web"]);
    for name in ["a", "b", "web"] {
        client.wait_for_state(name, "ready");
        goes_on(&mut client, name);
    }
    assert_eq!(client.inspect("web")["boot_id"], boot);
    assert_in_order(&daemon);
    delete_all(&daemon, &mut client);
}
