//! Checkpoints: restores, forks, rollbacks, wakes and warm starts next to a cold start of the same VM, the pause of a VM that is saved, what a restored VM
//! takes of the host's memory and suspended ones of the daemon's, a comparison, and the serial link of such VMs next to vsock.

mod asleep;
mod diff;
pub(crate) mod warm;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::{Daemon, program};
use serde_json::{Value, json};

use super::Options;
use super::material::ratio;
use super::memory::pss_kib;
use super::samples::{Samples, show, show_pair};
use super::table::Table;

/// How many VMs are forked at once.
const FORKS: usize = 10;
/// How many small calls each link answers.
const CALLS: usize = 500;
/// How many MiB each link carries in one piece.
const BULK: usize = 256;
/// How often it does.
const BULKS: usize = 5;

const RESTORE_GOAL: f64 = 0.10;
const FORK_GOAL: f64 = 0.5;
const ROLLBACK_GOAL: f64 = 1.5;
const PSS_GOAL: f64 = 0.35;
const CALL_GOAL: f64 = 1.0;
const BULK_GOAL: f64 = 0.6;
/// The pause that a checkpoint may take besides that for its memory.
const PAUSE: Duration = Duration::from_millis(30);

pub(crate) fn measure(options: &Options) -> Table {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let mut table =
        Table::new("Checkpoints, TCG, busybox with 128 MiB (p50 / p95); the yardstick is a cold `vm_create`");
    client.create(saved("base"));
    answers(&mut client, "base");
    take(&mut client, "base", "ready");
    let cold = restores(&mut client, options, &mut table);
    forks(&mut client, options, &mut table, cold.p50());
    pauses(&mut client, options, &mut table);
    diff::measure(&mut client, options, &mut table);
    client.create(json!({ "name": "plain", "from": "busybox", "memory": "128MiB" }));
    calls(&mut client, options, &mut table);
    bulk(&daemon, options, &mut table);
    warm::measure(&daemon, options, &mut table, &cold);
    drop(client);
    drop(daemon);
    asleep::many(options, &mut table);
    table.note(
        "A cold start and a fork are from the call to the first command's result, each VM deleted after it; a fork copies the drive, which takes \
         no time with reflinks, and a wake does not copy it. The pause is `pause_ms`, with the copies of the drives in it.",
    );
    table
}

/// The arguments for a VM that can be saved.
fn saved(name: &str) -> Value {
    json!({ "name": name, "from": "busybox", "driver": "qemu", "memory": "128MiB", "checkpoints": true })
}

/// Runs a command in a VM.
fn answers(client: &mut Client, vm: &str) {
    let ran = client.call_whole("guest_run_command", json!({ "vm": vm, "argv": ["true"] }));
    ran.unwrap_or_else(|e| panic!("a command in {vm}: {}", e.text));
}

fn delete(client: &mut Client, vm: &str) {
    client.must_confirmed("vm_delete", json!({ "vm": vm, "force": true }));
}

fn take(client: &mut Client, vm: &str, name: &str) -> Value {
    client.to_the_end("vm_checkpoint", json!({ "vm": vm, "name": name, "wait_s": 45 }), BOOT)
}

/// The memory of a VM's VMM and shim, in KiB.
fn pss(client: &mut Client, vm: &str) -> u64 {
    let details = client.inspect(vm);
    let of = |which: &str| pss_kib(details["process"][which].as_u64().expect("a running VM has it") as u32);
    of("pid") + of("shim_pid")
}

/// Restores next to cold starts, in turns; returns the cold starts.
fn restores(client: &mut Client, options: &Options, table: &mut Table) -> Samples {
    let (mut cold, mut restored, mut back) = (Samples::default(), Samples::default(), Samples::default());
    let (mut ready, mut woken) = (Samples::default(), Samples::default());
    let (mut own, mut childs) = (Vec::new(), Vec::new());
    // The first run of each warms the page cache.
    for run in 0..=options.boots() {
        let start = Instant::now();
        client.create(saved("cold"));
        answers(client, "cold");
        let cold_took = start.elapsed();
        let cold_pss = pss(client, "cold");
        delete(client, "cold");

        let start = Instant::now();
        let made = client.to_the_end(
            "vm_fork",
            json!({ "checkpoint": "ready", "names": ["child"], "wait_s": 45 }),
            BOOT,
        );
        answers(client, "child");
        let restore_took = start.elapsed();
        let child_pss = pss(client, "child");
        delete(client, "child");

        let wake_took = asleep::wake(client, "base");

        let arguments = json!({ "vm": "base", "checkpoint": "ready", "keep_current": false, "wait_s": 45 });
        let start = Instant::now();
        let rolled = client.must_confirmed("vm_rollback", arguments);
        assert_eq!(rolled["state"], "succeeded", "{rolled}");
        answers(client, "base");
        let back_took = start.elapsed();
        if run > 0 {
            cold.add(cold_took);
            restored.add(restore_took);
            woken.add(wake_took);
            back.add(back_took);
            ready.add(Duration::from_millis(made["vms"][0]["ready_ms"].as_u64().unwrap_or(0)));
            own.push(cold_pss);
            childs.push(child_pss);
        }
    }
    let times = ratio(restored.p50(), cold.p50());
    table.judged(
        format!("`vm_fork` of one from a checkpoint and its first command, {} runs", options.boots()),
        restored.pair(0.5, 0.95),
        cold.pair(0.5, 0.95),
        format!("{times:.3} x"),
        ("≤ 0.10 x", times <= RESTORE_GOAL),
    );
    table.told("- of that, from the start of its VMM until its tools work", ready.pair(0.5, 0.95), "", "");
    let times = ratio(back.p50(), restored.p50());
    table.judged(
        "`vm_rollback` without keeping the present and the first command, next to that",
        back.pair(0.5, 0.95),
        restored.pair(0.5, 0.95),
        format!("{times:.2} x"),
        ("≤ 1.5 x", times <= ROLLBACK_GOAL),
    );
    asleep::judge(&woken, &restored, table);
    let (own, childs) = (middle(&mut own), middle(&mut childs));
    let part = childs as f64 / own as f64;
    table.judged(
        "memory of a fork's VMM and shim (Pss) after its first command, next to a cold VM's",
        format!("{} MiB", childs >> 10),
        format!("{} MiB", own >> 10),
        format!("{part:.2} x"),
        ("≤ 0.35 x", part <= PSS_GOAL),
    );
    cold
}

fn middle(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Several forks at once, until all of them have run a command.
fn forks(client: &mut Client, options: &Options, table: &mut Table, cold: Duration) {
    let count = if options.quick { 3 } else { FORKS };
    let mut each = Samples::default();
    for _ in 0..options.times(10) {
        let fork = json!({ "checkpoint": "ready", "count": count, "tags": { "of": "bench" }, "wait_s": 45 });
        let start = Instant::now();
        let made = client.to_the_end("vm_fork", fork, BOOT);
        let vms = made["vms"].as_array().expect("VMs are made");
        for vm in vms {
            answers(client, vm["name"].as_str().expect("a VM has a name"));
        }
        each.add(start.elapsed() / u32::try_from(vms.len()).expect("few"));
        client.must_confirmed("vm_delete", json!({ "tags": { "of": "bench" }, "force": true }));
    }
    let times = ratio(each.p50(), cold);
    table.judged(
        format!("`vm_fork` of {count} at once, all of them with a first command, per VM"),
        each.pair(0.5, 0.95),
        show(cold),
        format!("{times:.3} x"),
        ("≤ 0.5 x", times <= FORK_GOAL),
    );
}

/// How long a VM stands still while it is saved.
fn pauses(client: &mut Client, options: &Options, table: &mut Table) {
    let (mut paused, mut allowed) = (Samples::default(), Samples::default());
    for run in 0..=options.boots() {
        let taken = take(client, "base", &format!("run-{run}"));
        let number = |key: &str| taken[key].as_u64().expect("a number");
        if run > 0 {
            paused.add(Duration::from_millis(number("pause_ms")));
            allowed.add(PAUSE + Duration::from_millis(number("memory_bytes") >> 20));
        }
        client.must_confirmed("checkpoint_delete", json!({ "checkpoint": taken["id"] }));
    }
    let times = ratio(paused.p50(), allowed.p50());
    table.judged(
        "pause of a VM by `vm_checkpoint`, next to 30 ms and 1 ms for each MiB that is written",
        paused.pair(0.5, 0.95),
        allowed.pair(0.5, 0.95),
        format!("{times:.2} x"),
        ("≤ 1 x", times <= 1.0),
    );
}

/// A small call over the serial link, next to one over vsock.
fn calls(client: &mut Client, options: &Options, table: &mut Table) {
    let mut call = |vm: &str| {
        let call = json!({ "name": "guest_file_stat", "arguments": { "vm": vm, "path": "/" } });
        let start = Instant::now();
        let answer = client.request("tools/call", &call).expect("it is answered");
        let took = start.elapsed();
        assert_ne!(answer["isError"], true, "{answer}");
        took
    };
    let (mut serial, mut vsock) = (Samples::default(), Samples::default());
    for run in 0..=options.times(CALLS) {
        let (ours, theirs) = (call("base"), call("plain"));
        if run > 0 {
            serial.add(ours);
            vsock.add(theirs);
        }
    }
    let times = ratio(serial.p50(), vsock.p50());
    table.judged(
        "a small call over the serial link, next to vsock (p50 / p99)",
        show_pair(serial.p50(), serial.quantile(0.99)),
        show_pair(vsock.p50(), vsock.quantile(0.99)),
        format!("{times:.2} x"),
        ("≤ 1.0 x", times <= CALL_GOAL),
    );
}

/// A command's output over the serial link, next to vsock.
fn bulk(daemon: &Daemon, options: &Options, table: &mut Table) {
    let bytes = options.times(BULK) << 20;
    let stream = |vm: &str| {
        let mut command = Command::new(program("nexusctl"));
        command.args(["exec", vm, "head", "-c", &bytes.to_string(), "/dev/zero"]).envs(daemon.environment());
        let start = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("nexusctl runs");
        let mut output = child.stdout.take().expect("its output");
        let (mut buffer, mut seen) = (vec![0; 256 << 10], 0);
        loop {
            match output.read(&mut buffer).expect("read from nexusctl") {
                0 => break,
                count => seen += count,
            }
        }
        let took = start.elapsed();
        assert!(child.wait().is_ok_and(|status| status.success()) && seen == bytes, "{seen} bytes came");
        took
    };
    let (mut serial, mut vsock) = (Samples::default(), Samples::default());
    for _ in 0..if options.quick { 2 } else { BULKS } {
        vsock.add(stream("plain"));
        serial.add(stream("base"));
    }
    let rate = |samples: &Samples| (bytes >> 20) as f64 / samples.p50().as_secs_f64();
    let (ours, theirs) = (rate(&serial), rate(&vsock));
    let part = ours / theirs;
    table.judged(
        format!("`exec`: {} MiB out over the serial link, next to vsock", bytes >> 20),
        format!("{ours:.0} MiB/s"),
        format!("{theirs:.0} MiB/s"),
        format!("{part:.2} x"),
        ("≥ 0.6 x", part >= BULK_GOAL),
    );
}
