//! Much data in one piece: a command's output, a large file, a published port.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use serde_json::json;

use super::{MIB, Subject, VM, WRITE, drain, facts, judge_rate, rate, succeed, tell_rate, turns};
use crate::Options;
use crate::samples::{Samples, show};
use crate::table::Table;

/// The port of the yardstick's program on the guest's loopback.
const GUEST_PORT: u16 = 300;
/// How much longer setting up a connection may take than a raw one.
const ON_TOP: Duration = Duration::from_millis(1);
const CONNECTS: usize = 200;
/// Between two connections, in which the guest finishes with the one before.
const PAUSE: Duration = Duration::from_millis(5);
/// How much one call of `command_output` reads, in bytes.
const PAGE: usize = 704 << 10;
/// The most memory that a stream of any length may take anywhere, in MiB.
const MEMORY: f64 = 64.0;

pub(super) fn measure(subject: &Subject, options: &Options, table: &mut Table) {
    if options.has("exec") {
        exec(subject, options, table);
    }
    if options.has("output") {
        paged(subject, options, table);
    }
    if options.has("file") {
        files(subject, options, table);
    }
    if ["port", "connect"].iter().any(|part| options.has(part)) {
        let connect = publish(subject);
        if options.has("port") {
            published(subject, &connect, options, table);
        }
        if options.has("connect") {
            connections(subject, &connect, options, table);
        }
    }
}

fn exec(subject: &Subject, options: &Options, table: &mut Table) {
    let bytes = options.times(1024) * MIB;
    let raw = |what: &str| {
        let start = Instant::now();
        drain(&mut subject.ask(&format!("{what} {bytes} 65536")), bytes, start)
    };
    subject.peaks();
    let mut client = 0.0_f64;
    let mut ours = || {
        let start = Instant::now();
        let mut command = subject.nexusctl(&["exec", VM, "/raw", "source", &bytes.to_string(), "65536"]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("nexusctl runs");
        let mut output = child.stdout.take().expect("its output");
        // Not to the end, so that it is still there to be looked at.
        drain(&mut output, bytes - WRITE, start);
        client = client.max(crate::memory::peak_mib(child.id()));
        output.read_to_end(&mut Vec::new()).expect("read the rest");
        let took = start.elapsed();
        succeed(child);
        took
    };
    let size = bytes / MIB;
    let both = turns(options, || raw("source"), &mut ours);
    judge_rate(table, format!("`exec`: {size} MiB out, next to a raw stream"), bytes, &both);
    let both = turns(options, || raw("pipe"), &mut ours);
    tell_rate(table, "- the same, next to a raw stream that is fed by a program's pipe", bytes, &both);
    let (host, guest) = subject.peaks();
    let most = host.max(guest).max(client);
    let told = format!("{host:.1}, {guest:.1}, {client:.1} MiB");
    table.judged(
        "- resident at most: nexusd, guest, nexusctl",
        told,
        "",
        "",
        ("< 64 MiB each", most < MEMORY),
    );
}

/// The output of a command, by calls.
fn paged(subject: &Subject, options: &Options, table: &mut Table) {
    let bytes = options.times(1024) * MIB;
    let mut client = subject.client();
    subject.peaks();
    crate::memory::peak_mib(std::process::id());
    let start = json!({ "vm": VM, "argv": ["/raw", "source", bytes.to_string(), "65536"], "lossless": true });
    let (begun, id) =
        (Instant::now(), facts(&client.must_call("guest_command_start", start))["command_id"].clone());
    let (mut offset, mut calls) = (0, 0_u32);
    while offset < bytes {
        let read = json!({ "vm": VM, "id": id, "stream": "stdout", "offset": offset, "limit": PAGE,
            "encoding": "base64", "wait_ms": 10_000 });
        let result = client.must_call("guest_command_output", read);
        let stdout = &facts(&result)["stdout"];
        assert_eq!(stdout["offset"].as_u64().unwrap_or(0), offset as u64, "nothing may be dropped: {stdout}");
        let shown = BASE64.decode(nexus_tests::client::stream(&result, "stdout").as_bytes());
        offset += shown.expect("base64").len();
        calls += 1;
    }
    let took: Samples = [begun.elapsed()].into_iter().collect();
    let (host, guest) = subject.peaks();
    let own = crate::memory::peak_mib(std::process::id());
    let what = format!("`command_output`: {} MiB in {calls} calls", bytes / MIB);
    table.told(what, format!("{:.0} MiB/s", rate(bytes, &took)), "", "");
    let told = format!("{host:.1}, {guest:.1}, {own:.1} MiB");
    let most = host.max(guest).max(own);
    table.judged(
        "- resident at most: nexusd, guest, this client",
        told,
        "",
        "",
        ("< 64 MiB each", most < MEMORY),
    );
}

fn files(subject: &Subject, options: &Options, table: &mut Table) {
    let bytes = options.times(256) * MIB;
    let (own, theirs) = (subject.path("large"), format!("{VM}:/dev/shm/large"));
    let content: Vec<u8> =
        (0..bytes / 4).flat_map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&own, &content).expect("a large file");
    let size = bytes / MIB;

    let inwards = || {
        let start = Instant::now();
        let mut stream = subject.ask(&format!("sink {bytes}"));
        content.chunks(WRITE).try_for_each(|chunk| stream.write_all(chunk)).expect("write to the guest");
        drain(&mut stream, 5, start)
    };
    let both = turns(options, inwards, || subject.copy(&[&own, &theirs]));
    judge_rate(table, format!("`cp`: {size} MiB in, next to a raw stream"), bytes, &both);
    let into_file = || {
        let start = Instant::now();
        let mut stream = subject.ask_to_run("cat > /dev/shm/raw");
        content.chunks(WRITE).try_for_each(|chunk| stream.write_all(chunk)).expect("write to the guest");
        stream.shutdown(std::net::Shutdown::Write).expect("half of it can be closed");
        stream.read_to_end(&mut Vec::new()).expect("read to the end");
        start.elapsed()
    };
    let both = turns(options, into_file, || subject.copy(&[&own, &theirs]));
    tell_rate(table, "- the same, next to `cat` into a file", bytes, &both);
    subject.run("rm -f /dev/shm/raw");

    let back = subject.path("back");
    let outwards = || {
        let start = Instant::now();
        drain(&mut subject.ask(&format!("source {bytes} {WRITE}")), bytes, start)
    };
    let both = turns(options, outwards, || subject.copy(&[&theirs, &back]));
    assert!(fs::read(&back).is_ok_and(|read| read == content), "the file came back as it went");
    judge_rate(table, format!("`cp`: {size} MiB out, next to a raw stream"), bytes, &both);
    let of_file = || {
        let start = Instant::now();
        let mut stream = subject.ask_to_run("cat /dev/shm/large");
        let mut file = fs::File::create(subject.path("raw-back")).expect("a file");
        assert_eq!(std::io::copy(&mut stream, &mut file).expect("read from the guest"), bytes as u64);
        start.elapsed()
    };
    let both = turns(options, of_file, || subject.copy(&[&theirs, &back]));
    tell_rate(table, "- the same, next to `cat` of the file into a file", bytes, &both);
    subject.run("rm -f /dev/shm/large");
    for name in ["large", "back", "raw-back"] {
        fs::remove_file(subject.path(name)).expect("it can be removed");
    }
}

/// Publishes the port of the yardstick's program; returns how to connect to it.
fn publish(subject: &Subject) -> impl Fn() -> TcpStream {
    let port = subject.client().must_call("vm_publish", json!({ "vm": VM, "guest_port": GUEST_PORT }));
    let address = port["structuredContent"]["address"].as_str().expect("an address").to_owned();
    move || {
        let stream = TcpStream::connect(&address).expect("connect to the published port");
        stream.set_nodelay(true).expect("an option");
        stream
    }
}

fn published(subject: &Subject, connect: &impl Fn() -> TcpStream, options: &Options, table: &mut Table) {
    let bytes = options.times(256) * MIB;
    let raw_out = || {
        let start = Instant::now();
        drain(&mut subject.ask(&format!("source {bytes} {WRITE}")), bytes, start)
    };
    let out = || {
        let (start, mut stream) = (Instant::now(), connect());
        stream.write_all(format!("source {bytes} {WRITE}\n").as_bytes()).expect("ask the guest");
        drain(&mut stream, bytes, start)
    };
    let size = bytes / MIB;
    judge_rate(table, format!("a published port: {size} MiB out"), bytes, &turns(options, raw_out, out));
    let block = vec![7; WRITE];
    let send = |stream: &mut dyn Write| (0..bytes / WRITE).try_for_each(|_| stream.write_all(&block));
    let raw_in = || {
        let start = Instant::now();
        let mut stream = subject.ask(&format!("sink {bytes}"));
        send(&mut stream).expect("write to the guest");
        drain(&mut stream, 5, start)
    };
    let inwards = || {
        let (start, mut stream) = (Instant::now(), connect());
        stream.write_all(format!("sink {bytes}\n").as_bytes()).expect("ask the guest");
        send(&mut stream).expect("write to the guest");
        drain(&mut stream, 5, start)
    };
    judge_rate(table, format!("a published port: {size} MiB in"), bytes, &turns(options, raw_in, inwards));
}

/// How long a connection to a published port takes.
fn connections(subject: &Subject, connect: &impl Fn() -> TcpStream, options: &Options, table: &mut Table) {
    let (mut raw, mut ours) = (Samples::default(), Samples::default());
    for _ in 0..options.times(CONNECTS) {
        std::thread::park_timeout(PAUSE);
        let start = Instant::now();
        let mut stream = subject.ask("echo");
        stream.write_all(b"x").expect("write to the guest");
        raw.add(drain(&mut stream, 1, start));
        drop(stream);
        std::thread::park_timeout(PAUSE);
        let (start, mut stream) = (Instant::now(), connect());
        stream.write_all(b"echo\nx").expect("write to the guest");
        ours.add(drain(&mut stream, 1, start));
    }
    let on_top = ours.p50().saturating_sub(raw.p50());
    table.judged(
        "a published port: a connection and its first byte back, p50 / p99",
        ours.pair(0.5, 0.99),
        raw.pair(0.5, 0.99),
        format!("+{}", show(on_top)),
        ("≤ 1 ms on top", on_top <= ON_TOP),
    );
}
