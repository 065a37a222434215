//! Measures the vsock backend with a real guest, next to others in the same run.
//!
//! `vsock-bench [--rounds N] [COMMAND]...`, where each COMMAND is another backend, started as `COMMAND CID VHOST UDS`, with the
//! guest's context id, the socket that QEMU connects to, and the hybrid socket. Backends take turns after each piece of
//! work, in changing order, so that a busy machine is busy for all of them.

#![expect(clippy::print_stdout, reason = "what is measured is printed")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nexus_core::vmm::vsock::Backend;
use nexus_tests::vsock::{CID, Guest, Kernel, PORT, VHOST, VSOCK, dial, until};

const MIB: usize = 1 << 20;
/// How much is sent in one go, in bytes.
const BULK: usize = 64 * MIB;
const WRITES: [usize; 3] = [4 << 10, 64 << 10, 256 << 10];
const CONNECTS: usize = 50;
const ROUND_TRIPS: usize = 500;

/// One piece of work.
#[derive(Clone, Copy)]
enum Piece {
    Connects,
    RoundTrips,
    /// With this one of [`WRITES`].
    ToGuest(usize),
    FromGuest(usize),
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "serve") {
        return serve(&arguments[1..]);
    }
    let mut rounds = 10;
    if arguments.first().is_some_and(|word| word == "--rounds") && arguments.len() > 1 {
        rounds = arguments[1].parse().expect("--rounds takes a number");
        arguments.drain(..2);
    }
    let own = std::env::current_exe().expect("know the own binary");
    let commands = std::iter::once(vec![own.display().to_string(), "serve".to_owned()])
        .chain(arguments.iter().map(|command| command.split(' ').map(str::to_owned).collect()));
    let kernel = Kernel::find(&std::env::temp_dir());
    let mut contestants: Vec<Contestant> =
        commands.enumerate().map(|(place, command)| Contestant::start(place, &kernel, &command)).collect();
    let bulk = (0..WRITES.len()).flat_map(|at| [Piece::ToGuest(at), Piece::FromGuest(at)]);
    let pieces: Vec<Piece> = [Piece::Connects, Piece::RoundTrips].into_iter().chain(bulk).collect();
    for _ in 0..rounds {
        for piece in &pieces {
            contestants.iter_mut().for_each(|contestant| contestant.work(*piece));
        }
        contestants.rotate_left(1);
    }
    contestants.sort_by_key(|contestant| contestant.place);
    println!("{}, {rounds} rounds, {} MiB each way", kernel.image.display(), BULK / MIB);
    for contestant in &mut contestants {
        contestant.report();
    }
    ExitCode::SUCCESS
}

/// The backend of Nexus as a process of its own, as it is in a VM's shim.
fn serve(arguments: &[String]) -> ExitCode {
    let [cid, vhost, uds] = arguments else { return ExitCode::FAILURE };
    let cid = cid.parse().expect("the context id is a number");
    let mut backend = Backend::start(cid, Path::new(vhost), Path::new(uds)).expect("start the backend");
    backend.wait();
    ExitCode::SUCCESS
}

struct Contestant {
    place: usize,
    name: String,
    guest: Option<Guest>,
    backend: Child,
    directory: tempfile::TempDir,
    connects: Vec<Duration>,
    round_trips: Vec<Duration>,
    /// To the guest and from it, for each of [`WRITES`].
    bulk: [[Vec<Duration>; 2]; WRITES.len()],
}

impl Contestant {
    fn start(place: usize, kernel: &Kernel, command: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("make a directory");
        let backend = Command::new(&command[0])
            .args(&command[1..])
            .args([&CID.to_string(), VHOST, VSOCK])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        until("the backend's sockets", || {
            (directory.path().join(VHOST).exists() && directory.path().join(VSOCK).exists()).then_some(())
        });
        let mut guest = Guest::start(kernel, directory.path());
        guest.wait_for_hello();
        let name = if command.len() > 1 && command[1] == "serve" { "nexus" } else { &command[0] };
        Self {
            place,
            name: name.to_owned(),
            guest: Some(guest),
            backend,
            directory,
            connects: vec![],
            round_trips: vec![],
            bulk: Default::default(),
        }
    }

    fn ask(&self, request: &str) -> UnixStream {
        let mut stream = dial(self.directory.path(), PORT).expect("connect to the guest");
        stream.write_all(request.as_bytes()).expect("ask the guest");
        stream
    }

    fn work(&mut self, piece: Piece) {
        match piece {
            Piece::Connects => {
                for _ in 0..CONNECTS {
                    let start = Instant::now();
                    dial(self.directory.path(), PORT).expect("connect to the guest");
                    self.connects.push(start.elapsed());
                }
            }
            Piece::RoundTrips => {
                let mut echo = self.ask("echo\n");
                let (message, mut answer) = ([7; 100], [0; 100]);
                for _ in 0..ROUND_TRIPS {
                    let start = Instant::now();
                    echo.write_all(&message).expect("write to the guest");
                    echo.read_exact(&mut answer).expect("read from the guest");
                    self.round_trips.push(start.elapsed());
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
                self.bulk[at][0].push(start.elapsed());
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
                self.bulk[at][1].push(start.elapsed());
            }
        }
    }

    fn report(&mut self) {
        let us = |duration: Duration| duration.as_secs_f64() * 1e6;
        let rate =
            |durations: &mut [Duration], part| (BULK / MIB) as f64 / quantile(durations, part).as_secs_f64();
        println!("\n{}", self.name);
        for (what, samples) in
            [("CONNECT + OK", &mut self.connects), ("100-byte round trip", &mut self.round_trips)]
        {
            println!(
                "  {what:22} p50 {:8.0} us   p99 {:8.0} us   ({} of them)",
                us(quantile(samples, 0.5)),
                us(quantile(samples, 0.99)),
                samples.len()
            );
        }
        for (size, [to_guest, from_guest]) in WRITES.into_iter().zip(&mut self.bulk) {
            println!(
                "  writes of {:3} KiB       host to guest p50 {:4.0} best {:4.0} MiB/s   guest to host p50 {:4.0} best {:4.0} MiB/s",
                size >> 10,
                rate(to_guest, 0.5),
                rate(to_guest, 0.0),
                rate(from_guest, 0.5),
                rate(from_guest, 0.0),
            );
        }
        println!(
            "  private memory         {} KiB, processor time {:.2} s",
            private_kib(self.backend.id()),
            processor_time(self.backend.id()).as_secs_f64()
        );
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        drop(self.guest.take());
        self.backend.kill().expect("end the backend");
        self.backend.wait().expect("wait for the backend");
    }
}

fn quantile(samples: &mut [Duration], part: f64) -> Duration {
    samples.sort();
    samples[((samples.len() - 1) as f64 * part).round() as usize]
}

/// How long a process has run, in its own code and in the kernel for it: fields 14 and 15 of `stat`, in ticks of 10 ms.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("read a process's times");
    let (_, fields) = stat.rsplit_once(')').expect("a process's name is in brackets");
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
    Duration::from_millis(10 * ticks.sum::<u64>())
}

/// What a process has in memory for itself alone, files' pages not counted.
fn private_kib(process: u32) -> u64 {
    let rollup =
        std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("read a process's memory");
    rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Private_Dirty:"))
        .filter_map(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .sum()
}
