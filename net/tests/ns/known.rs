//! Connections that are open belong to the VM that made them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use nexus_net_wire::Vm;
use nexus_schema::id::VmId;

use crate::vm::{Guest, echoes};
use crate::world::{PATIENCE, PUBLIC, SILENCE, World, vm};

#[test]
fn whoever_gets_an_address_gets_no_connections_with_it() {
    let world = World::new();
    let mut net = world.net();
    let server = world.internet.run(|| UdpSocket::bind((PUBLIC, 7000))).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let first = Guest::new(&world, &mut net, 2);
    let bind = || UdpSocket::bind("0.0.0.0:5555");
    let socket = first.ns.run(bind).unwrap();
    socket.send_to(b"x", (PUBLIC, 7000)).unwrap();
    let (_, seen) = server.recv_from(&mut [0; 10]).unwrap();
    let address = SocketAddr::from((first.vm.ipv4, 6666));
    // The host's own, too.
    let of_host = world.host.run(|| UdpSocket::bind("0.0.0.0:6667")).unwrap();
    of_host.send_to(b"x", address).unwrap();
    assert!(!conntrack(&world, first.vm.ipv4).is_empty());
    // It goes without a word: nobody forgets its connections.
    let tap = net.attach(&first.vm).tap;
    drop(first);
    net.child.kill().unwrap();
    net.child.wait().unwrap();
    world.host.ip(&format!("link del {tap}"));
    let mut net = net.restarted(&world);
    net.configure();
    assert!(!conntrack(&world, [10, 77, 0, 2].into()).is_empty(), "they are still there");
    let second = Vm { id: VmId::from_i64(77).unwrap(), ..vm(&net.instance, 2) };
    let second = Guest::attach(&world, &mut net, &second);
    let socket = second.ns.run(bind).unwrap();
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    server.send_to(b"for the first one", seen).unwrap();
    assert!(socket.recv(&mut [0; 100]).is_err(), "an answer to the first VM comes to the second one");
    assert_eq!(conntrack(&world, second.vm.ipv4), "");
    socket.send_to(b"x", (PUBLIC, 7000)).unwrap();
    server.recv_from(&mut [0; 10]).unwrap();
    // Attached again, it keeps its own.
    net.attach(&second.vm);
    assert!(!conntrack(&world, second.vm.ipv4).is_empty());
}

/// What the kernel knows of connections of an address.
fn conntrack(world: &World, address: Ipv4Addr) -> String {
    let all = world.host.run(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack")).unwrap();
    let (source, destination) = (format!("src={address} "), format!("dst={address} "));
    let is_its = |line: &&str| line.contains(&source) || line.contains(&destination);
    all.lines().filter(is_its).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_connection_passes_only_for_the_vm_whose_mark_it_has() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    let mut stream = guest.reaches(PUBLIC, 80);
    echoes(&mut stream).unwrap();
    // As if another VM had begun it.
    world.host.nft("add table inet others");
    world.host.nft("add chain inet others pre { type filter hook prerouting priority 0 ; }");
    world.host.nft("add rule inet others pre ip saddr 10.77.0.2 ct mark set 0x4e000063");
    let error = echoes(&mut stream).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    world.host.nft("delete table inet others");
    guest.reaches(PUBLIC, 80);
}

/// The error of ICMP that a host sends for a datagram to a port where nobody listens.
fn unreachable(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Vec<u8> {
    let sum = |bytes: &[u8]| {
        let words =
            bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
        let sum: u32 = words.sum();
        !((sum & 0xffff) + (sum >> 16)) as u16
    };
    let mut inner = vec![0x45, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 0, 0];
    inner.extend(from.0.octets());
    inner.extend(to.0.octets());
    let check = sum(&inner);
    inner[10..12].copy_from_slice(&check.to_be_bytes());
    inner.extend(from.1.to_be_bytes());
    inner.extend(to.1.to_be_bytes());
    inner.extend([0, 9, 0, 0]);
    let mut packet = vec![3, 3, 0, 0, 0, 0, 0, 0];
    packet.extend(inner);
    let check = sum(&packet);
    packet[2..4].copy_from_slice(&check.to_be_bytes());
    packet
}

#[test]
fn nobody_tells_of_connections_that_are_not_its_own() {
    use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
    let world = World::new();
    let mut net = world.net();
    let grouped =
        |number, net: &crate::world::Net| Vm { groups: vec!["team".to_owned()], ..vm(&net.instance, number) };
    let (one, two) = (grouped(2, &net), grouped(3, &net));
    let (one, two) = (Guest::attach(&world, &mut net, &one), Guest::attach(&world, &mut net, &two));
    let stranger = Guest::new(&world, &mut net, 4);
    let connected = |to: (IpAddr, u16)| {
        let socket = one.ns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        socket
    };
    let open = connected((PUBLIC.parse().unwrap(), 8080));
    open.send(b"x").unwrap();
    open.recv(&mut [0; 100]).unwrap();
    let port = open.local_addr().unwrap().port();
    let forged = unreachable((one.vm.ipv4, port), (PUBLIC.parse().unwrap(), 8080));
    for from in [&stranger, &two] {
        let (forged, to) = (forged.clone(), SocketAddr::from((one.vm.ipv4, 0)));
        from.ns.run(move || {
            let raw = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
            sendto(&raw, &forged, SendFlags::empty(), &to).unwrap();
        });
        let error = open.recv(&mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{}: {error}", from.vm.name);
    }
    // What is true is told: nobody listens there.
    let closed = connected((two.vm.ipv4.into(), 9));
    closed.send(b"x").unwrap();
    let error = closed.recv(&mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
    let closed = connected((PUBLIC.parse().unwrap(), 9));
    closed.send(b"x").unwrap();
    let error = closed.recv(&mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
}
