//! The network of real VMs, in network namespaces that this measurement makes and that go with it. Needs root.
//!
//! - With `nat`: next to a machine with the same QEMU line whose TAP has no bridge, no rules and no connection tracking ([`bare`]), in
//!   namespaces of its own of the same form. Both take turns; each guest runs the same program (`tests/guest/outward.rs`).
//! - With `proxy`: next to raw vsock connections to the same program.
//! - `nexus-net` alone, with 50 VMs that are only attached ([`keeper`]).

mod bare;
mod keeper;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nexus_tests::daemon::{Daemon, program};
use nexus_tests::netns::{Internet, NAMES, Namespace, ROUTER, SITE};
use nexus_tests::vsock::{PORT, VSOCK, compile, dial, until};
use serde_json::{Value, json};

use super::Options;
use super::samples::{Samples, show};
use super::table::Table;
use bare::Bare;

const MIB: usize = 1 << 20;
/// How much is carried at once, in MiB.
const BULK: usize = 256;
const CONNECTS: usize = 200;
const QUESTIONS: usize = 200;
/// The port of the servers for data.
const DATA_PORT: u16 = 9000;
/// Where the guest's proxy listens.
const PROXY: &str = "127.0.0.1:3128";
const WRITE: usize = 256 << 10;

/// Goals: of throughput next to a bare TAP and to a raw vsock stream, and what a connection, an answer of the resolver and a connection through
/// the proxy may take on top.
const NAT_PART: f64 = 0.95;
const PROXY_PART: f64 = 0.7;
const CONNECT_ON_TOP: Duration = Duration::from_micros(200);
const ANSWER_ON_TOP: Duration = Duration::from_millis(1);
const PROXY_ON_TOP: Duration = Duration::from_millis(1);

pub(crate) fn measure(options: &Options) -> Table {
    let mut table = Table::new("The network of VMs");
    if !rustix::process::geteuid().is_root() {
        table.note("Nothing was measured: network namespaces need root.");
        return table;
    }
    keeper::measure(options, &mut table);
    let world = Internet::new();
    serve_data(&world.outside);
    let daemon = Daemon::start_in_namespace(&world.host.path());
    let mut client = daemon.client();
    client.must("settings_set", json!({ "values": { "network.dns": ROUTER.to_string() } }));
    nat(options, &daemon, &mut table);
    client.must("vm_delete", json!({ "vm": "nat", "force": true }));
    // nexus-net outlives the daemon.
    client.must("network_cleanup", json!({}));
    proxy(options, &daemon, &world, &mut table);
    table.note(
        "The servers are in a namespace behind the host's, over a veth pair. Rates of TCP include segmentation offload on both sides.",
    );
    table
}

/// The program in a guest, behind the hybrid socket of its vsock device.
struct Probe(PathBuf);

impl Probe {
    /// Creates a VM and starts the program in it.
    fn in_vm(daemon: &Daemon, name: &str, network: &str) -> (Self, Value) {
        let mut client = daemon.client();
        let vm = client.create(json!({ "name": name, "from": "busybox", "network": network }));
        let scratch = tempfile::tempdir().expect("a directory");
        compile("raw", scratch.path());
        let mut copy = std::process::Command::new(program("nexusctl"));
        copy.args(["cp", "-q"]).arg(scratch.path().join("raw")).arg(format!("{name}:/raw"));
        super::material::run(copy.envs(daemon.environment()));
        client.must("guest_command_start", json!({ "vm": name, "argv": ["/raw"], "timeout_s": 0 }));
        let socket = vm["process"]["vsock_socket"].as_str().expect("a running VM has a socket");
        let directory = Path::new(socket).parent().expect("it is in the VM's directory").to_owned();
        assert!(socket.ends_with(VSOCK), "{socket}");
        until("the program in the guest to listen", || dial(&directory, PORT).ok());
        (Self(directory), vm)
    }

    /// Has the guest measure something; what it answers, one duration for each time.
    fn outward(&self, words: &str) -> Samples {
        let mut stream = dial(&self.0, PORT).expect("connect to the guest");
        stream.write_all(format!("outward {words}\n").as_bytes()).expect("ask the guest");
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).expect("the guest answers");
        assert!(!answer.is_empty() && !answer.starts_with("failed"), "{words}: {answer}");
        let nanos = |word: &str| word.parse().map(Duration::from_nanos);
        answer.split_whitespace().map(|word| nanos(word).expect("the guest answers with numbers")).collect()
    }
}

/// The place of the servers for data.
fn data_place() -> String {
    format!("{SITE}:{DATA_PORT}")
}

/// Serves data in a namespace, on the address of the site: `source N` sends N bytes, `sink N` takes N bytes and says `done`.
fn serve_data(outside: &Namespace) {
    let listener = outside.within(|| TcpListener::bind((SITE, DATA_PORT)).expect("the port is free"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || drop(serve(stream)));
        }
    });
}

fn serve(stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(WRITE, &stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (what, bytes) = line.trim().split_once(' ').unwrap_or_default();
    let bytes: usize = bytes.parse().unwrap_or(0);
    if what == "source" {
        let block = vec![7; WRITE];
        let mut sent = 0;
        while sent < bytes {
            let count = WRITE.min(bytes - sent);
            (&stream).write_all(&block[..count])?;
            sent += count;
        }
        return Ok(());
    }
    let mut buffer = vec![0; WRITE];
    let mut seen = 0;
    while seen < bytes {
        match reader.read(&mut buffer)? {
            0 => return Ok(()),
            count => seen += count,
        }
    }
    if bytes > 0 { (&stream).write_all(b"done\n") } else { Ok(()) }
}

fn nat(options: &Options, daemon: &Daemon, table: &mut Table) {
    let (probe, vm) = Probe::in_vm(daemon, "nat", "nat");
    let bare = Bare::like(daemon, &vm);
    let bytes = options.times(BULK) * MIB;
    let rounds = if options.quick { 2 } else { 5 };
    for (what, word) in [("TCP to the VM", "fetch"), ("TCP from the VM", "push")] {
        let words = format!("{word} {} {bytes}", data_place());
        let (mut yardstick, mut ours) = (Samples::default(), Samples::default());
        for _ in 0..rounds {
            yardstick.extend(bare.probe.outward(&words).iter());
            ours.extend(probe.outward(&words).iter());
        }
        let what = format!("`nat`: {} MiB by {what}, next to a bare TAP", bytes / MIB);
        judge_rate(table, what, bytes, (&ours, &yardstick), ("≥ 0.95 x", NAT_PART));
    }

    let words = format!("connect {} {}", data_place(), options.times(CONNECTS));
    let (mut yardstick, mut ours) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        yardstick.extend(bare.probe.outward(&words).iter());
        ours.extend(probe.outward(&words).iter());
    }
    let goal = ("≤ 0.2 ms on top", CONNECT_ON_TOP);
    judge_on_top(table, "`nat`: a TCP connection, next to a bare TAP, p50 / p99", (&ours, &yardstick), goal);

    let gateway: Ipv4Addr = vm["network"]["interface"]["gateway"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .expect("a VM with an interface has a gateway");
    let times = options.times(QUESTIONS);
    let question = format!("look-up {gateway} {}", NAMES[0]);
    // The first answer is the upstream's.
    probe.outward(&format!("{question} 1"));
    let (mut pings, mut answers) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        pings.extend(probe.outward(&format!("ping {gateway} {times}")).iter());
        answers.extend(probe.outward(&format!("{question} {times}")).iter());
    }
    let goal = ("≤ 1 ms on top", ANSWER_ON_TOP);
    judge_on_top(
        table,
        "`nat`: a name from the cache, next to a ping of the gateway, p50 / p99",
        (&answers, &pings),
        goal,
    );
}

fn proxy(options: &Options, daemon: &Daemon, world: &Internet, table: &mut Table) {
    let (probe, _) = Probe::in_vm(daemon, "proxy", "proxy");
    let bytes = options.times(BULK) * MIB;
    let rounds = if options.quick { 2 } else { 5 };
    // A raw stream in the same direction, through the same vsock device.
    let raw_in = || {
        let mut stream = dial(&probe.0, PORT).expect("connect to the guest");
        let block = vec![7; WRITE];
        let start = Instant::now();
        stream.write_all(format!("sink {bytes}\n").as_bytes()).expect("ask the guest");
        (0..bytes / WRITE).try_for_each(|_| stream.write_all(&block)).expect("write to the guest");
        stream.read_exact(&mut [0; 5]).expect("hear that the guest has all");
        start.elapsed()
    };
    let raw_out = || {
        let mut stream = dial(&probe.0, PORT).expect("connect to the guest");
        let (mut buffer, mut seen) = (vec![0; WRITE], 0);
        let start = Instant::now();
        stream.write_all(format!("source {bytes} {WRITE}\n").as_bytes()).expect("ask the guest");
        while seen < bytes {
            let count = stream.read(&mut buffer).expect("read from the guest");
            assert!(count > 0, "the guest's stream ended after {seen} bytes");
            seen += count;
        }
        start.elapsed()
    };
    let ways: [(&str, &str, &dyn Fn() -> Duration); 2] =
        [("to", "fetch", &raw_in), ("from", "push", &raw_out)];
    for (way, word, raw) in ways {
        let words = format!("{word} {} {bytes} {PROXY}", data_place());
        let (mut yardstick, mut ours) = (Samples::default(), Samples::default());
        for _ in 0..rounds {
            yardstick.add(raw());
            ours.extend(probe.outward(&words).iter());
        }
        let what = format!("`proxy`: {} MiB {way} the VM, next to a raw vsock stream", bytes / MIB);
        judge_rate(table, what, bytes, (&ours, &yardstick), ("≥ 0.7 x", PROXY_PART));
    }

    let times = options.times(CONNECTS);
    let (mut yardstick, mut ours) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        let dials = world.host.within(move || {
            let dial = |_| {
                let start = Instant::now();
                TcpStream::connect((SITE, DATA_PORT)).expect("connect to the server");
                start.elapsed()
            };
            (0..times).map(dial).collect::<Vec<_>>()
        });
        for dialled in dials {
            // Waits until the guest has finished with the connection before.
            thread::park_timeout(Duration::from_millis(2));
            let start = Instant::now();
            dial(&probe.0, PORT).expect("connect to the guest");
            yardstick.add(start.elapsed() + dialled);
        }
        ours.extend(probe.outward(&format!("connect {} {times} {PROXY}", data_place())).iter());
    }
    let what = "`proxy`: a connection, next to a raw `CONNECT` and a dial on the host, p50 / p99";
    judge_on_top(table, what, (&ours, &yardstick), ("≤ 1 ms on top", PROXY_ON_TOP));
}

/// A row of throughput, judged as a part of the yardstick's.
fn judge_rate(
    table: &mut Table,
    what: impl Into<String>,
    bytes: usize,
    (ours, yardstick): (&Samples, &Samples),
    (goal, least): (&str, f64),
) {
    let rate = |samples: &Samples| (bytes / MIB) as f64 / samples.p50().as_secs_f64();
    let (ours, yardstick) = (rate(ours), rate(yardstick));
    let mib = |rate: f64| format!("{rate:.0} MiB/s");
    let ratio = ours / yardstick;
    table.judged(what, mib(ours), mib(yardstick), format!("{ratio:.2} x"), (goal, ratio >= least));
}

/// A row of times, judged by how much longer than the yardstick's they are.
fn judge_on_top(
    table: &mut Table,
    what: impl Into<String>,
    (ours, yardstick): (&Samples, &Samples),
    (goal, most): (&str, Duration),
) {
    let on_top = ours.p50().saturating_sub(yardstick.p50());
    table.judged(
        what,
        ours.pair(0.5, 0.99),
        yardstick.pair(0.5, 0.99),
        format!("+{}", show(on_top)),
        (goal, on_top <= most),
    );
}
