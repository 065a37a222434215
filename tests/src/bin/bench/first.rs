//! From `vm_create` to the first command's result through MCP, by the method of ComputeSDK's benchmark: one after the other, a burst of ten at
//! once, and ten that begin 200 ms apart. Deleting is not part of the time. Cold; with `--warm` they go on from a machine that was booted before.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::daemon::Daemon;
use serde_json::{Value, json};

use super::Options;
use super::checkpoints::warm;
use super::samples::{Samples, show};
use super::table::Table;

/// How many VMs one after the other.
const SEQUENTIAL: usize = 100;
/// How many at once.
const TOGETHER: usize = 10;
/// How often that is done.
const ROUNDS: usize = 3;
/// The time between two that begin one after the other.
const STAGGER: Duration = Duration::from_millis(200);

pub(crate) fn measure(options: &Options) -> Table {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    if options.warm {
        warm::prepare(&daemon, arguments("seed", true));
        delete(&mut client, "seed");
    }
    // The first one warms the page cache.
    one(&mut client, "before", options.warm).expect("a VM runs a command");
    client.must("vm_delete", json!({ "vm": "before", "force": true }));

    let how = if options.warm { "warm" } else { "cold" };
    let mut table = Table::new(format!(
        "`vm_create` to the first command's result through MCP, {how}, TCG, busybox (p50 / p95, p99)"
    ));
    let times = options.times(SEQUENTIAL);
    let mut sequential = Vec::new();
    for at in 0..times {
        let name = format!("first-{at}");
        let took = one(&mut client, &name, options.warm);
        sequential.push(took.filter(|_| is_as_meant(&mut client, &name, options.warm)));
        delete(&mut client, &name);
    }
    let rounds = options.times(ROUNDS);
    let burst = (0..rounds).flat_map(|_| together(&daemon, Duration::ZERO, options.warm)).collect::<Vec<_>>();
    let staggered = (0..rounds).flat_map(|_| together(&daemon, STAGGER, options.warm)).collect::<Vec<_>>();
    let goal = if options.warm { "all succeed, warm" } else { "all succeed" };
    let mut told = |what: String, outcomes: &[Option<Duration>], base: Option<Duration>| {
        let samples: Samples = outcomes.iter().flatten().copied().collect();
        let succeeded = outcomes.iter().flatten().count();
        assert!(succeeded > 0, "{what}: not one succeeded");
        let ratio = base.map(|base| samples.p50().as_secs_f64() / base.as_secs_f64());
        table.judged(
            what,
            format!("{}, {}", samples.pair(0.5, 0.95), show(samples.quantile(0.99))),
            base.map(show).unwrap_or_default(),
            ratio.map(|ratio| format!("{ratio:.2} x")).unwrap_or_default(),
            (goal, succeeded == outcomes.len()),
        );
        samples.p50()
    };
    let base = told(format!("{times} one after the other"), &sequential, None);
    told(format!("{TOGETHER} at once, {rounds} times"), &burst, Some(base));
    told(format!("{TOGETHER}, 200 ms apart, {rounds} times"), &staggered, Some(base));
    table.note(
        "Each VM is new: the time is that from the call of `vm_create` on a stream that is open already to the result of `echo benchmark`. \
         The yardstick of the last two is the first.",
    );
    table
}

/// The arguments for a VM, cold or warm.
fn arguments(name: &str, is_warm: bool) -> Value {
    let mut arguments = json!({ "name": name, "from": "busybox", "memory": "128MiB" });
    if is_warm {
        arguments["checkpoints"] = true.into();
    }
    arguments
}

/// Whether a VM that was to start warm did.
fn is_as_meant(client: &mut Client, name: &str, is_warm: bool) -> bool {
    !is_warm || warm::is_warm(client, name)
}

/// Creates a VM and runs its first command; how long that took, if it worked.
fn one(client: &mut Client, name: &str, is_warm: bool) -> Option<Duration> {
    let arguments = arguments(name, is_warm);
    let start = Instant::now();
    let mut outcome = client.call("vm_create", arguments).ok()?;
    while outcome["done"] != true {
        outcome = client.call("op_get", json!({ "op_id": outcome["op_id"] })).ok()?;
    }
    let ran =
        client.call_whole("guest_run_command", json!({ "vm": name, "command": "echo benchmark" })).ok()?;
    let took = start.elapsed();
    let facts: &Value = &ran["_meta"]["dev.nexus/result"];
    (outcome["state"] == "succeeded" && facts["exit_code"] == 0).then_some(took)
}

/// One that could not be created is not there.
fn delete(client: &mut Client, name: &str) {
    let _gone = client.call("vm_delete", json!({ "vm": name, "force": true }));
}

/// The same for several, each with a client of its own, which begin so long after one another.
fn together(daemon: &Daemon, stagger: Duration, is_warm: bool) -> Vec<Option<Duration>> {
    let barrier = Arc::new(Barrier::new(TOGETHER));
    let runs: Vec<_> = (0..TOGETHER)
        .map(|at| {
            let (mut client, barrier) = (daemon.client(), Arc::clone(&barrier));
            let name = format!("together-{at}");
            thread::spawn(move || {
                barrier.wait();
                thread::park_timeout(stagger * u32::try_from(at).expect("few"));
                let took = one(&mut client, &name, is_warm);
                // Looking and deleting begin when nobody is measured any more.
                barrier.wait();
                let took = took.filter(|_| is_as_meant(&mut client, &name, is_warm));
                delete(&mut client, &name);
                took
            })
        })
        .collect();
    runs.into_iter().map(|run| run.join().expect("no panic")).collect()
}
