//! The vsock backend with a real QEMU and a real guest.

#![expect(clippy::unwrap_used, reason = "what fails in a test ends it")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nexus_core::internals::Backend;
use nexus_tests::vsock::{CID, Guest, Kernel, PATIENCE, PORT, VHOST, VSOCK, dial, pattern, read_line, until};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

const MIB: usize = 1 << 20;

/// A guest that is about to boot, and its backend.
struct Bench {
    guest: Guest,
    backend: Backend,
    directory: tempfile::TempDir,
}

fn start() -> Bench {
    let kernel = Kernel::find(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let directory = tempfile::tempdir().unwrap();
    let backend = Backend::start(CID, &directory.path().join(VHOST), &directory.path().join(VSOCK)).unwrap();
    let guest = Guest::start(&kernel, directory.path());
    Bench { guest, backend, directory }
}

fn booted() -> Bench {
    let mut bench = start();
    let mut hello = bench.guest.wait_for_hello();
    assert_eq!(read_line(&mut hello).unwrap(), "up");
    bench
}

impl Bench {
    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn ask(&self, request: &str) -> UnixStream {
        let mut stream = dial(self.path(), PORT).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn echo(&self) {
        let mut stream = self.ask("echo\n");
        round_trip(&mut stream, 100);
    }
}

fn round_trip(stream: &mut UnixStream, size: usize) {
    let mut sent = vec![0; size];
    pattern::fill(&pattern::pattern(), size, &mut sent);
    stream.write_all(&sent).unwrap();
    let mut received = vec![0; size];
    stream.read_exact(&mut received).unwrap();
    assert!(sent == received);
}

/// Sends `total` bytes to the guest, which compares them.
fn send_checked(bench: &Bench, total: usize, size: usize) {
    let pattern = pattern::pattern();
    let mut stream = bench.ask(&format!("check {total}\n"));
    let (mut sent, mut bytes) = (0, vec![0; size]);
    while sent < total {
        let count = size.min(total - sent);
        pattern::fill(&pattern, sent, &mut bytes[..count]);
        stream.write_all(&bytes[..count]).unwrap();
        sent += count;
    }
    assert_eq!(read_line(&mut stream).unwrap(), "done");
}

/// Has the guest send `total` bytes in writes of `size`, and compares them.
fn receive_checked(bench: &Bench, total: usize, size: usize) {
    let pattern = pattern::pattern();
    let mut stream = bench.ask(&format!("source {total} {size}\n"));
    let (mut seen, mut bytes) = (0, vec![0; 300_000]);
    while seen < total {
        let count = stream.read(&mut bytes).unwrap();
        assert!(count > 0, "ended after {seen}");
        assert!(pattern::matches(&pattern, seen, &bytes[..count]), "wrong behind {seen}");
        seen += count;
    }
}

#[test]
fn bytes_arrive_whole_in_both_directions_with_every_write_size() {
    let bench = booted();
    let mut echo = bench.ask("echo\n");
    for size in [1, 100, 4096, 65_536, 100_000] {
        round_trip(&mut echo, size);
    }
    for size in [4 << 10, 64 << 10, 256 << 10] {
        send_checked(&bench, 64 * MIB, size);
        receive_checked(&bench, 64 * MIB, size);
    }
    // Sizes that fit nothing.
    send_checked(&bench, MIB + 1, 4053);
    receive_checked(&bench, MIB + 1, 65_537);
    bench.backend.stop();
}

#[test]
fn a_hundred_connections_at_once_do_not_mix() {
    let bench = booted();
    let mut streams: Vec<UnixStream> = (0..100).map(|_| bench.ask("echo\n")).collect();
    for round in 0..3 {
        for (at, stream) in streams.iter_mut().enumerate() {
            stream.write_all(format!("{round} of {at}\n").as_bytes()).unwrap();
        }
        for (at, stream) in streams.iter_mut().enumerate() {
            assert_eq!(read_line(stream).unwrap(), format!("{round} of {at}"));
        }
    }
    // One that nobody reads holds nobody up.
    let stuck = bench.ask(&format!("source {} 65536\n", 64 * MIB));
    let deaf = bench.ask("hold\n");
    deaf.set_nonblocking(true).unwrap();
    while (&deaf).write(&[0; 65_536]).is_ok() {}
    for stream in &mut streams {
        round_trip(stream, 1000);
    }
    receive_checked(&bench, 4 * MIB, 65_536);
    drop((stuck, deaf, streams));
    until("the connections to be gone", || {
        let streams: Vec<_> = (0..100).map_while(|_| dial(bench.path(), PORT).ok()).collect();
        (streams.len() == 100).then_some(())
    });
}

#[test]
fn many_at_once_are_refused_and_then_served_again() {
    let bench = booted();
    let mut streams = vec![];
    while let Ok(mut stream) = dial(bench.path(), PORT) {
        // Served before the next one comes: fewer may wait for the guest's program than the device lets through.
        stream.write_all(b"echo\n").unwrap();
        round_trip(&mut stream, 1);
        streams.push(stream);
        assert!(streams.len() < 1000, "no limit");
    }
    assert!(streams.len() >= 250, "only {}", streams.len());
    drop(streams);
    until("the guest to be reachable again", || dial(bench.path(), PORT).ok());
    bench.echo();
}

#[test]
fn connecting_from_the_first_moment_wedges_nothing() {
    let mut bench = start();
    let directory = bench.path().to_owned();
    let polling = std::thread::spawn(move || {
        let mut tries = 0;
        until("the guest to answer", || {
            tries += 1;
            // Some connections are given up before there is a driver.
            let early = UnixStream::connect(directory.join(VSOCK)).unwrap();
            (&early).write_all(b"CONNECT 300\n").unwrap();
            drop(early);
            dial(&directory, PORT).ok()
        })
    });
    bench.guest.wait_for_hello();
    let mut stream = polling.join().unwrap();
    stream.write_all(b"echo\n").unwrap();
    round_trip(&mut stream, 1000);
    bench.echo();
}

#[test]
fn stop_and_cont_under_load_lose_nothing() {
    let mut bench = booted();
    // So often that it was stopped in the middle, however fast it is.
    let mut pauses = 0;
    while pauses <= 3 {
        pauses += stop_and_cont(&mut bench, 48 * MIB);
    }
    let mut idle = bench.ask("echo\n");
    for _ in 0..50 {
        bench.guest.command("stop");
        idle.write_all(b"while stopped\n").unwrap();
        bench.guest.command("cont");
        assert_eq!(read_line(&mut idle).unwrap(), "while stopped");
    }
}

/// Stops the machine and lets it go on while so many bytes go in both directions; how often.
fn stop_and_cont(bench: &mut Bench, total: usize) -> u32 {
    let mut source = bench.ask(&format!("source {total} 65536\n"));
    let mut sink = bench.ask(&format!("check {total}\n"));
    let reading = std::thread::spawn(move || {
        let (pattern, mut seen, mut bytes) = (pattern::pattern(), 0, vec![0; 100_000]);
        while seen < total {
            let count = source.read(&mut bytes).unwrap();
            assert!(count > 0 && pattern::matches(&pattern, seen, &bytes[..count]), "behind {seen}");
            seen += count;
        }
    });
    let writing = std::thread::spawn(move || {
        let (pattern, mut sent, mut bytes) = (pattern::pattern(), 0, vec![0; 65_536]);
        while sent < total {
            let count = bytes.len().min(total - sent);
            pattern::fill(&pattern, sent, &mut bytes[..count]);
            sink.write_all(&bytes[..count]).unwrap();
            sent += count;
        }
        assert_eq!(read_line(&mut sink).unwrap(), "done");
    });
    let mut pauses = 0;
    while !reading.is_finished() || !writing.is_finished() {
        bench.guest.command("stop");
        bench.guest.command("cont");
        pauses += 1;
    }
    reading.join().unwrap();
    writing.join().unwrap();
    pauses
}

#[test]
fn a_guest_that_reboots_is_served_again_and_its_old_connections_end() {
    let mut bench = booted();
    for _ in 0..3 {
        let mut idle = bench.ask("echo\n");
        let mut busy = bench.ask(&format!("source {} 65536\n", 64 * MIB));
        busy.read_exact(&mut [0; 1000]).unwrap();
        let _deaf = bench.ask("hold\n");
        drop(bench.ask("reboot\n"));
        bench.guest.wait_for_hello();
        assert_eq!(idle.read(&mut [0; 10]).unwrap_or(0), 0);
        let mut rest = vec![];
        busy.read_to_end(&mut rest).ok();
        assert!(rest.len() < 64 * MIB);
        bench.echo();
        send_checked(&bench, MIB, 65_536);
    }
}

/// Connects without waiting; `None` when the backlog is full.
fn connect_at_once(path: &Path) -> Option<OwnedFd> {
    let address = SocketAddrUnix::new(path).unwrap();
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None)
            .unwrap();
    rustix::net::connect(&socket, &address).is_ok().then_some(socket)
}

#[test]
fn the_guest_reaches_host_ports_where_somebody_listens() {
    let mut bench = booted();
    let result = |request: &str| read_line(&mut bench.ask(request)).unwrap();
    const RESET: &str = "refused 104";
    assert_eq!(result("dial 5000 0\n"), RESET);

    let path = bench.path().join(format!("{VSOCK}_5000"));
    let listener = UnixListener::bind(&path).unwrap();
    let host = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(read_line(&mut stream).unwrap(), "hello from the guest");
        stream.write_all(b"hello from the host\n").unwrap();
        listener
    });
    assert_eq!(result("dial 5000 0\n"), "answered hello from the host");
    let listener = host.join().unwrap();
    // A listener that accepts no more, with as many waiting as it lets wait.
    rustix::net::listen(&listener, 1).unwrap();
    let waiting: Vec<_> = std::iter::from_fn(|| connect_at_once(&path)).collect();
    assert_eq!(result("dial 5000 0\n"), RESET);
    drop((waiting, listener));
    assert_eq!(result("dial 5000 0\n"), RESET);

    // The hello port is for root.
    assert_eq!(result("dial 1024 5000\n"), RESET);
    assert_eq!(result("dial 1024 0\n"), RESET);
    let mut privileged = bench.ask("dial 1024 900\n");
    let mut hello = bench.guest.wait_for_hello();
    assert_eq!(read_line(&mut hello).unwrap(), "hello from the guest");
    hello.write_all(b"welcome\n").unwrap();
    assert_eq!(read_line(&mut privileged).unwrap(), "answered welcome");
}

#[test]
fn ends_of_streams_arrive() {
    let bench = booted();
    // Nobody listens.
    assert!(dial(bench.path(), 999).is_err());
    // The host ends its direction and still reads.
    let mut half = bench.ask("half\n");
    half.write_all(&vec![1; 500_000]).unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_line(&mut half).unwrap(), "500000");
    assert_eq!(half.read(&mut [0; 10]).unwrap(), 0);
    // The guest ends the connection with bytes on their way.
    let mut sink = bench.ask("sink 10\n");
    sink.write_all(&[1; 10]).unwrap();
    let mut all = String::new();
    sink.read_to_string(&mut all).unwrap();
    assert_eq!(all, "done\n");
    // The host is gone in the middle, many times.
    for _ in 0..50 {
        let mut source = bench.ask(&format!("source {MIB} 65536\n"));
        source.read_exact(&mut [0; 100]).unwrap();
    }
    bench.echo();
}

#[test]
fn qemu_is_killed_and_another_one_served() {
    let bench = booted();
    let mut stream = bench.ask("echo\n");
    let Bench { guest, backend, directory } = bench;
    guest.kill();
    assert_eq!(stream.read(&mut [0; 10]).unwrap_or(0), 0);
    for name in ["q.sock", &format!("{VSOCK}_1024")] {
        std::fs::remove_file(directory.path().join(name)).unwrap();
    }
    let kernel = Kernel::find(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let mut guest = Guest::start(&kernel, directory.path());
    guest.wait_for_hello();
    let bench = Bench { guest, backend, directory };
    bench.echo();
    let path = bench.path().to_owned();
    bench.backend.stop();
    assert!(!path.join(VSOCK).exists() && !path.join(VHOST).exists());
}
