//! Guests that send nothing, garbage, or endless data: each harms only its own VM, and the daemon stays small.

use std::fs;
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::signal;
use rustix::process::Signal;
use serde_json::json;

use crate::world::{SOON, World, is_alive, process, refused, soon};

/// The memory limit of a daemon while its guests flood it, in KiB.
const MEMORY_MAX: u64 = 160 << 10;

fn call(
    client: &mut Client,
    vm: &str,
    path: &str,
) -> Result<serde_json::Value, nexus_tests::client::Failure> {
    client.call_whole("guest_file_read", json!({ "vm": vm, "path": path }))
}

/// The peak memory of the daemon, in KiB.
fn peak(world: &World) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", world.daemon.pid())).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn guests_that_do_not_come_up_fail_in_time_and_say_why() {
    let limit = "NEXUS_BOOT_TIMEOUT_TCG_S";
    let mut world = World::hostile(&[(limit, "2")]);
    let fails = |world: &World, name: &str, told: &str| {
        let mut client = world.client();
        let failure = world.create_in_vain(&mut client, name);
        assert_eq!(failure.code, "boot_failed", "{name}: {}", failure.text);
        assert!(failure.text.contains(told), "{name}: {}", failure.text);
        let vm = client.inspect(name);
        assert_eq!(vm["state"], "failed", "{vm}");
        assert!(vm["reason"].to_string().contains(told), "{vm}");
        assert!(vm["process"].is_null(), "{vm}");
    };
    for (name, told) in
        [("silent-1", "no hello from the guest in 2 s"), ("babbles-1", "hello"), ("endless-hello-1", "hello")]
    {
        fails(&world, name, told);
    }
    assert!(peak(&world) < MEMORY_MAX, "the daemon took {} KiB", peak(&world));
    // A guest that says hello needs enough time for it.
    world.daemon.stop();
    world.daemon.set(limit, Some("12"));
    world.daemon.restart();
    for (name, told) in [
        ("never-acks-1", "not ready in 12 s"),
        ("old-1", "protocol 0, older than 1"),
        ("new-1", "protocol 99, newer than 1"),
    ] {
        fails(&world, name, told);
    }
    let mut client = world.client();
    // However much a guest sends, the log stays readable.
    let complaints = world.daemon.log().matches("protocol violation by the guest").count();
    assert!(complaints <= 20, "{complaints} lines of complaints");
    // The VMs stay, so that they can be inspected and started again; the daemon is not affected.
    world.create(&mut client, "good-1");
    call(&mut client, "good-1", "/x").expect("a good guest answers");
    assert!(peak(&world) < MEMORY_MAX, "the daemon took {} KiB", peak(&world));
    world.assert_in_order();
}

#[test]
fn a_guest_that_speaks_while_the_daemon_stands_still_is_heard() {
    let limit = Duration::from_secs(5);
    let world = World::hostile(&[("NEXUS_BOOT_TIMEOUT_TCG_S", "5")]);
    let mut client = world.client();
    let mut arguments = world.arguments("patient-1");
    arguments["wait_s"] = 0.into();
    let begun = client.must("vm_create", arguments);
    client.wait_for_state("patient-1", "starting");
    let directory = world.daemon.state().join("vms").join(begun["subject_id"].as_str().expect("an id"));
    let held = directory.join("held");
    soon("the guest", || held.exists().then_some(()));
    signal(world.daemon.pid(), Signal::STOP);
    fs::remove_file(held).expect("the guest is told");
    #[expect(clippy::disallowed_methods, reason = "that nothing goes on for so long is what is tested")]
    std::thread::sleep(limit + Duration::from_secs(3));
    signal(world.daemon.pid(), Signal::CONT);
    let ended = client.must("op_get", json!({ "op_id": begun["op_id"], "wait_s": 45 }));
    assert_eq!((&ended["done"], &ended["state"]), (&json!(true), &json!("succeeded")), "{ended}");
    assert_eq!(client.inspect("patient-1")["state"], "ready");
    call(&mut client, "patient-1", "/x").expect("it answers");
    world.assert_in_order();
}

#[test]
fn an_end_before_the_hello_carries_the_console() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let failure = world.create_in_vain(&mut client, "panics-1");
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    for line in ["Unable to mount the moon", "Kernel panic - not syncing: made up", "vm_logs"] {
        assert!(failure.text.contains(line), "{}", failure.text);
    }
    assert!(client.inspect("panics-1")["reason"].to_string().contains("Kernel panic"));
    let history = client.must("vm_history", json!({ "vm": "panics-1" }));
    assert!(history["transitions"][0]["reason"].to_string().contains("Kernel panic"), "{history}");
    world.assert_in_order();
}

#[test]
fn a_vmm_that_exits_at_once_is_told_with_its_last_words() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let failure = world.create_in_vain(&mut client, "exits-1");
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    for told in ["exited with status 3", "the flux capacitor is missing"] {
        assert!(failure.text.contains(told), "{}", failure.text);
    }
    assert_eq!(client.inspect("exits-1")["state"], "failed");
    // Another start fails again; after deletion it is gone.
    assert_eq!(refused(&mut client, "vm_start", json!({ "vm": "exits-1" })).code, "boot_failed");
    client.must("vm_delete", json!({ "vm": "exits-1" }));
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    world.assert_in_order();

    let world = World::program("#!/nonexistent/interpreter\n");
    let failure = world.create_in_vain(&mut world.client(), "none");
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    assert!(failure.text.contains("No such file"), "{}", failure.text);
    world.assert_in_order();
}

#[test]
fn answers_that_are_none_fail_their_call_alone() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    for (name, code) in
        [("garbage-1", "guest_unreachable"), ("huge-1", "too_large"), ("endless-1", "too_large")]
    {
        world.create(&mut client, name);
        let failure = call(&mut client, name, "/x").expect_err("no answer");
        assert_eq!(failure.code, code, "{name}: {}", failure.text);
        assert!(failure.text.len() < 4096, "{name} is quoted at length: {}", failure.text);
        // The link is re-established, and the next call is answered.
        let answered = soon("the link to come back", || call(&mut client, name, "/well-behaved").ok());
        assert_eq!(answered["content"][0]["text"], "well");
        client.wait_for_state(name, "ready");
    }
    assert!(peak(&world) < MEMORY_MAX, "the daemon took {} KiB", peak(&world));
    world.assert_in_order();
}

#[test]
fn a_result_of_the_wrong_shape_is_not_passed_on() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    world.create(&mut client, "liar-1");
    let failure = call(&mut client, "liar-1", "/x").expect_err("that is no result");
    assert_eq!(failure.code, "guest_misbehaved", "{}", failure.text);
    assert!(!failure.text.contains("another"), "{}", failure.text);
    call(&mut client, "liar-1", "/well-behaved").expect("a good answer passes");
    world.assert_in_order();
}

#[test]
fn a_guest_that_says_bye_and_stays_has_its_power_cut() {
    // A machine that reports that it has halted is killed at once; one that reports nothing is killed after four times
    // the stop timeout.
    for (name, limit) in [("lingers-1", "1"), ("halts-1", "900")] {
        let world = World::hostile(&[("NEXUS_STOP_TIMEOUT_S", limit)]);
        let mut client = world.client();
        let vm = world.create(&mut client, name);
        let failure = call(&mut client, name, "/x").expect_err("no answer");
        assert!(["vm_gone", "guest_unreachable"].contains(&&*failure.code), "{}", failure.text);
        client.wait_for_state(name, "stopped");
        assert!(!is_alive(process(&vm, "pid")));
        let history = client.must("vm_history", json!({ "vm": name }));
        assert!(history["transitions"][0]["reason"].to_string().contains("powered off"), "{history}");
        world.assert_in_order();
        client.to_the_end("vm_start", json!({ "vm": name }), SOON);
        call(&mut client, name, "/well-behaved").expect("it answers again");
    }
}

#[test]
fn a_wrong_guess_of_an_agent_costs_no_machine() {
    let world = World::hostile(&[("NEXUS_STOP_TIMEOUT_S", "1")]);
    let mut client = world.client();
    let vm = world.create(&mut client, "guesses-1");
    let mut other = world.client();
    let call = std::thread::spawn(move || call(&mut other, "guesses-1", "/x"));
    let unreachable = client.wait_for_state("guesses-1", "unreachable");
    assert!(unreachable["reason"].to_string().contains("but the guest still runs"), "{unreachable}");
    assert!(is_alive(process(&vm, "pid")), "its power was cut");
    client.must("vm_delete", json!({ "vm": "guesses-1", "force": true }));
    call.join().expect("an answer").expect_err("its machine is gone");
    world.assert_in_order();
}

#[test]
fn a_vm_that_ends_takes_its_calls_along() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    for (name, state) in [("dies-1", "crashed"), ("leaves-1", "stopped")] {
        world.create(&mut client, name);
        let failure = call(&mut client, name, "/x").expect_err("no answer");
        assert!(["vm_gone", "guest_unreachable"].contains(&&*failure.code), "{name}: {}", failure.text);
        client.wait_for_state(name, state);
        let failure = call(&mut client, name, "/x").expect_err("no VM");
        assert_eq!(failure.code, "vm_not_running", "{name}: {}", failure.text);
        world.assert_in_order();
        client.to_the_end("vm_start", json!({ "vm": name }), SOON);
        call(&mut client, name, "/well-behaved").expect("it answers again");
    }
    world.assert_in_order();
}
