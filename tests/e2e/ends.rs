//! How machines end: by themselves, by force, by accident.

use std::time::Duration;

use nexus_tests::daemon::{Daemon, kill_process};
use nexus_tests::wait::until;
use serde_json::{Value, json};

fn pid(vm: &Value, which: &str) -> u32 {
    vm["process"][which]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok())
        .unwrap_or_else(|| panic!("no {which} in {vm}"))
}

fn is_alive(pid: u32) -> bool {
    // A zombie has already ended.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// A command that takes its own machine down may return anything, but it must return.
fn ends_its_machine(client: &mut nexus_tests::client::Client, vm: &str, command: &str) {
    match client.call_whole("guest_run_command", json!({ "vm": vm, "command": command })) {
        Ok(_) => {}
        Err(failure) => assert!(
            ["vm_gone", "guest_unreachable", "vm_not_running", "vm_not_ready"]
                .contains(&failure.code.as_str()),
            "{}",
            failure.text
        ),
    }
}

#[test]
fn a_guest_reboots_and_powers_itself_off() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "again", "from": "busybox" }));
    ends_its_machine(&mut client, "again", "reboot");
    let after = client
        .wait_for("again", "another boot", |now| now["state"] == "ready" && now["boot_id"] != vm["boot_id"]);
    assert_eq!(after["id"], vm["id"]);
    assert_eq!(client.run("again", "echo up").stdout, "up\n");
    ends_its_machine(&mut client, "again", "poweroff");
    client.wait_for_state("again", "stopped");
}

/// The agent does not see what the image's own init was asked to do; the end of the machine shows it.
#[test]
fn a_guest_with_an_init_of_its_own_reboots_and_powers_off() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "own", "from": "busybox", "init": "system" }));
    ends_its_machine(&mut client, "own", "busybox reboot");
    client.wait_for("own", "another boot", |now| now["state"] == "ready" && now["boot_id"] != vm["boot_id"]);
    assert_eq!(client.run("own", "echo up").stdout, "up\n");
    ends_its_machine(&mut client, "own", "busybox poweroff");
    client.wait_for_state("own", "stopped");
}

#[test]
fn a_kernel_panic_is_a_crash_that_tells_why_and_a_killed_vmm_is_one() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.create(json!({ "name": "panics", "from": "busybox" }));
    ends_its_machine(&mut client, "panics", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger");
    let crashed = client.wait_for_state("panics", "crashed");
    let history = client.must("vm_history", json!({ "vm": "panics" }));
    let told = format!("{crashed}{history}");
    assert!(told.contains("sysrq") || told.contains("panic"), "{told}");
    // It can be started again.
    client.to_the_end("vm_start", json!({ "vm": "panics" }), nexus_tests::client::BOOT);
    let vm = client.wait_for_state("panics", "ready");
    kill_process(pid(&vm, "pid"));
    client.wait_for_state("panics", "crashed");
    let gone = until(Duration::from_mins(1), || (!is_alive(pid(&vm, "shim_pid"))).then_some(()));
    assert!(gone.is_some(), "the shim is left without its VMM");
}

#[test]
fn the_agent_is_killed_and_comes_back_and_the_shim_takes_its_vmm_along() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "agentless", "from": "busybox" }));
    let agents = "cat /proc/1/comm; grep -l nexus-guest /proc/[0-9]*/comm";
    let before = client.run("agentless", agents).stdout;
    // Another process holds the commands, so they continue.
    let line = json!({ "vm": "agentless", "command": "echo begun; sleep 2; echo went on" });
    let started = client.call_whole("guest_command_start", line).expect("it starts");
    let killed = r#"for p in /proc/[0-9]*; do grep -q nexus-guest $p/comm && kill -9 ${p#/proc/}; done"#;
    ends_its_machine(&mut client, "agentless", killed);
    let back = until(nexus_tests::client::BOOT, || {
        client.call_whole("guest_run_command", json!({ "vm": "agentless", "command": "echo back" })).ok()
    });
    assert!(back.is_some(), "no agent: {}", client.inspect("agentless"));
    assert_eq!(client.inspect("agentless")["boot_id"], vm["boot_id"]);
    let after = client.run("agentless", agents).stdout;
    let ours = |said: &str| said.starts_with("init\n/proc/") && said.lines().count() == 2;
    assert!(ours(&before) && ours(&after), "PID 1 is the init, and there is one agent: {before}{after}");
    assert_ne!(before, after, "nothing was killed");
    let id = &started["_meta"]["dev.nexus/result"]["command_id"];
    let ended = until(Duration::from_mins(1), || {
        let read = json!({ "vm": "agentless", "id": id, "wait_ms": 5000 });
        let result = client.call_whole("guest_command_output", read).expect("it is found again");
        (result["_meta"]["dev.nexus/result"]["status"] == 0).then_some(result)
    });
    assert_eq!(nexus_tests::client::stream(&ended.expect("it ends"), "stdout"), "begun\nwent on\n");

    kill_process(pid(&vm, "shim_pid"));
    client.wait_for_state("agentless", "crashed");
    let gone = until(Duration::from_mins(1), || (!is_alive(pid(&vm, "pid"))).then_some(()));
    assert!(gone.is_some(), "the VMM outlives its shim");
}

#[test]
fn stop_is_forced_and_repeated() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "forced", "from": "busybox" }));
    client.to_the_end("vm_stop", json!({ "vm": "forced", "force": true }), Duration::from_mins(1));
    client.wait_for_state("forced", "stopped");
    assert!(!is_alive(pid(&vm, "pid")) && !is_alive(pid(&vm, "shim_pid")));
    // Stopping a stopped VM changes nothing and returns its state.
    let again = client.must("vm_stop", json!({ "vm": "forced" }));
    assert_eq!(
        (&again["done"], &again["progress"]["step"], &again["result"]["state"]),
        (&json!(true), &json!("nothing to do"), &json!("stopped")),
        "{again}"
    );
}
