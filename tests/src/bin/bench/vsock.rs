//! The shim's vsock backend with a real guest, compared with another backend if one is given. They alternate after each
//! piece of work, in changing order. Their guests are rebooted several times, because each boot of a guest is slightly
//! slower or faster throughout. Results are compared boot by boot.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nexus_core::internals::Backend;
use nexus_tests::daemon::Daemon;
use nexus_tests::vsock::{CID, Guest, Kernel, PORT, VHOST, VSOCK, dial, until};

use super::Options;
use super::memory::private_kib;
use super::samples::Samples;
use super::table::Table;

/// The argument that makes this program a backend.
pub(crate) const SERVE: &str = "serve-vsock";
/// The ratio that counts as "no slower" on a machine with other load.
const NO_SLOWER: f64 = 1.05;

const MIB: usize = 1 << 20;
/// How much is sent at once, in bytes.
const BULK: usize = 64 * MIB;
const WRITES: [usize; 3] = [4 << 10, 64 << 10, 256 << 10];
const CONNECTS: usize = 50;
const ROUND_TRIPS: usize = 500;
/// The pause between two connections.
const PAUSE: Duration = Duration::from_millis(5);
/// The number of boots, and of rounds with each guest.
const BOOTS: usize = 8;
const TURNS: usize = 3;

/// One piece of work.
#[derive(Clone, Copy)]
enum Piece {
    Connects,
    RoundTrips,
    /// With this element of [`WRITES`].
    ToGuest(usize),
    FromGuest(usize),
}

pub(crate) fn measure(options: &Options) -> Table {
    // Only for its kernel.
    let daemon = Daemon::start();
    let kernel = kernel(&daemon);
    let other = options.vsock_against.as_ref().map(|path| vec![path.display().to_string()]);
    let commands: Vec<Vec<String>> = std::iter::once(own()).chain(other).collect();
    let mut figures: Vec<Figures> = commands.iter().map(|_| Figures::default()).collect();
    for boot in 0..options.times(BOOTS) {
        let start = |(place, command): (usize, &Vec<String>)| (place, Contestant::start(&kernel, command));
        let mut contestants: Vec<(usize, Contestant)> = commands.iter().enumerate().map(start).collect();
        contestants.rotate_left(boot % commands.len());
        for figures in &mut figures {
            figures.begin_boot();
        }
        take_turns(&mut contestants, options.times(TURNS).max(2), &mut figures);
        for (place, contestant) in &contestants {
            figures[*place].note(contestant.backend.id());
        }
    }
    let yardstick = commands.get(1).zip(figures.get(1));
    report(&figures[0], yardstick.map(|(command, figures)| (command[0].as_str(), figures)))
}

fn take_turns(contestants: &mut [(usize, Contestant)], turns: usize, figures: &mut [Figures]) {
    let bulk = (0..WRITES.len()).flat_map(|at| [Piece::ToGuest(at), Piece::FromGuest(at)]);
    let pieces: Vec<Piece> = [Piece::Connects, Piece::RoundTrips].into_iter().chain(bulk).collect();
    for _ in 0..turns {
        for piece in &pieces {
            for (place, contestant) in &*contestants {
                contestant.work(*piece, &mut figures[*place]);
            }
        }
        contestants.rotate_left(1);
    }
}

/// The command of our own backend.
fn own() -> Vec<String> {
    let own = std::env::current_exe().expect("a process knows its program");
    vec![own.display().to_string(), SERVE.to_owned()]
}

/// The kernel of a daemon's VMs.
pub(crate) fn kernel(daemon: &Daemon) -> Kernel {
    let assets = fs::read_dir(daemon.state().join("assets")).expect("the daemon has assets");
    let found = assets.flatten().map(|entry| entry.path()).find(|path| path.join("vmlinux").is_file());
    Kernel::load(&found.expect("the daemon has a kernel"))
}

/// Runs Nexus's backend as a separate process, as in a VM's shim.
pub(crate) fn serve(arguments: &[String]) -> ExitCode {
    let [cid, vhost, uds] = arguments else { return ExitCode::FAILURE };
    let cid = cid.parse().expect("the context id is a number");
    let mut backend = Backend::start(cid, Path::new(vhost), Path::new(uds)).expect("start the backend");
    backend.wait();
    ExitCode::SUCCESS
}

/// The measurements of one backend, with all of its guests.
#[derive(Default)]
struct Figures {
    connects: Boots,
    round_trips: Boots,
    /// To and from the guest, for each of [`WRITES`].
    bulk: [[Boots; 2]; WRITES.len()],
    processor: Duration,
    private_kib: u64,
}

/// A repeated action, with one guest after another.
#[derive(Default)]
struct Boots(Vec<Samples>);

impl Boots {
    fn add(&mut self, sample: Duration) {
        self.0.last_mut().expect("a guest was booted").add(sample);
    }

    /// The samples of all guests together.
    fn all(&self) -> Samples {
        self.0.iter().fold(Samples::default(), |mut all, boot| {
            all.extend(boot.iter());
            all
        })
    }

    /// The ratio of durations to the other's: the geometric mean of the ratios of medians per boot.
    fn ratio(&self, other: &Self) -> f64 {
        let ratios = self.0.iter().zip(&other.0);
        let logarithms =
            ratios.map(|(own, other)| (own.p50().as_secs_f64() / other.p50().as_secs_f64()).ln());
        (logarithms.sum::<f64>() / self.0.len() as f64).exp()
    }
}

impl Figures {
    /// Further samples belong to another guest.
    fn begin_boot(&mut self) {
        let bulk = self.bulk.iter_mut().flatten();
        for boots in [&mut self.connects, &mut self.round_trips].into_iter().chain(bulk) {
            boots.0.push(Samples::default());
        }
    }

    /// Records the resource use of a backend's process.
    fn note(&mut self, process: u32) {
        self.processor += processor_time(process);
        self.private_kib = self.private_kib.max(private_kib(process));
    }
}

/// A backend and its guest.
struct Contestant {
    guest: Option<Guest>,
    backend: Child,
    directory: tempfile::TempDir,
}

impl Contestant {
    fn start(kernel: &Kernel, command: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("make a directory");
        let backend = Command::new(&command[0])
            .args(&command[1..])
            .args([&CID.to_string(), VHOST, VSOCK])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        // Complete from here on, so that the backend ends with it if anything fails.
        let mut contestant = Self { guest: None, backend, directory };
        let directory = contestant.directory.path();
        until("the backend's sockets", || {
            (directory.join(VHOST).exists() && directory.join(VSOCK).exists()).then_some(())
        });
        contestant.guest.insert(Guest::start(kernel, directory)).wait_for_hello();
        contestant
    }

    fn ask(&self, request: &str) -> UnixStream {
        let mut stream = dial(self.directory.path(), PORT).expect("connect to the guest");
        stream.write_all(request.as_bytes()).expect("ask the guest");
        stream
    }

    fn work(&self, piece: Piece, figures: &mut Figures) {
        match piece {
            Piece::Connects => {
                for _ in 0..CONNECTS {
                    // Waits until the guest has finished with the connection before.
                    std::thread::park_timeout(PAUSE);
                    let start = Instant::now();
                    dial(self.directory.path(), PORT).expect("connect to the guest");
                    figures.connects.add(start.elapsed());
                }
            }
            Piece::RoundTrips => {
                let mut echo = self.ask("echo\n");
                let (message, mut answer) = ([7; 100], [0; 100]);
                for _ in 0..ROUND_TRIPS {
                    let start = Instant::now();
                    echo.write_all(&message).expect("write to the guest");
                    echo.read_exact(&mut answer).expect("read from the guest");
                    figures.round_trips.add(start.elapsed());
                }
            }
            Piece::ToGuest(at) => {
                let buffer = vec![7; WRITES[at]];
                let mut stream = self.ask(&format!("sink {BULK}\n"));
                let start = Instant::now();
                for _ in 0..BULK / buffer.len() {
                    stream.write_all(&buffer).expect("write to the guest");
                }
                let mut done = [0; 5];
                stream.read_exact(&mut done).expect("hear that the guest has all");
                figures.bulk[at][0].add(start.elapsed());
            }
            Piece::FromGuest(at) => {
                let mut buffer = vec![0; WRITES[WRITES.len() - 1]];
                let mut stream = self.ask(&format!("source {BULK} {}\n", WRITES[at]));
                let (start, mut seen) = (Instant::now(), 0);
                while seen < BULK {
                    let count = stream.read(&mut buffer).expect("read from the guest");
                    assert!(count > 0, "the guest's stream ended after {seen} bytes");
                    seen += count;
                }
                figures.bulk[at][1].add(start.elapsed());
            }
        }
    }
}

fn report(ours: &Figures, yardstick: Option<(&str, &Figures)>) -> Table {
    let other = yardstick.map(|(_, figures)| figures);
    let mut table = Table::new("The vsock device with a real VM");
    let latencies = [
        ("CONNECT + OK, p50 / p99", &ours.connects, other.map(|other| &other.connects)),
        ("100-byte round trip, p50 / p99", &ours.round_trips, other.map(|other| &other.round_trips)),
    ];
    for (what, ours, other) in latencies {
        let pair = |boots: &Boots| boots.all().pair(0.5, 0.99);
        match other {
            None => table.told(what, pair(ours), "", ""),
            Some(other) => {
                let ratio = ours.ratio(other);
                let verdict = ("no slower", ratio <= NO_SLOWER);
                table.judged(what, pair(ours), pair(other), format!("{ratio:.2} x the time"), verdict);
            }
        }
    }
    for (at, size) in WRITES.into_iter().enumerate() {
        for (way, name) in ["host to guest", "guest to host"].into_iter().enumerate() {
            let what = format!("64 MiB {name}, {} KiB writes, median", size >> 10);
            let rate = |figures: &Figures| {
                let median = figures.bulk[at][way].all().p50();
                format!("{:.0} MiB/s", (BULK / MIB) as f64 / median.as_secs_f64())
            };
            match other {
                None => table.told(what, rate(ours), "", ""),
                Some(other) => {
                    let ratio = other.bulk[at][way].ratio(&ours.bulk[at][way]);
                    let verdict = ("no slower", ratio * NO_SLOWER >= 1.0);
                    table.judged(what, rate(ours), rate(other), format!("{ratio:.2} x"), verdict);
                }
            }
        }
    }
    let spent =
        |figures: &Figures| format!("{:.2} s, {} KiB", figures.processor.as_secs_f64(), figures.private_kib);
    table.told("processor time and private memory", spent(ours), other.map(spent).unwrap_or_default(), "");
    if let Some((path, _)) = yardstick {
        let name = path.rsplit('/').next().unwrap_or_default();
        table.note(format!("The yardstick is {name}; nothing stalled."));
    }
    table
}

/// A guest that echoes its input, with our own backend.
pub(crate) struct Echo {
    stream: UnixStream,
    _guest: Contestant,
}

impl Echo {
    /// Boots it with the kernel of a daemon's VMs.
    pub(crate) fn start(daemon: &Daemon) -> Self {
        let guest = Contestant::start(&kernel(daemon), &own());
        Self { stream: guest.ask("echo\n"), _guest: guest }
    }

    /// Sends 100 bytes and receives them back, many times.
    pub(crate) fn round_trips(&mut self, times: usize) -> Vec<Duration> {
        let (message, mut answer) = ([7; 100], [0; 100]);
        let round_trip = |_| {
            let start = Instant::now();
            self.stream.write_all(&message).expect("write to the guest");
            self.stream.read_exact(&mut answer).expect("read from the guest");
            start.elapsed()
        };
        (0..times).map(round_trip).collect()
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        drop(self.guest.take());
        self.backend.kill().expect("end the backend");
        self.backend.wait().expect("wait for the backend");
    }
}

/// The CPU time of a process, in user and kernel mode: fields 14 and 15 of `stat`, in ticks of 10 ms.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("read a process's times");
    let (_, fields) = stat.rsplit_once(')').expect("a process's name is in brackets");
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
    Duration::from_millis(10 * ticks.sum::<u64>())
}
