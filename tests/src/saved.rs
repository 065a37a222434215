//! VMs that can be checkpointed: how tests make them, take them back, cut their daemon off, and keep them busy.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nexus_schema::Timestamp;
use serde_json::{Value, json};

use crate::client::{BOOT, Client, Failure};
use crate::daemon::{Daemon, program};
use crate::wait::until;

/// How far a guest's clock may be from the host's after a restore, in milliseconds.
const CLOCK_MAX: i64 = 50;
/// How long a busy stream may take to move on, and a command that stood still to go on.
const MOVES: Duration = Duration::from_mins(3);

/// Makes a VM that can be saved, from the `busybox` image, and waits until it is ready.
#[track_caller]
pub fn create(client: &mut Client, name: &str) -> Value {
    create_from(client, name, "busybox")
}

/// The same from another image.
#[track_caller]
pub fn create_from(client: &mut Client, name: &str, from: &str) -> Value {
    client.create(json!({
        "name": name, "from": from, "driver": "qemu", "checkpoints": true, "memory": "192MiB", "wait_s": 45
    }))
}

/// Takes a checkpoint of a VM; returns its details.
#[track_caller]
pub fn checkpoint(client: &mut Client, vm: &str, name: &str) -> Value {
    client.to_the_end("vm_checkpoint", json!({ "vm": vm, "name": name, "wait_s": 45 }), BOOT)
}

/// Calls a tool that starts long work, confirms it if that is asked for, and waits for its end. Returns the `result` of the outcome, or why
/// there is none.
pub fn outcome(client: &mut Client, tool: &str, arguments: Value) -> Result<Value, Failure> {
    let mut outcome = client.call_confirmed(tool, arguments)?;
    while outcome["done"] != true {
        outcome = client.call("op_get", json!({ "op_id": outcome["op_id"], "wait_s": 45 }))?;
    }
    match outcome["error"].is_null() {
        true => Ok(outcome["result"].take()),
        false => Err(Failure {
            code: outcome["error"]["code"].as_str().unwrap_or_default().to_owned(),
            text: outcome["error"].to_string(),
        }),
    }
}

/// Takes a VM back to one of its checkpoints without keeping its present; returns what became of it.
#[track_caller]
pub fn roll_back(client: &mut Client, vm: &str, checkpoint: &str) -> Value {
    let arguments = json!({ "vm": vm, "checkpoint": checkpoint, "keep_current": false, "wait_s": 45 });
    let restored = outcome(client, "vm_rollback", arguments);
    restored.unwrap_or_else(|e| panic!("{vm} to {checkpoint}: {}", e.text))["vms"][0].take()
}

/// The ids of all checkpoints that are listed.
#[track_caller]
pub fn listed(client: &mut Client) -> Vec<String> {
    let listed = client.must("checkpoint_list", json!({ "limit": 500 }));
    let rows = listed["checkpoints"].as_array().expect("a list");
    rows.iter().map(|row| row["id"].as_str().expect("an id").to_owned()).collect()
}

/// Deletes all checkpoints, and waits until nothing of them is left in the state directory.
#[track_caller]
pub fn delete_all(daemon: &Daemon, client: &mut Client) {
    for id in listed(client) {
        client.must_confirmed("checkpoint_delete", json!({ "checkpoint": id }));
    }
    assert_files(daemon, client);
}

/// Checks that the state directory has files of those checkpoints that are listed, and of no others.
#[track_caller]
pub fn assert_files(daemon: &Daemon, client: &mut Client) {
    let mut known = listed(client);
    known.sort();
    let mut files: Vec<String> = Vec::new();
    let are_same = until(Duration::from_mins(1), || {
        let entries = fs::read_dir(daemon.state().join("checkpoints")).expect("the directory").flatten();
        files = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        files.sort();
        (files == known).then_some(())
    });
    assert!(are_same.is_some(), "files of {files:?}, and {known:?} are listed\n{}", daemon.log());
}

/// Kills the daemon at a failpoint during a call, which is made once the VM `ready` is ready and is confirmed if that is asked for. Starts the
/// daemon again.
#[track_caller]
pub fn kill_at(daemon: &mut Daemon, point: &str, ready: &str, tool: &str, arguments: Value) -> Client {
    daemon.kill_at(point, |client| {
        client.wait_for_state(ready, "ready");
        call_in_vain(client, tool, arguments);
    })
}

/// Calls a tool of a daemon that is killed meanwhile. Whether it still answers does not matter.
fn call_in_vain(client: &mut Client, tool: &str, mut arguments: Value) {
    let mut call = |arguments: &Value| {
        client.request("tools/call", &json!({ "name": tool, "arguments": arguments })).ok()
    };
    let Some(answer) = call(&arguments) else { return };
    let text = answer["content"][0]["text"].as_str().unwrap_or_default();
    let token = text.split(r#""confirm":""#).nth(1).and_then(|rest| rest.split('"').next());
    if let Some(token) = token {
        arguments["confirm"] = token.into();
        call(&arguments);
    }
}

/// Starts a command in a VM that goes on counting for ever, in its memory.
#[track_caller]
pub fn count(client: &mut Client, vm: &str) {
    let line = "i=0; while true; do i=$((i+1)); echo $i > /run/new; mv /run/new /run/count; sleep 0.1; done";
    client.must("guest_command_start", json!({ "vm": vm, "command": line }));
    goes_on(client, vm);
}

/// Waits until the command of [`count`] gets on: it does not stand still any more.
#[track_caller]
pub fn goes_on(client: &mut Client, vm: &str) {
    let mut counted = || client.run(vm, "cat /run/count").stdout.trim().parse::<u64>().ok();
    let before = counted();
    let after = until(MOVES, || counted().filter(|now| Some(*now) > before));
    assert!(after.is_some(), "the command in {vm} stands still at {before:?}");
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_millis()).expect("a time of this century")
}

/// Compares the guest's clock with the host's, by the time of a file that it writes.
#[track_caller]
pub fn clock_is_right(client: &mut Client, vm: &str) {
    let before = now_ms();
    client.run(vm, "echo > /run/now");
    let after = now_ms();
    let stat = client.call_whole("guest_file_stat", json!({ "vm": vm, "path": "/run/now" }));
    let stat = stat.unwrap_or_else(|e| panic!("{}", e.text));
    let facts = [&stat["structuredContent"], &stat["_meta"]["dev.nexus/result"]];
    let written = facts.into_iter().find_map(|facts| facts["modified_at"].as_str());
    let written = json!(written.unwrap_or_else(|| panic!("no time in {stat}")));
    let written: Timestamp = serde_json::from_value(written).expect("a time");
    let within = before - CLOCK_MAX..=after + CLOCK_MAX;
    let written = written.as_millis();
    assert!(within.contains(&written), "{written} of the guest is not within {within:?} of the host");
}

/// A shell line that sends a signal to the agent.
pub fn signal_agent(signal: &str) -> String {
    format!(
        "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | \
         grep -q '^[^ ]*nexus-guest agent' && kill -{signal} ${{p#/proc/}}; done"
    )
}

/// Waits until a text is on a VM's console; returns whether it came within [`BOOT`].
pub fn is_on_console(client: &mut Client, vm: &str, text: &str) -> bool {
    let found = until(BOOT, || {
        let logs = client.call_whole("vm_logs", json!({ "vm": vm })).expect("it has logs");
        logs.to_string().contains(text).then_some(())
    });
    found.is_some()
}

/// Starts a shell line in a VM that writes random numbers to `/srv/drawn` for ever, one a line, forks VMs from it in the middle of that, and checks
/// that no number and no identity is in two of them all. Then deletes all of the VMs.
pub fn children_share_nothing(daemon: &Daemon, vm: &str, draw: &str, children: usize) {
    let mut client = daemon.client();
    client.must("guest_command_start", json!({ "vm": vm, "command": draw }));
    client.run(vm, "until [ -s /srv/drawn ]; do sleep 0.1; done");
    let fork = json!({ "vm": vm, "count": children, "tags": { "of": vm }, "wait_s": 45 });
    let made = client.to_the_end("vm_fork", fork, BOOT);
    let made = made["vms"].as_array().expect("a list");
    assert_eq!(made.len(), children, "{made:?}");
    let mut all = vec![vm.to_owned()];
    for child in made {
        assert_eq!(child["contract"]["quiesced"], true, "{child}");
        all.push(child["name"].as_str().expect("a name").to_owned());
    }
    assert_drawn_apart(&mut client, &all);
    // So it is with what is asked for anew.
    for line in [
        "head -c 16 /dev/urandom | od -An -tx1",
        "head -c 16 /dev/random | od -An -tx1",
        "cat /proc/sys/kernel/random/uuid",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /etc/machine-id || echo none",
        "hostname",
    ] {
        let said: BTreeSet<String> = all.iter().map(|vm| client.run(vm, line).stdout).collect();
        assert_eq!(said.len(), all.len(), "{line}: {said:?}");
    }
    for vm in &all {
        client.must_confirmed("vm_delete", json!({ "vm": vm, "force": true }));
    }
    delete_all(daemon, &mut client);
}

/// Checks that what VMs have drawn before they parted is in all of them, and nothing else is in two.
fn assert_drawn_apart(client: &mut Client, vms: &[String]) {
    let length = |client: &mut Client, vm: &str| {
        client.run(vm, "wc -l < /srv/drawn").stdout.trim().parse::<usize>().unwrap_or_default()
    };
    // At least as many as when they parted.
    let before = length(client, &vms[0]);
    let mut drawn: Vec<BTreeSet<String>> = Vec::new();
    for vm in vms {
        let enough = until(2 * BOOT, || (length(client, vm) > before + 40).then_some(()));
        assert!(enough.is_some(), "{vm} draws no more numbers");
        let lines = client.run(vm, "head -n 600 /srv/drawn").stdout;
        drawn.push(lines.lines().filter(|line| line.len() >= 32).map(str::to_owned).collect());
    }
    let common = drawn.iter().skip(1).fold(drawn[0].clone(), |common, lines| &common & lines);
    for (at, one) in drawn.iter().enumerate() {
        let own = one - &common;
        assert!(!own.is_empty(), "{} has drawn nothing of its own", vms[at]);
        for other in &drawn[at + 1..] {
            assert_eq!(&own & other, BTreeSet::new(), "the same number in two VMs");
        }
    }
}

/// A prime number of bytes, so that blocks of any size are different ones.
const PATTERN: usize = 65_521;

fn pattern() -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..PATTERN).map(|_| next()).collect()
}

/// A stream of bytes that a command of a VM sends back, for as long as it is wanted.
#[derive(Debug)]
pub struct Bulk {
    command: Child,
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    writing: JoinHandle<io::Result<u64>>,
    reading: JoinHandle<io::Result<u64>>,
}

impl Bulk {
    /// Starts `nexusctl exec -i VM cat`, writes to it without a pause, and compares what comes back.
    pub fn start(daemon: &Daemon, vm: &str) -> Self {
        let mut command = Command::new(program("nexusctl"));
        command.args(["exec", "-i", vm, "cat"]).envs(daemon.environment());
        let mut command =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("nexusctl runs");
        let mut input = command.stdin.take().expect("its input");
        let mut output = command.stdout.take().expect("its output");
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), received.clone());
        let writing = thread::spawn(move || -> io::Result<u64> {
            let (block, mut written) = (pattern(), 0);
            while !stopped.load(Ordering::Relaxed) {
                input.write_all(&block)?;
                written += block.len() as u64;
            }
            Ok(written)
        });
        let reading = thread::spawn(move || -> io::Result<u64> {
            let (block, mut chunk, mut at) = (pattern(), vec![0; PATTERN], 0);
            loop {
                // Never across the end of the pattern.
                let read = output.read(&mut chunk[..PATTERN - at])?;
                if read == 0 {
                    return Ok(counted.load(Ordering::Relaxed));
                }
                if chunk[..read] != block[at..at + read] {
                    let before = counted.load(Ordering::Relaxed);
                    return Err(io::Error::other(format!("other bytes came back after {before}")));
                }
                at = (at + read) % PATTERN;
                counted.fetch_add(read as u64, Ordering::Relaxed);
            }
        });
        Self { command, stop, received, writing, reading }
    }

    /// Waits until more bytes have come back than at the last look, and returns how many there are.
    #[track_caller]
    pub fn moves_on(&self, before: u64) -> u64 {
        let now = until(MOVES, || Some(self.received.load(Ordering::Relaxed)).filter(|now| *now > before));
        now.unwrap_or_else(|| panic!("nothing comes back any more after {before} bytes"))
    }

    /// Ends it in order; returns how many bytes were sent, all of which came back.
    #[track_caller]
    pub fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let written = self.writing.join().expect("no panic").expect("all is written");
        let read = self.reading.join().expect("no panic").expect("all is read");
        let status = self.command.wait().expect("nexusctl ends");
        assert!(status.success(), "the command's connection broke: {status}");
        assert_eq!(read, written, "bytes came back");
        written
    }
}

/// Takes so many checkpoints of a VM with two bulk streams and a command under way. Nothing of these is lost, and no connection ends. Then
/// pauses and resumes the VM ten times as often. Returns how many bytes came back meanwhile.
pub fn stays_whole(times: u64) -> u64 {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "busy")["boot_id"].clone();
    let mut other = daemon.client();
    let lines = thread::spawn(move || {
        let line = "i=0; until [ -e /run/enough ]; do i=$((i+1)); echo $i; sleep 0.2; done";
        other.run("busy", line)
    });
    let streams = [Bulk::start(&daemon, "busy"), Bulk::start(&daemon, "busy")];
    let mut seen = [0; 2];
    for round in 1..=times {
        let taken = checkpoint(&mut client, "busy", &format!("load-{round}"));
        for (stream, seen) in streams.iter().zip(&mut seen) {
            *seen = stream.moves_on(*seen);
        }
        client.must_confirmed("checkpoint_delete", json!({ "checkpoint": taken["id"] }));
    }
    let bytes: u64 = streams.into_iter().map(Bulk::end).sum();
    client.run("busy", "touch /run/enough");
    let counted = lines.join().expect("no panic").stdout;
    let expected: String = (1..=counted.lines().count()).map(|line| format!("{line}\n")).collect();
    assert!(counted == expected && !counted.is_empty(), "{counted}");

    for round in 1..=10 * times {
        assert_eq!(client.must("vm_pause", json!({ "vm": "busy" }))["state"], "paused", "{round}");
        assert_eq!(client.must("vm_resume", json!({ "vm": "busy" }))["state"], "ready", "{round}");
        if round % 10 == 0 {
            assert_eq!(client.run("busy", "echo up").stdout, "up\n", "{round}");
        }
    }
    assert_eq!(client.inspect("busy")["boot_id"], boot);
    assert_files(&daemon, &mut client);
    bytes
}
