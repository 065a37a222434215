//! Streams into a real VM: commands' output, files, published ports, and what they do to other calls. The yardstick is a plain program
//! in the same VM that reads and writes raw vsock connections (`tests/guest/raw.rs`); both take turns.

mod bulk;
mod delays;
mod trees;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::daemon::{Daemon, program};
use nexus_tests::vsock::{PATIENCE, PORT, compile, read_line, until};
use serde_json::{Value, json};

use super::Options;
use super::samples::{Samples, show};
use super::table::Table;

const MIB: usize = 1 << 20;
/// The name of the VM.
const VM: &str = "web-1";
/// The part of a raw stream's throughput that is asked for.
const PART: f64 = 0.8;
/// The largest write of either side, in bytes.
const WRITE: usize = 256 << 10;

pub(crate) fn measure(options: &Options) -> Table {
    let mut table = Table::new("Streams into a real VM");
    let subject = Subject::start();
    bulk::measure(&subject, options, &mut table);
    trees::measure(&subject, options, &mut table);
    delays::measure(&subject, options, &mut table);
    table.note(
        "The yardstick is a plain program in the same VM on raw vsock connections, through the same vsock device, without frames, daemon \
         and agent. Files are in memory (`/dev/shm`) on both sides.",
    );
    table
}

/// A VM, with the yardstick's program in it.
struct Subject {
    daemon: Daemon,
    socket: PathBuf,
    scratch: tempfile::TempDir,
}

impl Subject {
    fn start() -> Self {
        let daemon = Daemon::start();
        let vm = daemon.client().create(json!({ "name": VM, "from": "busybox", "memory": "2GiB" }));
        let socket = vm["process"]["vsock_socket"].as_str().expect("a running VM has a socket").into();
        let scratch = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
        let subject = Self { daemon, socket, scratch };
        compile("raw", subject.scratch.path());
        subject.copy(&[&subject.path("raw"), &format!("{VM}:/raw")]);
        subject
            .client()
            .must_call("guest_command_start", json!({ "vm": VM, "argv": ["/raw"], "timeout_s": 0 }));
        until("the yardstick's program to listen", || subject.dial().ok());
        subject
    }

    fn client(&self) -> Caller {
        Caller(self.daemon.client())
    }

    /// A path for files of this host.
    fn path(&self, name: &str) -> String {
        self.scratch.path().join(name).display().to_string()
    }

    fn nexusctl(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program("nexusctl"));
        command.args(words).envs(self.daemon.environment()).stdin(Stdio::null());
        command
    }

    /// Copies with nexusctl; returns how long that took.
    fn copy(&self, words: &[&str]) -> Duration {
        let start = Instant::now();
        succeed(self.nexusctl(&[&["cp", "-q"], words].concat()).spawn().expect("nexusctl runs"));
        start.elapsed()
    }

    /// Runs a shell line in the VM. Panics if it fails.
    fn run(&self, line: &str) -> String {
        let output = self.nexusctl(&["exec", VM, "-c", line]).output().expect("nexusctl runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {}, {said}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A raw connection to the yardstick's program.
    fn dial(&self) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
        let line = read_line(&mut stream)?;
        if line.starts_with("OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    }

    /// The same, with what is asked of it.
    fn ask(&self, line: &str) -> UnixStream {
        let mut stream = self.dial().expect("connect to the guest");
        stream.write_all(format!("{line}\n").as_bytes()).expect("ask the guest");
        stream
    }

    /// The same with a shell line in the VM that has the connection as its input and output.
    fn ask_to_run(&self, line: &str) -> UnixStream {
        let mut stream = self.ask(&format!("run {line}"));
        assert_eq!(read_line(&mut stream).expect("the line starts"), "go");
        stream
    }

    /// The peaks of resident memory of the daemon and of the guest's processes since the last call, in MiB.
    fn peaks(&self) -> (f64, f64) {
        let host = super::memory::peak_mib(self.daemon.pid());
        let line = "for p in $(grep -l '^Name:.nexus-guest' /proc/[0-9]*/status); do grep VmHWM $p; echo 5 > ${p%status}clear_refs; done";
        let said = self.run(line);
        let kib = |line: &str| line.split_whitespace().nth(1)?.parse::<f64>().ok();
        (host, said.lines().filter_map(kib).fold(0.0, f64::max) / 1024.0)
    }
}

/// A client whose failures end the bench.
struct Caller(Client);

impl Caller {
    /// The whole result of a tool that must succeed.
    fn must_call(&mut self, tool: &str, arguments: Value) -> Value {
        self.0.call_whole(tool, arguments).unwrap_or_else(|e| panic!("{tool}: {}", e.text))
    }
}

/// What a guest's tool says for programs.
fn facts(result: &Value) -> &Value {
    &result["_meta"]["dev.nexus/result"]
}

fn succeed(mut child: Child) {
    let status = child.wait().expect("a child can be waited for");
    assert!(status.success(), "a program ended with {status}");
}

/// Reads `bytes` and nothing more; returns how long that took since `start`.
fn drain(from: &mut impl Read, bytes: usize, start: Instant) -> Duration {
    let (mut buffer, mut seen) = (vec![0; WRITE], 0);
    while seen < bytes {
        let count = from.read(&mut buffer).expect("read from the guest");
        assert!(count > 0, "the stream ended after {seen} bytes of {bytes}");
        seen += count;
    }
    start.elapsed()
}

/// Takes turns at two pieces of work.
fn turns(
    options: &Options,
    mut raw: impl FnMut() -> Duration,
    mut ours: impl FnMut() -> Duration,
) -> [Samples; 2] {
    let (mut raws, mut our) = (Samples::default(), Samples::default());
    for _ in 0..if options.quick { 2 } else { 5 } {
        raws.add(raw());
        our.add(ours());
    }
    [raws, our]
}

fn rate(bytes: usize, samples: &Samples) -> f64 {
    (bytes / MIB) as f64 / samples.p50().as_secs_f64()
}

/// A row of throughput, judged against the yardstick's.
fn judge_rate(table: &mut Table, what: impl Into<String>, bytes: usize, [raw, ours]: &[Samples; 2]) {
    let (raw, ours) = (rate(bytes, raw), rate(bytes, ours));
    let ratio = ours / raw;
    let mib = |rate: f64| format!("{rate:.0} MiB/s");
    table.judged(what, mib(ours), mib(raw), format!("{ratio:.2} x"), ("≥ 0.8 x", ratio >= PART));
}

/// The same without a goal.
fn tell_rate(table: &mut Table, what: impl Into<String>, bytes: usize, [raw, ours]: &[Samples; 2]) {
    let (raw, ours) = (rate(bytes, raw), rate(bytes, ours));
    table.told(what, format!("{ours:.0} MiB/s"), format!("{raw:.0} MiB/s"), format!("{:.2} x", ours / raw));
}

/// A row of times, where less is better.
fn judge_time(
    table: &mut Table,
    what: impl Into<String>,
    [raw, ours]: &[Samples; 2],
    (goal, most): (&str, f64),
) {
    let ratio = ours.p50().as_secs_f64() / raw.p50().as_secs_f64();
    table.judged(
        what,
        show(ours.p50()),
        show(raw.p50()),
        format!("{ratio:.2} x the time"),
        (goal, ratio <= most),
    );
}
