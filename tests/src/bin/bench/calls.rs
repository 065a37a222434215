//! The cost of a call of a guest's tool through the daemon.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_tests::daemon::{Daemon, program};
use serde_json::json;

use super::Options;
use super::awake::Awake;
use super::samples::{Samples, show};
use super::table::Table;
use super::vsock::Echo;
use super::wires::{self, Http, Program, Wire, check, request};

const OWN: &str = r#"{"name":"file_stat","arguments":{"path":"/"}}"#;
pub(crate) const THROUGH: &str = r#"{"name":"guest_file_stat","arguments":{"vm":"web-1","path":"/"}}"#;
const CALLERS: usize = 32;
/// How much may be added to the time of one hop.
const ON_TOP: Duration = Duration::from_micros(60);
const RATE: f64 = 15_000.0;
const PART: f64 = 0.6;
/// The label of figures that are not judged.
const AWAKE: &str = "processors kept awake";
/// The number of rounds.
const TURNS: usize = 10;

pub(crate) fn measure(options: &Options) -> Table {
    let mut table = Table::new("Calls through the daemon (p50 / p99)");
    processes(options, &mut table);
    real(options, &mut table);
    table.note(
        "The no-op is `file_stat` of `/`. On a stream, one hop is the same call at the guest's own socket; over stdio and HTTP it is \
         a `ping` that nexusd answers itself. A raw ping of a VM is an echo of 100 bytes by a program in a VM of its own.",
    );
    table.note(match Awake::keep() {
        Some(_) => {
            "Processors sleep as they do, but for what nexusd does about it as root; the lines that say so are of processors kept \
             awake throughout by `/dev/cpu_dma_latency`, for the yardstick too."
        }
        None => "Processors sleep while they wait; only root can keep them awake, nexusd included, so all lines are of such.",
    });
    table
}

/// With the guest as an ordinary process.
fn processes(options: &Options, table: &mut Table) {
    // The port was just free, which is good enough.
    let address = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a free port");
    let daemon = Daemon::start_with_processes(&["--http", &address.to_string()]);
    let guest = create(&daemon);
    let token = fs::read_to_string(daemon.state().join("http-token")).expect("the daemon made a token");

    let mut direct = wires::guest(&guest).expect("connect to the guest");
    let mut stream = wires::upgraded(&daemon.socket()).expect("a stream to the daemon");
    let mut bridge = Command::new(program("nexusctl"));
    let mut stdio =
        Program::start(bridge.arg("mcp").env("NEXUS_SOCKET", daemon.socket())).expect("nexusctl mcp");
    let mut http = Http::open(address, token.trim()).expect("a session over HTTP");

    let mut alone = |awake: bool| {
        let _awake = awake.then(Awake::keep).flatten();
        let mut one = [Samples::default(), Samples::default(), Samples::default()];
        let mut two = one.clone();
        for _ in 0..TURNS {
            let times = options.times(5000) / TURNS;
            let ask = |wire: &mut dyn Wire, method: &str, params: &str, into: &mut Samples| {
                into.extend(ask_often(wire, &request(1, method, params), times));
            };
            ask(&mut direct, "tools/call", OWN, &mut one[0]);
            ask(&mut stream, "tools/call", THROUGH, &mut two[0]);
            ask(&mut stdio, "ping", "{}", &mut one[1]);
            ask(&mut stdio, "tools/call", THROUGH, &mut two[1]);
            ask(&mut http, "ping", "{}", &mut one[2]);
            ask(&mut http, "tools/call", THROUGH, &mut two[2]);
        }
        one.into_iter().zip(two)
    };
    let names = ["no-op, upgraded stream", "no-op, stdio (`nexusctl mcp`)", "no-op, HTTP"];
    for (name, (one, two)) in names.into_iter().zip(alone(false)) {
        let on_top = two.p50().saturating_sub(one.p50());
        table.judged(
            name,
            two.pair(0.5, 0.99),
            one.pair(0.5, 0.99),
            format!("+{}", show(on_top)),
            ("≤ 60 µs on top", on_top <= ON_TOP),
        );
    }
    for (name, (one, two)) in names.into_iter().zip(alone(true)) {
        let on_top = two.p50().saturating_sub(one.p50());
        table.told(
            format!("- {name}, {AWAKE}"),
            two.pair(0.5, 0.99),
            one.pair(0.5, 0.99),
            format!("+{}", show(on_top)),
        );
    }

    let mut together = |awake: bool| {
        let _awake = awake.then(Awake::keep).flatten();
        let (mut one, mut two) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            let total = options.times(100_000) / TURNS;
            one.push(direct.ask_together("tools/call", OWN, CALLERS, total).expect("calls of the guest"));
            two.push(
                stream.ask_together("tools/call", THROUGH, CALLERS, total).expect("calls through the daemon"),
            );
        }
        (median(&mut one), median(&mut two))
    };
    let (one, two) = together(false);
    table.judged(
        format!("{CALLERS} callers on one stream, none failed"),
        format!("{two:.0}/s"),
        format!("{one:.0}/s"),
        format!("{:.2} x", two / one),
        ("≥ 15,000/s and ≥ 0.6 x", two >= RATE && two >= PART * one),
    );
    let (one, two) = together(true);
    table.told(
        format!("- {CALLERS} callers, {AWAKE}"),
        format!("{two:.0}/s"),
        format!("{one:.0}/s"),
        format!("{:.2} x", two / one),
    );
}

/// With a real VM.
fn real(options: &Options, table: &mut Table) {
    let daemon = Daemon::start();
    daemon.client().create(json!({ "name": "web-1", "from": "busybox" }));
    let mut stream = wires::upgraded(&daemon.socket()).expect("a stream to the daemon");
    let mut echo = Echo::start(&daemon);
    let what = "no-op in a real VM, next to a raw ping";
    for (awake, what) in [(false, what.to_owned()), (true, format!("- {what}, {AWAKE}"))] {
        let _awake = awake.then(Awake::keep).flatten();
        let (mut raw, mut calls) = (Samples::default(), Samples::default());
        for _ in 0..TURNS {
            let times = options.times(2000) / TURNS;
            raw.extend(echo.round_trips(times));
            calls.extend(ask_often(&mut stream, &request(1, "tools/call", THROUGH), times));
        }
        table.told(
            what,
            calls.pair(0.5, 0.99),
            raw.pair(0.5, 0.99),
            format!("+{}", show(calls.p50().saturating_sub(raw.p50()))),
        );
    }
}

/// Sends a request many times, after a warm-up. Panics if an answer is an error.
pub(crate) fn ask_often(wire: &mut dyn Wire, request: &str, times: usize) -> Vec<Duration> {
    let ask = |_| {
        let start = Instant::now();
        let answer = wire.ask(request).unwrap_or_else(|e| panic!("{request}: {e}"));
        let took = start.elapsed();
        check(request, answer);
        took
    };
    (0..times / 10 + times).map(ask).skip(times / 10).collect()
}

/// Creates the VM `web-1`; returns the socket of its guest.
pub(crate) fn create(daemon: &Daemon) -> PathBuf {
    let root = daemon.state().join("rootfs");
    fs::create_dir(&root).and_then(|()| fs::write(root.join("file"), "x")).expect("a root filesystem");
    let from = format!("file:{}", root.display());
    let vm = daemon.client().create(json!({ "name": "web-1", "from": from, "disk": "64MiB" }));
    vm["process"]["vsock_socket"].as_str().expect("a running VM has a socket").into()
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}
