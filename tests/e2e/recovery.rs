//! The daemon stops and starts; machines keep running.

use std::process::Command;

use nexus_tests::daemon::{Daemon, program};
use serde_json::json;

#[test]
fn machines_outlive_a_killed_daemon_and_a_second_one_is_refused() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let before = client.create(json!({ "name": "stays", "from": "busybox" }));
    client.run("stays", "echo kept > /tmp/kept; (sleep 300 > /dev/null 2>&1 &)");
    a_second_one_is_refused(&daemon);
    daemon.kill();
    daemon.restart();

    let mut client = daemon.client();
    let after = client.wait_for_state("stays", "ready");
    for same in ["boot_id", "cid", "id"] {
        assert_eq!(after[same], before[same], "{same}");
    }
    for same in ["pid", "shim_pid", "directory"] {
        assert_eq!(after["process"][same], before["process"][same], "{same}");
    }
    assert_eq!(client.run("stays", "cat /tmp/kept; ps -o args | grep -cx 'sleep 300'").stdout, "kept\n1\n");

    daemon.stop();
    daemon.restart();
    let mut client = daemon.client();
    assert_eq!(client.wait_for_state("stays", "ready")["boot_id"], before["boot_id"]);
    client.to_the_end("vm_stop", json!({ "vm": "stays" }), std::time::Duration::from_mins(2));
    assert_eq!(client.inspect("stays")["state"], "stopped");
}

#[test]
fn what_happened_meanwhile_is_settled() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "alone", "from": "busybox" }));
    daemon.kill();
    let pid = vm["process"]["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok())
        .expect("a running VM has a process");
    nexus_tests::daemon::kill_process(pid);
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("alone", "crashed");
    client.to_the_end("vm_start", json!({ "vm": "alone" }), nexus_tests::client::BOOT);
    client.wait_for_state("alone", "ready");
}

/// A second daemon is refused, and the first one is not affected.
fn a_second_one_is_refused(daemon: &Daemon) {
    let runtime = tempfile::tempdir().expect("a temporary directory");
    let second = Command::new(program("nexusd"))
        .env("NEXUS_STATE_DIR", daemon.state())
        .env("NEXUS_RUNTIME_DIR", runtime.path())
        .output()
        .expect("nexusd starts");
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success(), "{said}");
    let holder = format!("{} is in use by ", daemon.state().display());
    assert!(said.contains(&holder) && said.contains(&daemon.pid().to_string()), "{said}");
    // The first daemon is not affected.
    daemon.client().must("vm_list", json!({}));
}
