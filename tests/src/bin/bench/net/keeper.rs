//! `nexus-net` by its protocol, in a namespace of its own: how long it takes to attach a VM, and to change 50 of them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nexus_schema::id::VmId;
use nexus_tests::daemon::program;
use nexus_tests::netns::Namespace;
use nexus_tests::vsock::until;
use serde_json::{Value, json};

use crate::Options;
use crate::samples::{Samples, show};
use crate::table::Table;

const VMS: u8 = 50;
/// Entries of each allow list: 1,000 of all VMs together.
const ENTRIES: u8 = 20;
const INSTANCE: &str = "0a1b2c3d";
const ATTACH: Duration = Duration::from_millis(20);
const CHANGE: Duration = Duration::from_millis(50);
/// How often everything is made anew.
const ROUNDS: usize = 10;

pub(super) fn measure(options: &Options, table: &mut Table) {
    let place = Namespace::new();
    let mut keeper = Keeper::start(&place);
    let subnet = json!({ "subnet": "10.77.0.0/16", "gateway": "10.77.0.1" });
    let instance = json!({ "id": INSTANCE, "v4": subnet, "dns": { "servers": [] } });
    let configure = json!({ "configure": { "instance": instance } });
    keeper.ask(&configure);
    let attached: Samples =
        (0..VMS).map(|number| keeper.ask(&json!({ "attach": { "vm": vm(number, 0) } }))).collect();
    table.judged(
        format!("attach of a network to a boot, {VMS} VMs with {ENTRIES} entries each, p50 / p95"),
        attached.pair(0.5, 0.95),
        "",
        "",
        ("≤ 20 ms", attached.p50() <= ATTACH),
    );

    let mut changed = Samples::default();
    for round in 1..=options.times(ROUNDS) {
        let number = u8::try_from(round % usize::from(VMS)).unwrap_or_default();
        changed.add(keeper.ask(&json!({ "update": { "vm": vm(number, round) } })));
    }
    let entries = u32::from(VMS) * u32::from(ENTRIES);
    table.judged(
        format!("a change of all entries of one of {VMS} VMs with {entries} entries, p50 / p95"),
        changed.pair(0.5, 0.95),
        "",
        "",
        ("≤ 50 ms", changed.p50() <= CHANGE),
    );

    // Another program removes the tables: they are made anew with all that is in them.
    let mut anew = Samples::default();
    for _ in 0..options.times(ROUNDS) {
        place.nft(&format!("delete table inet nexus_{INSTANCE} ; delete table bridge nexus_{INSTANCE}"));
        anew.add(keeper.ask(&configure));
    }
    table.judged(
        format!("{entries} entries of {VMS} VMs, all made anew, p50 / p95"),
        anew.pair(0.5, 0.95),
        "",
        "",
        ("≤ 50 ms", anew.p50() <= CHANGE),
    );
    let start = Instant::now();
    keeper.ask(&json!({ "cleanup": {} }));
    table.told(format!("{VMS} VMs removed with the network"), show(start.elapsed()), "", "");
}

/// A VM whose entries depend on the round.
fn vm(number: u8, round: usize) -> Value {
    let id = VmId::from_i64(i64::from(number) + 1).expect("it is an id");
    let port = 1000 + round % 1000;
    let allow: Vec<String> = (0..ENTRIES).map(|entry| format!("20.{number}.{entry}.0/24:{port}")).collect();
    json!({
        "id": id,
        "name": format!("vm-{number}"),
        "owner_uid": 0,
        "mac": format!("02:4e:58:00:00:{number:02x}"),
        "ipv4": format!("10.77.1.{}", u32::from(number) + 1),
        "policy": { "mode": "nat", "allow": allow },
    })
}

/// The process, and a connection to it.
struct Keeper {
    process: Child,
    stream: BufReader<UnixStream>,
    last: u64,
    _directory: tempfile::TempDir,
}

impl Keeper {
    fn start(place: &Namespace) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("net.sock");
        let mut command = place.command(program("nexus-net"));
        let process =
            command.arg(&socket).stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("start nexus-net");
        let stream = until("nexus-net to listen", || UnixStream::connect(&socket).ok());
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout can be set");
        let mut keeper = Self { process, stream: BufReader::new(stream), last: 0, _directory: directory };
        keeper.ask(&json!({ "hello": { "protocol": 2 } }));
        keeper
    }

    /// Makes a request that must succeed; returns how long it took.
    fn ask(&mut self, request: &Value) -> Duration {
        self.last += 1;
        let line = format!("{}\n", json!({ "id": self.last, "request": request }));
        let start = Instant::now();
        self.stream.get_mut().write_all(line.as_bytes()).expect("write to nexus-net");
        let mut answer = String::new();
        self.stream.read_line(&mut answer).expect("nexus-net answers");
        let took = start.elapsed();
        let said: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{answer}: {e}"));
        assert!(said["id"] == self.last && said["answer"].is_object(), "{request}: {said}");
        took
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Fails if it has already exited.
        self.process.kill().ok();
        self.process.wait().expect("wait for nexus-net");
    }
}
