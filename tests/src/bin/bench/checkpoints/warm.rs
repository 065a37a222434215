//! New VMs that go on from a machine that was booted before them, and from one that waits for them in memory, next to cold ones.

use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::wait::until;
use serde_json::{Value, json};

use super::{answers, delete, saved};
use crate::Options;
use crate::material::ratio;
use crate::samples::Samples;
use crate::table::Table;

const GOAL: f64 = 0.15;
/// The value of the setting `warm_pool`: one machine waits.
const POOL: &str = r#"{"busybox": 1}"#;

/// Has VMs start warm, and waits until a machine is prepared for those like this one, which is created.
pub(crate) fn prepare(daemon: &Daemon, like: Value) {
    let mut client = daemon.client();
    client.must("settings_set", json!({ "values": { "default.warm_start": "true" } }));
    client.create(like);
    let prepared = daemon.state().join("prepared");
    let found = until(BOOT, || {
        let mut entries = std::fs::read_dir(&prepared).ok()?.flatten();
        entries.any(|entry| entry.path().extension().is_none()).then_some(())
    });
    assert!(found.is_some(), "no machine is prepared\n{}", daemon.log());
}

/// Whether a VM started warm.
pub(crate) fn is_warm(client: &mut Client, vm: &str) -> bool {
    history(client, vm).contains("warm start: guest agent ready")
}

fn history(client: &mut Client, vm: &str) -> String {
    client.must("vm_history", json!({ "vm": vm, "limit": 20 })).to_string()
}

/// Both kinds of warm starts, next to the cold ones of before.
pub(super) fn measure(daemon: &Daemon, options: &Options, table: &mut Table, cold: &Samples) {
    prepare(daemon, saved("seed"));
    let mut judge = |what: &str, took: &Samples| {
        let times = ratio(took.p50(), cold.p50());
        table.judged(
            format!("`vm_create` with {what} and its first command, {} runs", options.boots()),
            took.pair(0.5, 0.95),
            cold.pair(0.5, 0.95),
            format!("{times:.3} x"),
            ("≤ 0.15 x", times <= GOAL),
        );
    };
    judge("a warm start", &prepared(daemon, options));
    judge("a machine that waited (`warm_pool`)", &pooled(daemon, options));
}

/// VMs that go on from the prepared machine.
fn prepared(daemon: &Daemon, options: &Options) -> Samples {
    let mut client = daemon.client();
    let mut took = Samples::default();
    // The first run warms the page cache.
    for run in 0..=options.boots() {
        let this = one(&mut client, "warm");
        if run > 0 {
            took.add(this);
        }
        delete(&mut client, "warm");
    }
    took
}

/// VMs that go on from machines that waited for them, each of which was there before its VM was created.
fn pooled(daemon: &Daemon, options: &Options) -> Samples {
    let (mut client, mut other) = (daemon.client(), daemon.client());
    let mut set = |values: Value| drop(other.must("settings_set", json!({ "values": values })));
    set(json!({ "default.memory": "128MiB", "warm_pool": POOL }));
    let mut took = Samples::default();
    for run in 0..=options.boots() {
        let is_there = || daemon.log().matches("a machine waits for a new vm").count() > run;
        let waits = until(BOOT, || is_there().then_some(()));
        assert!(waits.is_some(), "no machine waits\n{}", daemon.log());
        let this = one(&mut client, "pooled");
        if run > 0 {
            took.add(this);
        }
        let told = history(&mut client, "pooled");
        assert!(told.contains("from a machine that waited"), "{told}");
        delete(&mut client, "pooled");
        // So that the next one is restored now, and not within half a minute.
        set(json!({ "warm_pool": POOL }));
    }
    set(json!({ "warm_pool": "" }));
    took
}

/// How long it takes to create a VM and run its first command.
fn one(client: &mut Client, name: &str) -> Duration {
    let start = Instant::now();
    client.create(saved(name));
    answers(client, name);
    let took = start.elapsed();
    assert!(is_warm(client, name), "{}", history(client, name));
    took
}
