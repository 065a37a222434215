//! Guests that do not come up because of the emulator under them: their kernel says that it has lost its timer, or it crashes.

use std::path::Path;

use serde_json::{Value, json};

use crate::kills::kill_at;
use crate::world::{SOON, World};

/// A program for a machine: the first `losses` times a kernel without a timer, then the real guest.
fn program(guest: &Path, losses: u32) -> String {
    failing(guest, losses, "APIC frequency too slow, disabling apic timer", "exec sleep 1000")
}

/// A program for a machine: the first `losses` times a kernel that says `words` and does `then`, then the real guest.
fn failing(guest: &Path, losses: u32, words: &str, then: &str) -> String {
    std::fs::write(guest, nexus_host::daemon::AGENT).expect("the guest is written");
    std::process::Command::new("chmod").arg("755").arg(guest).status().expect("chmod runs");
    // The driver considers the machine as running once its socket exists.
    format!(
        "#!/bin/sh\n\
         echo x >> tries\n\
         if [ $(wc -l < tries) -le {losses} ]; then\n\
         \techo '[    0.188805] {words}'\n\
         \t: > v.sock\n\
         \t{then}\n\
         fi\n\
         exec '{}' \"$@\"\n",
        guest.display()
    )
}

fn transitions(history: &Value) -> Vec<String> {
    let lines = history["transitions"].as_array().expect("a history");
    lines.iter().map(|line| format!("{} {}", line["to"], line["reason"])).collect()
}

#[test]
fn a_guest_that_lost_its_timer_is_started_once_more() {
    let things = tempfile::tempdir().expect("a directory");
    let world = World::program(&program(&things.path().join("nexus-guest"), 1));
    let mut client = world.client();
    let vm = world.create(&mut client, "busy");
    assert_eq!(vm["state"], "ready", "{vm}");
    assert_eq!(client.run("busy", "echo up").stdout, "up\n");
    let told = transitions(&client.must("vm_history", json!({ "vm": "busy" })));
    assert_eq!(told.iter().filter(|line| line.contains("the guest lost its timer")).count(), 1, "{told:?}");
    world.assert_in_order();
}

#[test]
fn a_daemon_that_ends_before_it_starts_such_a_guest_once_more_says_that_it_failed() {
    let things = tempfile::tempdir().expect("a directory");
    let mut world = World::program(&program(&things.path().join("nexus-guest"), 1));
    let arguments = world.arguments("busy");
    let mut client = kill_at(&mut world, "timer-lost-killed", "vm_create", &arguments);
    let vm = client.wait_for_state("busy", "failed");
    assert!(vm["reason"].is_string(), "{vm}");
    world.assert_in_order();
    client.to_the_end("vm_start", json!({ "vm": "busy" }), SOON);
    assert_eq!(client.run("busy", "echo up").stdout, "up\n");
    world.assert_in_order();
}

#[test]
fn a_guest_that_loses_its_timer_again_has_its_time_and_fails() {
    let things = tempfile::tempdir().expect("a directory");
    let text = program(&things.path().join("nexus-guest"), 2);
    let mut world = World::program(&text);
    world.daemon.stop();
    world.daemon.set("NEXUS_BOOT_TIMEOUT_TCG_S", Some("15"));
    world.daemon.restart();
    let mut client = world.client();
    let failure = world.create_in_vain(&mut client, "unlucky");
    assert!(failure.text.contains("no hello from the guest in 15 s"), "{}", failure.text);
    assert!(failure.text.contains("APIC frequency too slow"), "{}", failure.text);
    // A start on request resets the number of attempts.
    client.to_the_end("vm_start", json!({ "vm": "unlucky" }), SOON);
    assert_eq!(client.run("unlucky", "echo up").stdout, "up\n");
    world.assert_in_order();
}

#[test]
fn a_guest_whose_kernel_crashes_while_it_boots_is_started_once_more() {
    let things = tempfile::tempdir().expect("a directory");
    let guest = |name: &str| things.path().join(name);
    let crash = "Kernel panic - not syncing: Fatal exception in interrupt";
    let world = World::program(&failing(&guest("once"), 1, crash, "exec sleep 1"));
    let mut client = world.client();
    let vm = world.create(&mut client, "crashing");
    assert_eq!(vm["state"], "ready", "{vm}");
    assert_eq!(client.run("crashing", "echo up").stdout, "up\n");
    let told = transitions(&client.must("vm_history", json!({ "vm": "crashing" })));
    assert_eq!(told.iter().filter(|line| line.contains("kernel crashed")).count(), 1, "{told:?}");
    world.assert_in_order();

    // Twice is no accident any more, and neither is what an image lacks.
    let lacking = "Kernel panic - not syncing: No working init found.";
    for (name, losses, words) in [("twice", 2, crash), ("lacking", 1, lacking)] {
        let world = World::program(&failing(&guest(name), losses, words, "exec sleep 1"));
        let mut client = world.client();
        let failure = world.create_in_vain(&mut client, "broken");
        assert!(failure.text.contains(words), "{}", failure.text);
        world.assert_in_order();
    }
}
