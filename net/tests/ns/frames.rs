//! Frames that the kernel of a VM would not send, written to TAPs as a hostile guest can.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::time::Instant;

use nexus_net_wire::{Vm, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::OFlags;

use crate::vm::Guest;
use crate::world::{Net, PATIENCE, PRIVATE, PUBLIC, SILENCE, World, policy, vm};

/// The virtio header before each frame: no offloads.
const HEADER: [u8; 10] = [0; 10];
const EVERYBODY: [u8; 6] = [0xff; 6];
/// The group of all IPv6 nodes.
const NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const VLAN: u16 = 0x8100;
const IPV6: u16 = 0x86dd;
/// The discovery of switches (LLDP).
const DISCOVERY: u16 = 0x88cc;
const GATEWAY: [u8; 4] = [10, 77, 0, 1];

/// The network card of a VM, without a kernel behind it.
struct Card {
    tap: File,
    vm: Vm,
}

impl Card {
    fn new(world: &World, net: &mut Net, number: u8) -> Self {
        let vm = vm(&net.instance, number);
        let name = net.attach(&vm).tap;
        let (tap, _) = world.host.run(move || tap::open(&name, OFlags::NONBLOCK)).unwrap();
        Self { tap: tap.into(), vm }
    }

    fn send(&self, to: [u8; 6], kind: u16, payload: &[u8]) {
        let frame = [&HEADER[..], &to, &self.vm.mac.0, &kind.to_be_bytes(), payload].concat();
        (&self.tap).write_all(&frame).unwrap();
    }

    /// Returns the next frame; waits for it for at most some milliseconds.
    fn next(&self, millis: u16) -> Option<Vec<u8>> {
        let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
        // If it is interrupted, there may be a frame all the same.
        let _ = poll(&mut fds, PollTimeout::from(millis));
        let mut buffer = [0; 4096];
        let length = (&self.tap).read(&mut buffer).ok()?;
        Some(buffer[HEADER.len()..length].to_vec())
    }

    /// Asks for the gateway's MAC address until there is an answer; then, all that was sent before has been handled. Returns how often it asked,
    /// and all frames that came.
    fn ask(&self) -> (usize, Vec<Vec<u8>>) {
        let deadline = Instant::now() + PATIENCE;
        let mut frames = Vec::new();
        for asked in 1.. {
            assert!(Instant::now() < deadline, "the gateway does not answer: {frames:?}");
            self.send(EVERYBODY, ARP, &arp(1, (self.vm.mac.0, self.vm.ipv4.octets()), GATEWAY));
            while let Some(frame) = self.next(200) {
                let is_answer = is_answer(&frame);
                frames.push(frame);
                if is_answer {
                    frames.extend(std::iter::from_fn(|| self.next(0)));
                    return (asked, frames);
                }
            }
        }
        unreachable!("it asks until then")
    }

    /// The link-local address that follows from the MAC address.
    fn link_local(&self) -> [u8; 16] {
        let [a, b, c, d, e, f] = self.vm.mac.0;
        [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]
    }

    /// An ICMPv6 message to all nodes.
    fn icmpv6(&self, kind: u8) -> Vec<u8> {
        let mut all = [0; 16];
        (all[0], all[1], all[15]) = (0xff, 2, 1);
        let body = [kind, 0, 0, 0, 64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
        [&[0x60_u8, 0, 0, 0, 0, 16, 58, 255][..], &self.link_local(), &all, &body].concat()
    }

    /// A UDP packet.
    fn udp(&self, to: [u8; 4], (from_port, to_port): (u16, u16)) -> Vec<u8> {
        let mut head = [0x45_u8, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0].to_vec();
        head.extend([self.vm.ipv4.octets(), to].concat());
        let pairs = head.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum: u32 = pairs.sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        head[10..12].copy_from_slice(&sum.to_be_bytes());
        // Without a checksum of its own.
        [&head[..], &from_port.to_be_bytes(), &to_port.to_be_bytes(), &[0, 12, 0, 0], b"evil"].concat()
    }
}

/// A message of ARP by which a sender says its addresses.
fn arp(operation: u16, sender: ([u8; 6], [u8; 4]), target: [u8; 4]) -> Vec<u8> {
    [&[0_u8, 1, 8, 0, 6, 4][..], &operation.to_be_bytes(), &sender.0, &sender.1, &[0; 6], &target].concat()
}

/// Returns whether it is an answer of ARP.
fn is_answer(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&ARP.to_be_bytes()[..]) && frame.get(20..22) == Some(&[0, 2][..])
}

#[test]
fn what_a_card_sends_reaches_no_other_card_and_moves_nothing_of_the_host() {
    let world = World::new();
    let mut net = world.net();
    let evil = Card::new(&world, &mut net, 2);
    let other = Card::new(&world, &mut net, 3);
    evil.ask();
    other.ask();
    let of_host = || {
        let neighbours = world.host.ip("neigh show dev nxb0a1b2c3d nud permanent");
        (neighbours, world.host.ip("-6 route show default"), world.host.ip("route show default"))
    };
    let before = of_host();
    assert!(before.0.contains(&other.vm.mac.to_string()), "{}", before.0);

    let (own, others) = ((evil.vm.mac.0, evil.vm.ipv4.octets()), other.vm.ipv4.octets());
    for to in [EVERYBODY, other.vm.mac.0] {
        // It is the gateway; it is the other one; it is itself with another's MAC address.
        evil.send(to, ARP, &arp(2, (own.0, GATEWAY), others));
        evil.send(to, ARP, &arp(1, (own.0, others), GATEWAY));
        evil.send(to, ARP, &arp(2, (other.vm.mac.0, own.1), others));
        // A router, a redirect.
        evil.send(NODES, IPV6, &evil.icmpv6(134));
        evil.send(to, IPV6, &evil.icmpv6(137));
    }
    let spoofed = 10;
    // Of its own addresses: an answer of DHCP, packets straight to the other one, a neighbour's advertisement, a bridge, a switch.
    for to in [EVERYBODY, other.vm.mac.0] {
        evil.send(to, IPV4, &evil.udp([255; 4], (67, 68)));
        evil.send(to, IPV4, &evil.udp(others, (1000, 1000)));
        evil.send(to, IPV6, &evil.icmpv6(136));
        evil.send(to, DISCOVERY, &[2, 7, 4, 1, 2, 3, 4, 5, 6]);
    }
    evil.send([0x01, 0x80, 0xc2, 0, 0, 0], 7, &[0x42, 0x42, 3, 0, 0, 0, 0]);
    // With a VLAN's tag it asks for the gateway as it may without one.
    let question = arp(1, own, GATEWAY);
    for tag in [0_u16, 1, 100] {
        let tagged = [&tag.to_be_bytes()[..], &ARP.to_be_bytes(), &question].concat();
        evil.send(EVERYBODY, VLAN, &tagged);
    }

    let (asked, frames) = evil.ask();
    let answers = frames.iter().filter(|frame| is_answer(frame)).count();
    assert!(answers <= asked, "tagged questions are answered: {frames:?}");
    let mine = evil.vm.mac.0;
    let come: Vec<_> = std::iter::from_fn(|| other.next(0)).collect();
    for frame in &come {
        assert!(!frame.windows(6).any(|part| part == mine), "{frame:x?}");
        assert!(!frame.ends_with(b"evil"), "{frame:x?}");
    }
    assert_eq!(of_host(), before);
    let state = net.state();
    let counters = state.vms.iter().find(|vm| vm.id == evil.vm.id).unwrap().counters;
    assert_eq!(counters.spoofed, spoofed, "{counters:?}");
    other.ask();
}

#[test]
fn fragments_are_put_together_before_they_are_decided_about() {
    let world = World::new();
    let mut net = world.net();
    let listed = Vm { policy: policy(&[&format!("{PUBLIC}:8080/udp")], &[]), ..vm(&net.instance, 2) };
    let guest = Guest::attach(&world, &mut net, &listed);
    let is_answered = |to: &str, port: u16| {
        let socket = guest.ns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        socket.connect((to, port)).unwrap();
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        // Three packets, of which only the first has ports.
        socket.send(&[7; 4000]).is_ok() && socket.recv(&mut [0; 100]).is_ok()
    };
    assert!(is_answered(PUBLIC, 8080));
    assert!(!is_answered(PUBLIC, 80));
    assert!(!is_answered(PRIVATE, 8080));
}
