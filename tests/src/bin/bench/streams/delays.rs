//! How long other calls take while a stream is full, a command writes without a pause, or memory runs out.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{MIB, Subject, VM, facts};
use crate::Options;
use crate::samples::{Samples, show};
use crate::table::Table;
use crate::wires::{self, Lines, Wire, check, request};

const CALL: &str = r#"{"name":"guest_file_stat","arguments":{"vm":"web-1","path":"/"}}"#;
const CALLS: usize = 2000;
/// How much later a call may be answered because of another stream.
const LATER: Duration = Duration::from_millis(20);
/// When the agent has to answer whatever happens.
const AT_WORST: Duration = Duration::from_secs(1);
const STREAMS: usize = 10;
/// Between the begin or end of idle streams and the calls.
const PAUSE: Duration = Duration::from_millis(500);
/// What counts as unchanged on a machine with other load.
const UNCHANGED: f64 = 1.15;

type Stream = Lines<std::os::unix::net::UnixStream, std::os::unix::net::UnixStream>;

pub(super) fn measure(subject: &Subject, options: &Options, table: &mut Table) {
    if !["idle", "busy", "safe"].iter().any(|part| options.has(part)) {
        return;
    }
    let mut wire = wires::upgraded(&subject.daemon.socket()).expect("a stream to the daemon");
    let times = options.times(CALLS).max(400);
    let mut quiet = calls(&mut wire, times);
    if options.has("idle") {
        idle(subject, &mut wire, times, &mut quiet, table);
    }
    if options.has("busy") {
        busy(subject, &mut wire, times, &quiet, table);
    }
    if options.has("safe") {
        safe(subject, &mut wire, options, &quiet, table);
    }
}

/// The times of calls, one after another.
fn calls(wire: &mut Stream, times: usize) -> Samples {
    let call = request(1, "tools/call", CALL);
    let ask = |_| {
        let start = Instant::now();
        let answer = wire.ask(&call).expect("the daemon answers");
        let took = start.elapsed();
        check(&call, answer);
        took
    };
    (0..times).map(ask).collect()
}

fn stream(subject: &Subject, words: &[&str]) -> Child {
    let mut command = subject.nexusctl(&[&["exec", VM], words].concat());
    command.stdout(Stdio::piped()).spawn().expect("nexusctl runs")
}

fn end(mut child: Child) {
    child.kill().expect("a child can be killed");
    child.wait().expect("a child can be waited for");
}

/// Ends all commands of these words.
fn end_commands(subject: &Subject, words: &str) {
    subject.run(&format!("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -q '^{words}' && kill -9 ${{p#/proc/}}; done; true"));
}

fn idle(subject: &Subject, wire: &mut Stream, times: usize, quiet: &mut Samples, table: &mut Table) {
    let mut beside = Samples::default();
    for _ in 0..4 {
        let streams: Vec<Child> = (0..STREAMS).map(|_| stream(subject, &["sleep", "1000"])).collect();
        std::thread::park_timeout(PAUSE);
        calls(wire, times / 10);
        beside.extend(calls(wire, times / 4).iter());
        streams.into_iter().for_each(end);
        end_commands(subject, "sleep 1000");
        // The same pause as before the calls beside them.
        std::thread::park_timeout(PAUSE);
        calls(wire, times / 10);
        quiet.extend(calls(wire, times / 4).iter());
    }
    let ratio = beside.p50().as_secs_f64() / quiet.p50().as_secs_f64();
    table.judged(
        format!("a call beside {STREAMS} idle streams, p50 / p99"),
        beside.pair(0.5, 0.99),
        quiet.pair(0.5, 0.99),
        format!("{ratio:.2} x"),
        ("unchanged (≤ 1.15 x) at p50", ratio <= UNCHANGED),
    );
}

fn busy(subject: &Subject, wire: &mut Stream, times: usize, quiet: &Samples, table: &mut Table) {
    let mut row = |what: &str, beside: &Samples| {
        let later = beside.quantile(0.99).saturating_sub(quiet.quantile(0.99));
        table.judged(
            format!("a call beside {what}, p50 / p99"),
            beside.pair(0.5, 0.99),
            quiet.pair(0.5, 0.99),
            format!("+{} at p99", show(later)),
            ("≤ 20 ms later at p99", later <= LATER),
        );
    };
    let mut client = subject.client();
    let start = json!({ "vm": VM, "command": "yes", "timeout_s": 0 });
    let id = facts(&client.must_call("guest_command_start", start))["command_id"].clone();
    row("a command that writes without a pause", &calls(wire, times));
    client.must_call("guest_command_signal", json!({ "vm": VM, "id": id, "signal": "KILL" }));

    let endless = ["/raw", "source", "1000000000000", "65536"];
    let unread = stream(subject, &endless);
    std::thread::park_timeout(Duration::from_secs(2));
    row("a full stream that nobody reads", &calls(wire, times));
    end(unread);
    end_commands(subject, "/raw source");

    let mut read = stream(subject, &endless);
    let mut output = read.stdout.take().expect("its output");
    let reading = std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    std::thread::park_timeout(Duration::from_millis(500));
    row("a stream at full speed", &calls(wire, times));
    end(read);
    end_commands(subject, "/raw source");
    reading.join().expect("the reader ends").expect("it reads to the end");
}

/// Much output, and more memory than there is.
fn safe(subject: &Subject, wire: &mut Stream, options: &Options, quiet: &Samples, table: &mut Table) {
    let bytes = options.times(10_240) * MIB;
    let mut client = subject.client();
    let mut beside = |what: String, start: serde_json::Value| {
        let id = facts(&client.must_call("guest_command_start", start))["command_id"].clone();
        let mut samples = Samples::default();
        let ended = loop {
            samples.extend(calls(wire, 20).iter());
            let state = json!({ "vm": VM, "id": id, "limit": 1 });
            let result = client.must_call("guest_command_output", state);
            if facts(&result)["state"] == "ended" {
                break result;
            }
        };
        let worst = samples.quantile(1.0);
        table.judged(
            what,
            samples.pair(0.5, 1.0),
            quiet.pair(0.5, 1.0),
            "",
            ("≤ 1 s at worst", worst <= AT_WORST),
        );
        ended
    };
    let output = json!({ "vm": VM, "argv": ["/raw", "source", bytes.to_string(), "65536"] });
    let ended =
        beside(format!("a call during {} MiB of output that nobody reads, p50 / worst", bytes / MIB), output);
    assert_eq!(facts(&ended)["stdout"]["total_bytes"], bytes, "all is counted");
    let bomb = json!({ "vm": VM, "command": "tail /dev/zero | wc -c" });
    let ended = beside("a call while a command takes all memory, p50 / worst".into(), bomb);
    let killed = facts(&ended)["oom_killed"].clone();
    // Its first process only waits, so that the command lasts.
    let bomb = "bomb() { bomb | bomb & }; bomb; exec sleep 15";
    let bomb = json!({ "vm": VM, "command": bomb, "timeout_s": 60, "kill_descendants": true });
    beside("a call while a fork bomb has all processes that commands may have, p50 / worst".into(), bomb);
    table.told("- whom the result names as killed", killed.to_string().replace('|', "/"), "", "");
    let many: Vec<_> = (0..100)
        .map(|_| {
            client.must_call(
                "guest_command_start",
                json!({ "vm": VM, "argv": ["/raw", "source", "100000000000", "4096"] }),
            )
        })
        .map(|started| facts(&started)["command_id"].clone())
        .collect();
    let mut samples = Samples::default();
    samples.extend(calls(wire, options.times(100)).iter());
    let worst = samples.quantile(1.0);
    let told = ("≤ 1 s at worst", worst <= AT_WORST);
    table.judged(
        "a call beside 100 commands that write without a pause, p50 / worst",
        samples.pair(0.5, 1.0),
        quiet.pair(0.5, 1.0),
        "",
        told,
    );
    for id in many {
        client.must_call("guest_command_signal", json!({ "vm": VM, "id": id, "signal": "KILL" }));
    }
}
