//! Shims that do not answer: stopped by SIGSTOP while the daemon is restarted. Nothing is killed because of that.

use std::time::{Duration, Instant};

use nexus_tests::daemon::signal;
use nexus_tests::wait::stay;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::world::{World, is_alive, process, refused, soon};

/// Longer than any wait for a shim.
const LONG: Duration = Duration::from_secs(13);

/// The reasons in a VM's history, newest first.
fn reasons(world: &World, vm: &str) -> Vec<String> {
    let history = world.client().must("vm_history", json!({ "vm": vm }));
    let transitions = history["transitions"].as_array().expect("a history");
    transitions.iter().map(|line| line["reason"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn vms_whose_shims_are_slow_at_a_restart_are_unreachable_and_come_back() {
    let mut world = World::new();
    let mut client = world.client();
    let names = ["slow-1", "slow-2", "slow-3", "slow-4", "slow-5", "fine"];
    let vms: Vec<Value> = names.iter().map(|name| world.create(&mut client, name)).collect();
    drop(client);
    let (slow, fine) = vms.split_at(5);
    for vm in slow {
        signal(process(vm, "shim_pid"), Signal::STOP);
    }
    world.daemon.kill();
    let started = Instant::now();
    world.daemon.restart();
    // One after another they would take five times three seconds.
    assert!(started.elapsed() < Duration::from_secs(12), "they are waited for side by side");
    let mut client = world.client();
    assert_eq!(client.run("fine", "echo fine").stdout, "fine\n");
    stay(LONG.saturating_sub(started.elapsed()));
    for vm in slow {
        let name = vm["name"].as_str().expect("a name");
        let seen = client.inspect(name);
        assert_eq!(seen["state"], "unreachable", "{seen}");
        let reason =
            format!("its shim (process {}) is running but has not answered", vm["process"]["shim_pid"]);
        assert!(seen["reason"].as_str().is_some_and(|told| told.starts_with(&reason)), "{seen}");
        assert!(reasons(&world, name)[0].starts_with(&reason));
        for pid in ["pid", "shim_pid"] {
            assert_eq!(seen["process"][pid], vm["process"][pid], "it runs on");
        }
        let failure = refused(&mut client, "guest_os_info", json!({ "vm": name }));
        assert_eq!(failure.code, "guest_unreachable", "{}", failure.text);
        assert!(failure.text.contains(&reason), "{}", failure.text);
    }
    for vm in slow {
        signal(process(vm, "shim_pid"), Signal::CONT);
    }
    for vm in &vms {
        let name = vm["name"].as_str().expect("a name");
        let ready = client.wait_for_state(name, "ready");
        let same = |vm: &Value| (vm["boot_id"].clone(), process(vm, "pid"), process(vm, "shim_pid"));
        assert_eq!(same(&ready), same(vm), "it is the same machine");
        assert_eq!(client.run(name, "echo up").stdout, "up\n");
        assert!(reasons(&world, name).iter().all(|reason| !reason.contains("lost")));
    }
    assert!(reasons(&world, "slow-1").iter().any(|reason| reason == "its shim answers again"));
    assert!(reasons(&world, "fine").iter().all(|reason| !reason.contains("shim")), "{fine:?}");
    world.assert_in_order();
}

#[test]
fn a_vm_whose_shim_never_answers_again_can_be_stopped_and_deleted() {
    let mut world = World::new();
    let mut client = world.client();
    let vms = ["to-stop", "to-delete", "to-die"].map(|name| world.create(&mut client, name));
    drop(client);
    for vm in &vms {
        signal(process(vm, "shim_pid"), Signal::STOP);
    }
    world.daemon.kill();
    world.daemon.restart();
    let mut client = world.client();
    client.wait_for_state("to-stop", "unreachable");
    client.must("vm_stop", json!({ "vm": "to-stop", "force": true, "wait_s": 45 }));
    client.wait_for_state("to-stop", "stopped");
    client.must("vm_delete", json!({ "vm": "to-delete", "force": true }));
    // If a shim ends in this state, the reason is reported correctly.
    nexus_tests::daemon::kill_process(process(&vms[2], "shim_pid"));
    let crashed = client.wait_for_state("to-die", "crashed");
    assert!(!crashed["reason"].to_string().contains("while nexusd was down"), "{crashed}");
    for vm in &vms {
        for which in ["pid", "shim_pid"] {
            soon("the end of its processes", || (!is_alive(process(vm, which))).then_some(()));
        }
    }
    world.assert_in_order();
}

#[test]
fn a_start_that_is_under_way_waits_for_a_slow_shim_too() {
    let mut world = World::hostile(&[("NEXUS_BOOT_TIMEOUT_TCG_S", "5"), ("NEXUS_BOOT_TIMEOUT_S", "5")]);
    let mut client = world.client();
    let mut arguments = world.arguments("silent-1");
    arguments["wait_s"] = 0.into();
    client.must("vm_create", arguments);
    let vm = soon("its processes", || {
        client.call("vm_inspect", json!({ "vm": "silent-1" })).ok().filter(|vm| vm["process"].is_object())
    });
    drop(client);
    signal(process(&vm, "shim_pid"), Signal::STOP);
    world.daemon.kill();
    world.daemon.restart();
    stay(LONG);
    let mut client = world.client();
    let seen = client.inspect("silent-1");
    assert_eq!(seen["state"], "starting", "its time does not run out meanwhile: {seen}");
    assert!(seen["reason"].to_string().contains("has not answered"), "{seen}");
    // Its timeout starts when the shim answers.
    signal(process(&vm, "shim_pid"), Signal::CONT);
    let failed = client.wait_for_state("silent-1", "failed");
    assert!(failed["reason"].to_string().contains("no hello from the guest in 5 s"), "{failed}");
    assert_eq!(failed["boot_id"], vm["boot_id"]);
    world.assert_in_order();
}
