//! VMs that sleep: how soon the first call wakes one, and what many of them cost the daemon.

use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use serde_json::json;

use super::{answers, saved, take};
use crate::Options;
use crate::memory::settled;
use crate::samples::{Samples, show};
use crate::table::Table;

/// How many VMs are suspended.
const ASLEEP: usize = 50;
/// How much longer a wake may take than a restore.
const WAKE_MORE: Duration = Duration::from_millis(20);
/// What the suspended VMs may cost the daemon, in MiB.
const ASLEEP_GOAL: f64 = 5.0;

/// Suspends a VM. Returns how long the command takes that wakes it.
pub(super) fn wake(client: &mut Client, vm: &str) -> Duration {
    suspend(client, vm);
    let start = Instant::now();
    let ran = client.call_whole("guest_run_command", json!({ "vm": vm, "argv": ["true"] }));
    let took = start.elapsed();
    let ran = ran.unwrap_or_else(|e| panic!("the command that wakes {vm}: {}", e.text));
    assert_eq!(ran["_meta"]["dev.nexus/vm"]["woken"], true, "{ran}");
    took
}

fn suspend(client: &mut Client, vm: &str) {
    let slept = client.must("vm_pause", json!({ "vm": vm, "suspend": true }));
    assert_eq!(slept["state"], "suspended", "{slept}");
}

/// Judges wakes next to restores of the same run.
pub(super) fn judge(woken: &Samples, restored: &Samples, table: &mut Table) {
    let (ours, theirs) = (woken.p50(), restored.p50());
    let compared = match ours.checked_sub(theirs) {
        Some(more) => format!("+{}", show(more)),
        None => format!("-{}", show(theirs.saturating_sub(ours))),
    };
    table.judged(
        "the first command of a suspended VM, which wakes it, next to `vm_fork` of one and its first command",
        woken.pair(0.5, 0.95),
        restored.pair(0.5, 0.95),
        compared,
        ("≤ 20 ms on top", ours <= theirs + WAKE_MORE),
    );
}

/// What suspended VMs cost a daemon that has done nothing else before.
pub(super) fn many(options: &Options, table: &mut Table) {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.create(saved("base"));
    answers(&mut client, "base");
    take(&mut client, "base", "ready");
    // The first one makes what the daemon needs for any number of them.
    fall_asleep(&mut client, "first");
    let before = settled(daemon.pid());
    let count = options.times(ASLEEP);
    for at in 0..count {
        fall_asleep(&mut client, &format!("asleep-{at}"));
    }
    let after = settled(daemon.pid());
    let more = after - before;
    table.judged(
        format!("nexusd, resident, with {count} more suspended VMs, next to one without them"),
        format!("{after:.1} MiB"),
        format!("{before:.1} MiB"),
        format!("{more:+.1} MiB"),
        ("< 5 MiB on top", more < ASLEEP_GOAL),
    );
}

/// Forks a VM, and suspends it after its first command.
fn fall_asleep(client: &mut Client, name: &str) {
    let fork = json!({ "checkpoint": "ready", "names": [name], "wait_s": 45 });
    client.to_the_end("vm_fork", fork, BOOT);
    answers(client, name);
    suspend(client, name);
}
