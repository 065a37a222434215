//! Rings in memory, written by a correct driver and by a hostile one.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use nexus_vsock::{HOST_CID, Operation, STREAM, traits};
use proptest::prelude::*;
use tempfile::TempDir;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestAddressSpace;

use super::*;
use crate::vmm::vsock::vring::Memory;

const CID: u32 = 5;
const SIZE: u16 = 64;
const MEMORY: usize = 2 << 20;
const TRANSMIT: u64 = 0x1000;
const RECEIVE: u64 = 0x4000;
const BUFFERS: u64 = 0x10_000;

/// One ring as its driver sees it: descriptors, available and used ring, a page each from `base` on.
struct Driver {
    vring: Vring,
    base: u64,
    next: u16,
    available: u16,
}

impl Driver {
    fn new(memory: &Memory, base: u64) -> Self {
        let vring = Vring::new(memory.clone(), 1024).unwrap();
        vring.set_queue_size(SIZE);
        vring.set_queue_info(base, base + 0x1000, base + 0x2000).unwrap();
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Self { vring, base, next: 0, available: 0 }
    }

    fn describe(
        &mut self,
        memory: &GuestMemoryMmap,
        address: u64,
        length: u32,
        flags: u32,
        next: u16,
    ) -> u16 {
        let index = self.next % SIZE;
        write_descriptor(memory, self.base + 16 * u64::from(index), address, length, flags, next);
        self.next += 1;
        index
    }

    /// Makes a chain of these buffers available.
    fn offer(&mut self, memory: &GuestMemoryMmap, buffers: &[(u64, u32)], flags: u32) {
        let head = self.next % SIZE;
        for (at, (address, length)) in buffers.iter().enumerate() {
            let more = if at + 1 < buffers.len() { VRING_DESC_F_NEXT } else { 0 };
            let next = (self.next + 1) % SIZE;
            self.describe(memory, *address, *length, flags | more, next);
        }
        self.publish(memory, head);
    }

    fn publish(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let ring = self.base + 0x1000;
        memory.write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(self.available % SIZE))).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(ring + 2)).unwrap();
    }

    /// Returns the number of returned chains.
    fn used(&self, memory: &GuestMemoryMmap) -> u16 {
        memory.read_obj(GuestAddress(self.base + 0x2002)).unwrap()
    }

    /// Returns the written length of returned chain number `at`.
    fn used_length(&self, memory: &GuestMemoryMmap, at: u16) -> u32 {
        memory.read_obj(GuestAddress(self.base + 0x2004 + 8 * u64::from(at % SIZE) + 4)).unwrap()
    }
}

fn write_descriptor(memory: &GuestMemoryMmap, at: u64, address: u64, length: u32, flags: u32, next: u16) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(length, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags as u16, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

struct Bench {
    device: Device<Hybrid>,
    memory: Memory,
    transmit: Driver,
    receive: Driver,
    scratch: Vec<u8>,
    listener: UnixListener,
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let device = Device::new(traits(CID.into(), |_| {}), Hybrid::new(&path, false).unwrap()).unwrap();
        let listener = UnixListener::bind(directory.path().join("v.sock_5000")).unwrap();
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let (transmit, receive) = (Driver::new(&memory, TRANSMIT), Driver::new(&memory, RECEIVE));
        Self { device, memory, transmit, receive, scratch: vec![], listener, directory }
    }

    /// Lets the device handle the available chains. Returns whether it reports more work.
    fn take(&mut self) -> bool {
        let memory = self.memory.memory();
        from_guest(&mut self.device, &self.transmit.vring, &memory, &mut self.scratch)
    }

    fn give(&mut self) -> bool {
        let memory = self.memory.memory();
        to_guest(&mut self.device, &self.receive.vring, &memory)
    }

    /// Sends a packet split into pieces of these sizes; the last size repeats.
    fn send(&mut self, header: Header, payload: &[u8], cuts: &[usize], indirect: bool) {
        let memory = self.memory.memory();
        let bytes = [&header.encode()[..], payload].concat();
        memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        let (mut buffers, mut at) = (vec![], 0);
        while at < bytes.len() {
            let cut = cuts.get(buffers.len()).or(cuts.last()).copied().unwrap_or(bytes.len());
            let count = cut.min(bytes.len() - at);
            buffers.push((BUFFERS + at as u64, count as u32));
            at += count;
        }
        if !indirect {
            assert!(buffers.len() <= usize::from(SIZE));
            return self.transmit.offer(&memory, &buffers, 0);
        }
        let table = BUFFERS + (1 << 20);
        for (at, (address, length)) in buffers.iter().enumerate() {
            let more = if at + 1 < buffers.len() { VRING_DESC_F_NEXT } else { 0 };
            write_descriptor(&memory, table + 16 * at as u64, *address, *length, more, at as u16 + 1);
        }
        self.transmit.offer(&memory, &[(table, 16 * buffers.len() as u32)], VRING_DESC_F_INDIRECT);
    }

    /// Opens a connection as the guest. Returns the host's socket.
    fn open(&mut self) -> UnixStream {
        self.send(header(Operation::Request, 0), &[], &[], false);
        self.take();
        self.listener.accept().unwrap().0
    }
}

fn header(operation: Operation, length: u32) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: HOST_CID,
        source_port: 7,
        destination_port: 5000,
        length,
        kind: STREAM,
        operation: operation as u16,
        buffer_space: 65_536,
        ..Header::default()
    }
}

proptest! {
    #[test]
    fn a_packet_is_gathered_wherever_it_is_cut(
        length in prop_oneof![0..300usize, 0..100_000usize],
        cuts in proptest::collection::vec(1..60usize, 0..20),
        rest in 2_000..70_000usize,
        indirect: bool,
    ) {
        let mut bench = Bench::new();
        let mut host = bench.open();
        let payload: Vec<u8> = (0..length).map(|at| (at * 7 % 251) as u8).collect();
        let cuts: Vec<usize> = cuts.into_iter().chain([rest]).collect();
        bench.send(header(Operation::Data, length as u32), &payload, &cuts, indirect);
        prop_assert!(!bench.take());
        let memory = bench.memory.memory();
        prop_assert_eq!(bench.transmit.used(&memory), 2);
        let mut received = vec![0; length];
        host.read_exact(&mut received).unwrap();
        prop_assert!(received == payload);
    }

    #[test]
    fn a_packet_is_spread_over_the_buffers_there_are(
        sizes in proptest::collection::vec(1..100u32, 0..15),
        last in 45..200u32,
        length in 1..3_000usize,
    ) {
        let mut bench = Bench::new();
        let mut host = bench.open();
        let sent: Vec<u8> = (0..length).map(|at| (at * 11 % 251) as u8).collect();
        host.write_all(&sent).unwrap();
        bench.device.poll();
        let sizes: Vec<u32> = sizes.into_iter().chain([last]).collect();
        let buffers: Vec<(u64, u32)> =
            sizes.iter().enumerate().map(|(at, size)| (BUFFERS + 0x1000 * at as u64, *size)).collect();
        let mut received: Vec<u8> = vec![];
        for at in 0.. {
            let memory = bench.memory.memory();
            bench.receive.offer(&memory, &buffers, VRING_DESC_F_WRITE);
            bench.give();
            if bench.receive.used(&memory) == at {
                break;
            }
            let mut packet = vec![];
            for (address, size) in &buffers {
                let mut part = vec![0; *size as usize];
                memory.read_slice(&mut part, GuestAddress(*address)).unwrap();
                packet.extend(part);
            }
            packet.truncate(bench.receive.used_length(&memory, at) as usize);
            let header = Header::decode(packet[..HEADER_LEN].try_into().unwrap());
            prop_assert_eq!(header.length as usize, packet.len() - HEADER_LEN);
            received.extend(&packet[HEADER_LEN..]);
        }
        prop_assert!(received == sent);
    }

    #[test]
    fn rings_full_of_garbage_do_no_harm(
        garbage in proptest::collection::vec(any::<u8>(), 0x6000),
        heads in proptest::collection::vec((0..0x6000u64, any::<u64>()), 0..40),
    ) {
        let mut bench = Bench::new();
        let host = bench.open();
        (&host).write_all(&[1; 10_000]).unwrap();
        bench.device.poll();
        let memory = bench.memory.memory();
        memory.write_slice(&garbage, GuestAddress(TRANSMIT)).unwrap();
        for round in 0..20u16 {
            for (at, value) in &heads {
                memory.write_obj(value.rotate_left(round.into()), GuestAddress(TRANSMIT + at)).ok();
            }
            for base in [TRANSMIT, RECEIVE] {
                // Plausible enough that the device follows it.
                memory.write_obj(round * 50, GuestAddress(base + 0x1002)).unwrap();
            }
            bench.take();
            bench.give();
            bench.device.poll();
        }
    }
}

#[test]
fn an_index_that_runs_away_is_not_followed() {
    let mut bench = Bench::new();
    let _host = bench.open();
    let memory = bench.memory.memory();
    for index in [1000u16, 66, u16::MAX] {
        for base in [TRANSMIT, RECEIVE] {
            memory.write_obj(index, GuestAddress(base + 0x1002)).unwrap();
        }
        assert!(!bench.take());
        assert!(!bench.give());
    }
    assert_eq!((bench.transmit.used(&memory), bench.receive.used(&memory)), (1, 0));
}

#[test]
fn a_flood_gives_others_their_turn() {
    let mut bench = Bench::new();
    let memory = bench.memory.memory();
    bench.send(header(Operation::CreditUpdate, 0), &[], &[], false);
    // A driver that makes the same descriptor available again and again, faster than the device handles it.
    let mut taken = 0u16;
    while taken < 1000 {
        memory.write_obj(taken + SIZE, GuestAddress(TRANSMIT + 0x1002)).unwrap();
        bench.take();
        taken = bench.transmit.used(&memory);
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let used: u16 = memory.read_obj(GuestAddress(TRANSMIT + 0x2002)).unwrap();
                memory.write_obj(used.wrapping_add(SIZE), GuestAddress(TRANSMIT + 0x1002)).unwrap();
            }
        });
        for _ in 0..100 {
            // The call returns, and has handled no more than its limit.
            let before = bench.transmit.used(&memory);
            bench.take();
            assert!(usize::from(bench.transmit.used(&memory).wrapping_sub(before)) <= PACKETS_PER_TURN);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn descriptors_that_lead_nowhere_come_back() {
    let mut bench = Bench::new();
    let memory = bench.memory.memory();
    let nowhere = MEMORY as u64 + 0x1000;
    bench.transmit.offer(&memory, &[(nowhere, 100)], 0);
    bench.transmit.offer(&memory, &[(u64::MAX - 10, 100)], 0);
    bench.transmit.offer(&memory, &[(BUFFERS, 10)], 0);
    bench.transmit.offer(&memory, &[], 0);
    // A missing payload, a payload that is too long, and a header in a writable descriptor.
    memory.write_slice(&header(Operation::Data, 1000).encode(), GuestAddress(BUFFERS)).unwrap();
    bench.transmit.offer(&memory, &[(BUFFERS, 500)], 0);
    bench.transmit.offer(&memory, &[(BUFFERS, 44)], VRING_DESC_F_WRITE);
    memory.write_slice(&header(Operation::Data, u32::MAX).encode(), GuestAddress(BUFFERS + 64)).unwrap();
    bench.transmit.offer(&memory, &[(BUFFERS + 64, 100)], 0);
    assert!(!bench.take());
    assert_eq!(bench.transmit.used(&memory), 7);

    // A circular chain, and an indirect table of indirect tables.
    let head = bench.transmit.next % SIZE;
    bench.transmit.describe(&memory, BUFFERS, 0, VRING_DESC_F_NEXT, head);
    bench.transmit.publish(&memory, head);
    write_descriptor(&memory, 0x8000, 0x8000, 16, VRING_DESC_F_INDIRECT, 0);
    bench.transmit.offer(&memory, &[(0x8000, 16)], VRING_DESC_F_INDIRECT);
    assert!(!bench.take());
    assert_eq!(bench.transmit.used(&memory), 9);
}

#[test]
fn buffers_that_are_too_small_come_back_empty_and_nothing_is_lost() {
    let mut bench = Bench::new();
    let memory = bench.memory.memory();
    let _host = bench.open();
    bench.receive.offer(&memory, &[(BUFFERS, 10)], VRING_DESC_F_WRITE);
    bench.receive.offer(&memory, &[(BUFFERS, 44)], VRING_DESC_F_WRITE);
    bench.receive.offer(&memory, &[(BUFFERS, 100)], 0);
    bench.give();
    assert_eq!(bench.receive.used(&memory), 3);
    assert!((0..3).all(|at| bench.receive.used_length(&memory, at) == 0));
    bench.receive.offer(&memory, &[(BUFFERS, 100)], VRING_DESC_F_WRITE);
    bench.give();
    assert_eq!(bench.receive.used_length(&memory, 3), 44);
    let mut bytes = [0; HEADER_LEN];
    memory.read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
    assert_eq!(Header::decode(&bytes).operation(), Some(Operation::Response));
}

#[test]
fn a_ring_that_is_stopped_is_left_alone() {
    let mut bench = Bench::new();
    bench.send(header(Operation::Request, 0), &[], &[], false);
    bench.transmit.vring.set_queue_ready(false);
    assert!(!bench.take() && !bench.give());
    bench.transmit.vring.set_queue_ready(true);
    bench.transmit.vring.set_enabled(false);
    assert!(!bench.take());
    assert_eq!(bench.transmit.used(&bench.memory.memory()), 0);
    assert!(bench.directory.path().exists());
}
