//! What one VM may take of what is everybody's: connections, log entries, bandwidth.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nexus_net_wire::{Protocol, Request};
use nexus_schema::ByteSize;
use nexus_schema::network::{Bandwidth, DenyReason};

use crate::dns::{A, OK, serve_names};
use crate::vm::Guest;
use crate::world::{METADATA, Net, PATIENCE, PUBLIC, PUBLIC_TOO, World, instance};

fn limited(world: &World, connections_max: u32) -> Net {
    let mut limited = instance("0a1b2c3d", "10.77");
    limited.connections_max = connections_max;
    let mut net = world.start(limited, None);
    net.configure();
    net
}

#[test]
fn a_vm_has_no_more_than_so_many_connections_open() {
    const MOST: usize = 20;
    let world = World::new();
    serve_names(&world.internet);
    let mut net = limited(&world, MOST as u32);
    let (guest, other) = (Guest::new(&world, &mut net, 2), Guest::new(&world, &mut net, 3));
    net.ask(Request::Watch {});
    let mut open: Vec<TcpStream> = (0..MOST).map(|_| guest.reaches(PUBLIC, 80)).collect();
    guest.is_refused(PUBLIC, 80);
    let denial = net.denial(|denial| denial.protocol == Protocol::Tcp);
    assert_eq!((denial.vm, denial.reason), (guest.vm.id, DenyReason::TooManyConnections));
    assert_eq!(guest.udp(PUBLIC, 8080), None, "of any protocol");
    assert_eq!(guest.look_up("a.example", A).code, OK, "names are counted apart");
    other.reaches(PUBLIC, 80);
    crate::vm::echoes(&mut open[0]).unwrap();
    let counters = net.state().vms[0].counters;
    assert!(counters.open >= MOST as u64 && counters.denied >= 2, "{counters:?}");
    // Those that end make room.
    open.clear();
    let deadline = Instant::now() + PATIENCE;
    while guest.tcp(PUBLIC, 80).is_err() {
        assert!(Instant::now() < deadline, "there is room again");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

/// Sends this many datagrams, each from another port.
fn flood(guest: &Guest, to: &'static str, count: usize) {
    guest.ns.run(move || {
        for _ in 0..count {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            let _ = socket.send_to(b"x", (to, 8080));
        }
    });
}

#[test]
fn a_flood_is_held_up_and_hardly_told() {
    let world = World::new();
    let mut net = limited(&world, 1_000_000);
    let (guest, other) = (Guest::new(&world, &mut net, 2), Guest::new(&world, &mut net, 3));
    net.ask(Request::Watch {});
    // Refusals: all are counted, and few are told.
    let start = Instant::now();
    flood(&guest, METADATA, 1500);
    flood(&other, METADATA, 1);
    let mut told = 0;
    net.denial(|denial| {
        told += usize::from(denial.vm == guest.vm.id);
        denial.vm == other.vm.id
    });
    assert!(told <= 60 + 20 * (start.elapsed().as_secs() as usize + 1), "{told} are told");
    assert!(net.state().vms[0].counters.denied >= 1000, "{:?}", net.state().vms[0].counters);
    // Connections: a burst, and so many each second.
    let start = Instant::now();
    flood(&guest, PUBLIC, 6500);
    let allowed = net.state().vms[0].counters.allowed;
    let most = 5000 + 500 * (start.elapsed().as_secs() + 1);
    assert!((1000..=most).contains(&allowed), "{allowed} are allowed, at most {most}");
    // Questions over TCP hold sockets of the host.
    let (gateway, start) = (guest.gateway, Instant::now());
    let connect = move || TcpStream::connect_timeout(&(gateway, 53).into(), PATIENCE);
    let open: Vec<TcpStream> = (0..100).filter_map(|_| guest.ns.run(connect).ok()).collect();
    let most = 40 + 20 * (start.elapsed().as_secs() as usize + 1);
    assert!((20..=most).contains(&open.len()), "{} are open, at most {most}", open.len());
    other.reaches(PUBLIC_TOO, 80);
}

/// A server that sends so many bytes, or takes them all and then says how many there were.
fn serve_bytes(world: &World, count: usize) {
    let listener = world.internet.run(|| TcpListener::bind((PUBLIC, 9000))).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut way = [0];
                stream.read_exact(&mut way).ok()?;
                if way == *b"d" {
                    stream.write_all(&vec![0; count]).ok()
                } else {
                    let taken =
                        std::io::copy(&mut (&stream).take(count as u64), &mut std::io::sink()).ok()?;
                    stream.write_all(&taken.to_be_bytes()).ok()
                }
            });
        }
    });
}

#[test]
fn a_limit_of_bandwidth_holds_and_changes_at_once() {
    const COUNT: usize = 5 << 19;
    let world = World::new();
    let mut net = world.net();
    serve_bytes(&world, COUNT);
    let guest = Guest::new(&world, &mut net, 2);
    let carry = |way: &'static [u8]| {
        let start = Instant::now();
        guest.ns.run(move || {
            let mut stream = TcpStream::connect((PUBLIC.parse::<Ipv4Addr>().unwrap(), 9000)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(way).unwrap();
            if way == b"d" {
                assert_eq!(std::io::copy(&mut stream, &mut std::io::sink()).unwrap(), COUNT as u64);
            } else {
                stream.write_all(&vec![0; COUNT]).unwrap();
                let mut taken = [0; 8];
                stream.read_exact(&mut taken).unwrap();
                assert_eq!(u64::from_be_bytes(taken), COUNT as u64);
            }
        });
        start.elapsed()
    };
    let free = (carry(b"d"), carry(b"u"));
    let mut vm = guest.vm.clone();
    vm.policy.bandwidth = Bandwidth { rx: Some(ByteSize::mib(1)), tx: None };
    net.update(&vm);
    assert_eq!(net.configure().changes, 0, "what is done twice changes nothing");
    // Packets to the VM wait at its TAP, where another program may have removed that.
    let tap = net.state().vms[0].tap.clone();
    let queue = || world.host.try_run("tc", &format!("qdisc show dev {tap}")).unwrap();
    assert!(queue().contains("tbf") && queue().contains("rate 8388Kbit"), "{}", queue());
    world.host.try_run("tc", &format!("qdisc del dev {tap} root")).unwrap();
    assert_eq!(net.configure().changes, 1, "{}", queue());
    assert!(queue().contains("tbf"), "{}", queue());
    // A second's worth comes at once.
    let slow = Duration::from_millis(800)..Duration::from_secs(8);
    let (down, up) = (carry(b"d"), carry(b"u"));
    assert!(slow.contains(&down) && up < slow.start, "{down:?} {up:?}, free {free:?}");
    vm.policy.bandwidth = Bandwidth { rx: None, tx: Some(ByteSize::mib(1)) };
    net.update(&vm);
    let (down, up) = (carry(b"d"), carry(b"u"));
    assert!(slow.contains(&up) && down < slow.start, "{down:?} {up:?}, free {free:?}");
    vm.policy.bandwidth = Bandwidth::default();
    net.update(&vm);
    assert!(!queue().contains("tbf"), "{}", queue());
    assert!(carry(b"u") < slow.start);
    let counters = net.state().vms[0].counters;
    assert!(counters.sent_packets > 100 && counters.received_packets > 100, "{counters:?}");
}
