//! Tests of both sides against each other, over sockets in place of ports.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use nexus_schema::link::{EGRESS_PORT, MCP_PORT, STREAM_PORT};
use tempfile::TempDir;

use super::*;
use crate::hybrid::Hybrid;
use crate::packet::{Header, Operation};
use crate::pairs::Pairs;
use crate::serial::{self, LANES};

fn nonce(text: &str) -> Nonce {
    text.parse().unwrap()
}

struct Side<F> {
    device: Device<F>,
    lanes: Vec<(Lane, UnixStream)>,
}

impl<F: Front> Side<F> {
    /// Does all that there is to do.
    fn turn(&mut self) -> io::Result<()> {
        while self.device.poll() {}
        for (lane, port) in &mut self.lanes {
            while lane.receive(&mut self.device, |room| (&*port).read(room))? == Pause::Turn {}
        }
        while self.device.poll() {}
        for (lane, port) in &mut self.lanes {
            while lane.send(&mut self.device, |bytes| (&*port).write(bytes))? == Pause::Turn {}
        }
        Ok(())
    }
}

struct Bench {
    host: Side<Hybrid>,
    guest: Side<Pairs>,
    directory: TempDir,
}

fn pair() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    (near, far)
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let hybrid = Hybrid::new(&directory.path().join("v.sock"), true).unwrap();
        let (of_host, of_guest) = (serial::host(|_| {}), serial::guest(|_| {}));
        let mut host = Side { device: Device::new(of_host, hybrid).unwrap(), lanes: vec![] };
        let front = Pairs::new(&[MCP_PORT, STREAM_PORT]);
        let mut guest = Side { device: Device::new(of_guest, front).unwrap(), lanes: vec![] };
        for index in 0..LANES {
            let (near, far) = pair();
            host.lanes.push((Lane::of_host(index, of_host.cids), near));
            guest.lanes.push((Lane::of_guest(index, of_guest.cids, nonce("first")), far));
        }
        Self { host, guest, directory }
    }

    fn turn(&mut self) {
        for _ in 0..20 {
            self.guest.turn().unwrap();
            self.host.turn().unwrap();
        }
    }

    fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("v.sock")).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.directory.path().join(format!("v.sock_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// Connects from the host. Returns the ends of the host's and the guest's program.
    fn connect(&mut self, port: u32) -> (UnixStream, UnixStream) {
        let mut near = self.dial(port);
        self.turn();
        let (accepted, far) = self.guest.device.front_mut().take().unwrap();
        assert_eq!(accepted, port);
        let mut line = [0; 64];
        let count = near.read(&mut line).unwrap();
        assert!(line[..count].starts_with(b"OK ") && line[..count].ends_with(b"\n"));
        (near, far.into())
    }

    /// Connects from the guest.
    fn connect_back(&mut self, listener: &UnixListener, port: u32) -> (UnixStream, UnixStream) {
        let (device, program): (UnixStream, OwnedFd) = Pairs::make().unwrap();
        self.guest.device.dial(device, port).unwrap();
        self.turn();
        let (accepted, _) = listener.accept().unwrap();
        accepted.set_nonblocking(true).unwrap();
        (program.into(), accepted)
    }

    /// Returns what a program still reads before its connection is closed.
    fn rest(&mut self, stream: &mut UnixStream) -> Vec<u8> {
        let (mut rest, mut chunk) = (Vec::new(), vec![0; 100_000]);
        for _ in 0..10_000 {
            match stream.read(&mut chunk) {
                Ok(0) => return rest,
                Ok(count) => rest.extend_from_slice(&chunk[..count]),
                // What it wrote itself was not read.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return rest,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            self.host.turn().unwrap();
            self.guest.turn().unwrap();
        }
        panic!("it is not closed");
    }

    /// Sends bytes from one program to the other, which are read at once.
    fn carry(&mut self, from: &mut UnixStream, to: &mut UnixStream, length: usize) {
        let sent: Vec<u8> = (0..length).map(|n| (n * 31 / 7) as u8).collect();
        let (mut written, mut received, mut chunk) = (0, Vec::new(), vec![0; 100_000]);
        for _ in 0..10_000 {
            if written < length {
                written += from.write(&sent[written..]).unwrap_or(0);
            }
            self.guest.turn().unwrap();
            self.host.turn().unwrap();
            let count = to.read(&mut chunk).unwrap_or(0);
            received.extend_from_slice(&chunk[..count]);
            if received.len() >= length {
                break;
            }
        }
        assert!(received == sent, "{} of {length} bytes", received.len());
    }
}

fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Ok(0))
}

#[test]
fn both_sides_connect_and_everything_comes_over() {
    let mut bench = Bench::new();
    // Connections wait for the session.
    let mut early = bench.dial(MCP_PORT);
    bench.host.turn().unwrap();
    assert!(!is_closed(&mut early));
    bench.turn();
    assert_eq!(bench.guest.device.front_mut().take().unwrap().0, MCP_PORT);

    for port in [MCP_PORT, STREAM_PORT] {
        let (mut near, mut far) = bench.connect(port);
        bench.carry(&mut near, &mut far, 3_000_000);
        bench.carry(&mut far, &mut near, 3_000_000);
        drop(near);
        bench.turn();
        assert!(is_closed(&mut far));
    }
    let listener = bench.listen(EGRESS_PORT);
    let (mut program, mut daemon) = bench.connect_back(&listener, EGRESS_PORT);
    bench.carry(&mut program, &mut daemon, 500_000);
    bench.carry(&mut daemon, &mut program, 500_000);
    drop(daemon);
    bench.turn();
    assert!(is_closed(&mut program));
}

#[test]
fn who_asks_for_a_port_that_nobody_serves_is_refused() {
    let mut bench = Bench::new();
    let mut near = bench.dial(22);
    bench.turn();
    assert!(is_closed(&mut near));
    let (device, program) = Pairs::make().unwrap();
    bench.guest.device.dial(device, 5000).unwrap();
    bench.turn();
    assert!(is_closed(&mut program.into()));
}

#[test]
fn an_unread_stream_stops_no_other() {
    let mut bench = Bench::new();
    let (mut stuffed, _unread) = bench.connect(STREAM_PORT);
    let mut written = 0;
    while let Ok(count) = stuffed.write(&[7; 50_000]) {
        written += count;
        bench.turn();
    }
    assert!(written < 3_000_000, "{written} bytes wait somewhere");
    let (mut near, mut far) = bench.connect(STREAM_PORT);
    bench.carry(&mut near, &mut far, 1_000_000);
}

#[test]
fn after_a_relink_old_connections_are_closed_old_bytes_are_gone_and_new_connections_work() {
    let mut bench = Bench::new();
    let mut old: Vec<UnixStream> = vec![];
    for port in [MCP_PORT, STREAM_PORT, STREAM_PORT] {
        let (mut near, mut far) = bench.connect(port);
        // Bulk in both directions that is on its way.
        assert!(near.write(&[1; 150_000]).unwrap() > 0);
        assert!(far.write(&[2; 150_000]).unwrap() > 0);
        old.extend([near, far]);
    }
    for _ in 0..3 {
        bench.guest.turn().unwrap();
    }
    while bench.host.device.poll() {}

    // As after a restore: other sockets, in which the tail of a packet may be left, and a guest that knows nothing of it yet.
    let again = nonce("second");
    let mut fresh = vec![];
    for (lane, port) in &mut bench.host.lanes {
        let (near, far) = pair();
        lane.wait_for(&mut bench.host.device, again);
        *port = near;
        (&far).write_all(&[9; 777]).unwrap();
        fresh.push(far);
    }
    let _early = bench.dial(STREAM_PORT);
    bench.host.turn().unwrap();
    // The guest's agent opens its ports anew.
    for ((lane, port), far) in bench.guest.lanes.iter_mut().zip(fresh) {
        let index = lane.index;
        lane.end(&mut bench.guest.device);
        *lane = Lane::of_guest(index, serial::guest(|_| {}).cids, again);
        *port = far;
    }
    bench.turn();
    assert!(bench.host.lanes.iter().all(|(lane, _)| lane.is_open()));
    assert!(bench.guest.lanes.iter().all(|(lane, _)| lane.is_open()));
    for (at, stream) in old.iter_mut().enumerate() {
        let rest = bench.rest(stream);
        // The host wrote ones, the guest twos: nobody gets what it wrote itself, nor bytes of another kind.
        let others = if at % 2 == 0 { 2 } else { 1 };
        assert!(rest.iter().all(|byte| *byte == others), "stream {at}");
    }
    let (accepted, _) = bench.guest.device.front_mut().take().unwrap();
    assert_eq!(accepted, STREAM_PORT, "one that came meanwhile waited");
    let (mut near, mut far) = bench.connect(STREAM_PORT);
    bench.carry(&mut near, &mut far, 1_000_000);
    bench.carry(&mut far, &mut near, 1_000_000);
}

#[test]
fn a_guest_that_takes_more_than_its_credit_or_speaks_garbage_loses_what_it_has_and_no_more() {
    let mut bench = Bench::new();
    let (mut near, _far) = bench.connect(STREAM_PORT);
    let (mut calls, mut served) = bench.connect(MCP_PORT);
    // More than was granted, for a connection that the host knows: the guest's own state machine would not do so.
    let ports = bench.guest.lanes[1].1.try_clone().unwrap();
    let mut header = Header {
        source_cid: 3,
        destination_cid: 2,
        source_port: STREAM_PORT,
        destination_port: 0x4000_0001,
        kind: crate::packet::STREAM,
        operation: Operation::Data as u16,
        length: 32_000,
        ..Header::default()
    };
    for _ in 0..30 {
        let _full = (&ports).write(&[&header.encode()[..], &[7; 32_000]].concat());
        bench.host.turn().unwrap();
    }
    let taken = bench.rest(&mut near);
    assert!(taken.len() < 900_000, "{} bytes", taken.len());

    header.length = u32::MAX;
    let _full = (&ports).write(&header.encode());
    bench.host.turn().unwrap();
    assert!(!bench.host.lanes[1].0.is_open(), "it has to begin anew");
    bench.carry(&mut calls, &mut served, 100_000);
    for _ in 0..1000 {
        let _full = (&ports).write(&[0xff; 32_000]);
        bench.host.turn().unwrap();
    }
    bench.carry(&mut served, &mut calls, 100_000);
}
