//! Tests of the device with real host sockets and packets of a guest, without rings.

use std::io::{Read, Write};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::connection::BUFFER_SPACE;
use crate::hybrid::{FAR_CONNECTIONS_MAX, Hybrid, traits};
use crate::packet::{HOST_CID, SHUT_BOTH, SHUT_SEND};

const CID: u32 = 5;

struct Bench {
    device: Device<Hybrid>,
    directory: TempDir,
    payload: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let hybrid = Hybrid::new(&directory.path().join("v.sock"), false).unwrap();
        let device = Device::new(traits(CID.into(), |_| {}), hybrid).unwrap();
        Self { device, directory, payload: vec![7; BUFFER_SPACE as usize] }
    }

    fn dial(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("v.sock")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn connect(&mut self, first: &[u8]) -> UnixStream {
        let mut stream = self.dial();
        stream.write_all(first).unwrap();
        // One call handles a limited number of events.
        for _ in 0..10 {
            self.device.poll();
        }
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.directory.path().join(format!("v.sock_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// Returns all packets for the guest.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = vec![];
        while self.device.has_packet(0) {
            self.device.next_packet(0, 4052, |header, payload| all.push((*header, payload.to_vec())));
            assert!(all.len() < 10_000, "there is no end to it");
        }
        all
    }

    /// Returns the only packet for the guest.
    fn packet(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        let mut all = self.packets();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].0.operation(), Some(operation));
        all.remove(0)
    }

    fn send(&mut self, header: Header) {
        self.device.receive(0, &header, &self.payload[..header.length as usize]);
    }

    fn is_empty(&self) -> bool {
        let device = &self.device;
        assert_eq!(device.counts.all, device.slots.len());
        device.slots.is_empty()
            && device.tokens.is_empty()
            && device.lanes[0].senders.is_empty()
            && device.counts == Counts::default()
    }

    /// Opens a connection from the host. Returns its socket and the header for the guest's answers.
    fn open(&mut self) -> (UnixStream, Header) {
        let mut stream = self.connect(b"CONNECT 200\n");
        let (request, _) = self.packet(Operation::Request);
        let header = answer(&request, Operation::Response);
        self.send(header);
        let mut line = [0; 100];
        let count = stream.read(&mut line).unwrap();
        assert_eq!(line[..count], *format!("OK {}\n", request.source_port).as_bytes());
        (stream, header)
    }
}

fn answer(header: &Header, operation: Operation) -> Header {
    Header {
        source_cid: header.destination_cid,
        destination_cid: header.source_cid,
        source_port: header.destination_port,
        destination_port: header.source_port,
        operation: operation as u16,
        kind: STREAM,
        buffer_space: 65_536,
        ..Header::default()
    }
}

fn request(guest: u32, host: u32) -> Header {
    let to = Header { source_cid: HOST_CID, destination_cid: CID.into(), ..Header::default() };
    Header { source_port: guest, destination_port: host, ..answer(&to, Operation::Request) }
}

/// Returns whether the other end is closed.
fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 16]) {
        Ok(0) => true,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}

#[test]
fn no_byte_behind_the_line_is_lost_however_it_comes() {
    let mut bench = Bench::new();
    let mut stream = bench.connect(b"CONNECT 200\nand more");
    let (request, _) = bench.packet(Operation::Request);
    assert_eq!(request.destination_port, 200);
    bench.send(answer(&request, Operation::Response));
    let (header, payload) = bench.packet(Operation::Data);
    assert_eq!((header.length, &payload[..]), (8, &b"and more"[..]));
    assert!(!is_closed(&mut stream));

    let mut stream = bench.dial();
    for byte in b"CONNECT 201" {
        stream.write_all(&[*byte]).unwrap();
        bench.device.poll();
        assert!(bench.packets().is_empty());
    }
    stream.write_all(b"\nx").unwrap();
    bench.device.poll();
    let (request, _) = bench.packet(Operation::Request);
    bench.send(answer(&request, Operation::Response));
    assert_eq!(bench.packet(Operation::Data).1, b"x");
}

#[test]
fn garbage_is_cut_off_and_so_is_who_says_nothing() {
    let mut bench = Bench::new();
    let long = [b'x'; 33];
    for first in
        [&b"GET / HTTP/1.1\r\n"[..], b"CONNECT -1\n", b"\n", &long, b"CONNECT 1                      \x00\n"]
    {
        assert!(is_closed(&mut bench.connect(first)), "{first:?}");
    }
    let mut silent = bench.connect(b"CONN");
    let mut slow = bench.connect(b"CONNECT 200\n");
    bench.device.tick(Instant::now() + GREETING_TIMEOUT / 2);
    assert_eq!(bench.device.slots.len(), 2);
    bench.device.tick(Instant::now() + GREETING_TIMEOUT);
    assert!(is_closed(&mut silent) && !is_closed(&mut slow));
    // The guest does not know of this connection, and gets no packet about it.
    bench.device.tick(Instant::now() + REQUEST_TIMEOUT);
    assert!(is_closed(&mut slow));
    assert!(bench.packets().is_empty() && bench.is_empty());
}

#[test]
fn a_request_that_is_not_answered_is_taken_back() {
    let mut bench = Bench::new();
    let mut stream = bench.connect(b"CONNECT 200\n");
    bench.packet(Operation::Request);
    bench.device.tick(Instant::now() + REQUEST_TIMEOUT);
    assert!(is_closed(&mut stream));
    bench.packet(Operation::Reset);
    // The host program gives up first.
    drop(bench.connect(b"CONNECT 200\n"));
    bench.device.poll();
    let all = bench.packets();
    assert!(all.is_empty(), "{all:?}");
    let stream = bench.connect(b"CONNECT 200\n");
    bench.packet(Operation::Request);
    drop(stream);
    bench.device.poll();
    bench.packet(Operation::Reset);
    assert!(bench.is_empty());
}

#[test]
fn host_connections_are_bounded_and_the_guest_is_not_locked_out() {
    let mut bench = Bench::new();
    let listener = bench.listen(5000);
    let mut silent: Vec<_> = (0..GREETINGS_MAX + 10)
        .map(|_| {
            let stream = bench.dial();
            bench.device.poll();
            stream
        })
        .collect();
    assert_eq!(bench.device.slots.len(), GREETINGS_MAX);
    assert_eq!(silent.iter_mut().filter_map(|stream| is_closed(stream).then_some(())).count(), 10);
    drop(silent);
    bench.device.poll();
    assert!(bench.is_empty());

    let streams: Vec<_> = (0..CONNECTIONS_MAX).map(|_| bench.connect(b"CONNECT 200\n")).collect();
    assert!(is_closed(&mut bench.connect(b"CONNECT 200\n")));
    assert_eq!(bench.packets().len(), CONNECTIONS_MAX);
    bench.send(request(2000, 5000));
    assert_eq!(bench.packet(Operation::Reset).0.destination_port, 2000);
    drop(streams);
    for _ in 0..10 {
        bench.device.poll();
    }
    bench.packets();
    bench.send(request(2000, 5000));
    bench.packet(Operation::Response);
    listener.accept().unwrap();
}

#[test]
fn the_guest_opens_no_more_than_its_share() {
    let mut bench = Bench::new();
    let listener = bench.listen(5000);
    let mut accepted = vec![];
    for guest in 0..FAR_CONNECTIONS_MAX as u32 {
        bench.send(request(guest + 1, 5000));
        accepted.push(listener.accept().unwrap().0);
        bench.packet(Operation::Response);
    }
    bench.send(request(3000, 5000));
    bench.packet(Operation::Reset);
    bench.open();
    bench.device.far_reset(0);
    bench.packets();
    assert!(bench.is_empty());
    assert!(accepted.iter_mut().all(is_closed));
}

#[test]
fn the_hello_port_is_for_root_in_the_guest() {
    let mut bench = Bench::new();
    let listener = bench.listen(1024);
    for guest in [1024, 5000, u32::MAX] {
        bench.send(request(guest, 1024));
        bench.packet(Operation::Reset);
    }
    bench.send(request(1023, 1024));
    bench.packet(Operation::Response);
    listener.accept().unwrap();
    bench.send(request(1022, 1025));
    bench.packet(Operation::Reset);
}

#[test]
fn packets_of_other_guests_and_kinds_change_nothing() {
    let mut bench = Bench::new();
    let _listener = bench.listen(5000);
    for wrong in [
        Header { source_cid: 6, ..request(2000, 5000) },
        Header { destination_cid: 3, ..request(2000, 5000) },
        Header { kind: 2, ..request(2000, 5000) },
        Header { operation: Operation::Data as u16, length: 10, ..request(2000, 5000) },
        Header { operation: 99, ..request(2000, 5000) },
    ] {
        bench.send(wrong);
        bench.packet(Operation::Reset);
        assert!(bench.is_empty());
    }
    bench.send(Header { operation: Operation::Reset as u16, ..request(2000, 5000) });
    assert!(bench.packets().is_empty());
}

#[test]
fn what_the_guest_sent_before_its_end_still_arrives() {
    let mut bench = Bench::new();
    for last in [
        |header: Header| Header { operation: Operation::Reset as u16, ..header },
        |header: Header| Header { operation: Operation::Shutdown as u16, flags: SHUT_BOTH, ..header },
    ] {
        let (mut stream, header) = bench.open();
        let mut sent = 0;
        while bench
            .device
            .slots
            .values()
            .all(|slot| !matches!(slot, Slot::Live(live) if live.connection.held() > 100_000))
        {
            bench.send(Header { operation: Operation::Data as u16, length: 10_000, ..header });
            sent += 10_000;
        }
        bench.send(last(header));
        bench.packets();
        assert_eq!(bench.device.slots.len(), 1);
        let (mut seen, mut bytes) = (0, vec![0; 30_000]);
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => seen += count,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            bench.device.poll();
        }
        assert_eq!(seen, sent);
        assert!(bench.is_empty());
    }
}

#[test]
fn a_closed_host_end_is_told_and_let_go_of() {
    let mut bench = Bench::new();
    let (stream, header) = bench.open();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    bench.device.poll();
    assert_eq!(bench.packet(Operation::Shutdown).0.flags, SHUT_SEND);
    drop(stream);
    bench.device.poll();
    assert_eq!(bench.packet(Operation::Shutdown).0.flags, SHUT_BOTH);
    bench.send(Header { operation: Operation::Reset as u16, ..header });
    assert!(bench.is_empty());
    // A guest that never answers.
    drop(bench.open());
    bench.device.poll();
    bench.packet(Operation::Shutdown);
    bench.device.tick(Instant::now() + CLOSING_TIMEOUT);
    bench.packet(Operation::Reset);
    assert!(bench.is_empty());
}

#[test]
fn a_guest_that_takes_nothing_makes_nothing_grow() {
    let mut bench = Bench::new();
    let listener = bench.listen(5000);
    bench.send(request(1, 5000));
    for guest in 0..5000 {
        bench.send(request(2 + guest % 3, 5000));
        bench.send(Header { operation: Operation::Reset as u16, ..request(2 + guest % 3, 5000) });
        bench.send(Header { operation: 99, ..request(9, 9) });
        while listener.accept().is_ok() {}
        assert!(bench.device.has_packet(0));
    }
    assert!(bench.device.lanes[0].senders.len() <= 4, "{}", bench.device.lanes[0].senders.len());
    assert_eq!(bench.device.lanes[0].answers.len(), ANSWERS_MAX);
}

#[derive(Debug, Clone)]
enum Step {
    Packet { known: bool, which: usize, header: Header },
    Dial { good: bool },
    HostWrites { which: usize, count: usize },
    HostReads { which: usize },
    HostEnds { which: usize },
    HostCloses { which: usize },
    Receive { count: usize },
    GuestReset,
    Tick { seconds: u64 },
}

fn header() -> impl Strategy<Value = Header> {
    let often = |common: u64| prop_oneof![40 => Just(common), 1 => 0..9u64];
    let operation = prop_oneof![
        4 => Just(1u16), 6 => Just(2u16), 1 => Just(3u16), 2 => Just(4u16), 20 => Just(5u16), 4 => Just(6u16),
        4 => Just(7u16), 1 => any::<u16>(),
    ];
    let number = || prop_oneof![Just(0u32), Just(65_536u32), any::<u32>()];
    let length = prop_oneof![0..200u32, 0..70_000u32];
    (often(CID.into()), often(2), 0..2000u32, length, operation, 0..5u32, number(), number()).prop_map(
        |(source_cid, destination_cid, source_port, length, operation, flags, buffer_space, forwarded)| {
            Header {
                source_cid,
                destination_cid,
                source_port,
                destination_port: 5000,
                length,
                kind: STREAM,
                operation,
                flags,
                buffer_space,
                forwarded,
            }
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..1000usize;
    prop_oneof![
        40 => (any::<bool>(), which.clone(), header())
            .prop_map(|(known, which, header)| Step::Packet { known, which, header }),
        8 => prop::bool::weighted(0.9).prop_map(|good| Step::Dial { good }),
        8 => (which.clone(), 1..100_000usize).prop_map(|(which, count)| Step::HostWrites { which, count }),
        10 => which.clone().prop_map(|which| Step::HostReads { which }),
        2 => which.clone().prop_map(|which| Step::HostEnds { which }),
        4 => which.prop_map(|which| Step::HostCloses { which }),
        20 => (0..50usize).prop_map(|count| Step::Receive { count }),
        1 => Just(Step::GuestReset),
        1 => (0..40u64).prop_map(|seconds| Step::Tick { seconds }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn whatever_both_sides_do_memory_is_bounded_and_nothing_is_left_after_a_reset(
        steps in proptest::collection::vec(step(), 1..600),
    ) {
        let mut bench = Bench::new();
        let listener = bench.listen(5000);
        let mut streams: Vec<UnixStream> = vec![];
        let mut buffer = vec![0; 100_000];
        for step in steps {
            let count = streams.len().max(1);
            match step {
                Step::Packet { known, which, mut header } => {
                    let mut ports: Vec<Ports> = bench.device.tokens.keys().copied().collect();
                    ports.sort_by_key(|ports| (ports.near, ports.far));
                    if known && !ports.is_empty() {
                        let ports = ports[which % ports.len()];
                        (header.source_port, header.destination_port) = (ports.far, ports.near);
                    }
                    bench.send(header);
                    streams.extend(std::iter::from_fn(|| listener.accept().ok()).map(|(stream, _)| {
                        stream.set_nonblocking(true).unwrap();
                        stream
                    }));
                }
                Step::Dial { good } => {
                    let mut stream = bench.dial();
                    stream.write_all(if good { b"CONNECT 77\nhello" } else { b"CONNECT" }).unwrap();
                    streams.push(stream);
                }
                Step::HostWrites { which, count } => {
                    if let Some(mut stream) = streams.get(which % count) {
                        // Fails if the device has closed the connection.
                        let _written = stream.write(&buffer[..count]).unwrap_or(0);
                    }
                }
                Step::HostReads { which } => {
                    if let Some(stream) = streams.get_mut(which % count) {
                        let _read = stream.read(&mut buffer).unwrap_or(0);
                    }
                }
                Step::HostEnds { which } => {
                    if let Some(stream) = streams.get_mut(which % count) {
                        stream.shutdown(std::net::Shutdown::Write).ok();
                    }
                }
                Step::HostCloses { which } => {
                    if !streams.is_empty() {
                        streams.swap_remove(which % count);
                    }
                }
                Step::Receive { count } => {
                    for _ in 0..count {
                        if bench.device.has_packet(0) {
                            bench.device.next_packet(0, 4052, |header, payload| {
                                assert_eq!(header.length as usize, payload.len());
                                assert!(payload.len() <= 4052);
                            });
                        }
                    }
                }
                Step::GuestReset => bench.device.far_reset(0),
                Step::Tick { seconds } => bench.device.tick(Instant::now() + Duration::from_secs(seconds)),
            }
            bench.device.poll();
            let device = &bench.device;
            prop_assert!(device.slots.len() <= CONNECTIONS_MAX);
            prop_assert_eq!(device.slots.len(), device.counts.all);
            prop_assert!(device.tokens.len() <= device.slots.len());
            prop_assert!(device.lanes[0].senders.len() <= device.slots.len());
            prop_assert!(device.lanes[0].answers.len() <= ANSWERS_MAX);
            for slot in device.slots.values() {
                let memory = match slot {
                    Slot::Greeting { stream, .. } | Slot::Draining { stream, .. } => stream.memory(),
                    Slot::Live(live) => {
                        prop_assert!(live.connection.held() <= BUFFER_SPACE);
                        live.stream.memory()
                    }
                    Slot::Closing { .. } => 0,
                };
                // A queue's capacity may be twice its content.
                prop_assert!(memory <= 2 * BUFFER_SPACE as usize + (64 << 10));
            }
        }
        // After a reset of the driver and the end of all host programs, nothing is left.
        streams.clear();
        bench.device.far_reset(0);
        for _ in 0..20 {
            bench.device.poll();
        }
        bench.device.far_reset(0);
        bench.packets();
        prop_assert!(bench.is_empty(), "{:?}", bench.device.slots);
        // The device still works.
        bench.open();
    }
}
