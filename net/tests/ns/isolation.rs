//! Isolation: VMs reach each other only in groups, and never the host, and none can use another's addresses.

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use nexus_net_wire::{Protocol, Request, Vm};
use nexus_schema::network::{DenyReason, NetworkPolicy, NetworkPreset};

use crate::vm::{Guest, echoes};
use crate::world::{HOST, METADATA, PATIENCE, PRIVATE, PUBLIC, World, policy, serve, vm};

#[test]
fn vms_talk_only_in_groups() {
    let world = World::new();
    let mut net = world.net();
    let grouped = |number, groups: &[&str], net: &crate::world::Net| Vm {
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        ..vm(&net.instance, number)
    };
    let one = grouped(2, &["red"], &net);
    let two = grouped(3, &["red", "blue"], &net);
    let three = grouped(4, &["blue"], &net);
    let [one, two, three] = [one, two, three].map(|vm| Guest::attach(&world, &mut net, &vm));
    net.ask(Request::Watch {});
    let all = [&one, &two, &three];
    for guest in all {
        let v6 = guest.vm.ipv6.unwrap().to_string();
        serve(&guest.ns, &[&guest.vm.ipv4.to_string(), &v6], 8080);
    }
    for (from, to, is_open) in [
        (&one, &two, true),
        (&two, &one, true),
        (&two, &three, true),
        (&one, &three, false),
        (&three, &one, false),
    ] {
        let (v4, v6) = (to.vm.ipv4.to_string(), to.vm.ipv6.unwrap().to_string());
        assert_eq!(from.ping(&v4), is_open, "{v4}");
        assert_eq!(from.ping(&v6), is_open, "{v6}");
        assert_eq!(from.udp(&v4, 8080).is_some(), is_open);
        if is_open {
            assert_eq!(
                from.tcp(&v4, 8080).unwrap().1,
                from.vm.ipv4.to_string(),
                "no translation between VMs"
            );
            from.reaches(&v6, 8080);
        } else {
            from.is_refused(&v4, 8080);
            from.is_refused(&v6, 8080);
            let denial = net.denial(|denial| denial.protocol == Protocol::Tcp && denial.vm == from.vm.id);
            assert_eq!(denial.reason, DenyReason::OtherVm);
        }
    }
    // When the group is removed, open connections in it are cut as well.
    let mut stream = one.reaches(&two.vm.ipv4.to_string(), 8080);
    echoes(&mut stream).unwrap();
    let alone = Vm { groups: Vec::new(), ..two.vm.clone() };
    assert!(net.update(&alone) >= 1);
    echoes(&mut stream).unwrap_err();
    one.is_refused(&two.vm.ipv4.to_string(), 8080);
    net.update(&two.vm);
    one.reaches(&two.vm.ipv4.to_string(), 8080);
}

#[test]
fn forged_frames_are_dropped() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    let other = Guest::new(&world, &mut net, 3);
    // Makes the gateway known before anything is spoofed.
    assert!(guest.ping(PUBLIC) && guest.ping(crate::world::PUBLIC_V6) && other.ping(PUBLIC));
    net.ask(Request::Watch {});
    for forged in ["10.77.0.3", "10.77.0.99", "192.0.2.1", "fd4e:58:4d::99"] {
        let to = if forged.contains(':') { crate::world::PUBLIC_V6 } else { PUBLIC };
        let version = if forged.contains(':') { "-6" } else { "-4" };
        let prefix = if forged.contains(':') { "128 nodad" } else { "32" };
        guest.ns.ip(&format!("{version} addr add {forged}/{prefix} dev eth0"));
        guest.ns.settle();
        assert_eq!(guest.udp_from(Some(forged), to, 8080), None, "{forged}");
        let address: IpAddr = forged.parse().unwrap();
        let denial = net.denial(|denial| denial.address == Some(address));
        assert_eq!((denial.vm, denial.reason), (guest.vm.id, DenyReason::Spoofed), "{forged}");
        assert_eq!(denial.mac, Some(guest.vm.mac));
        guest.ns.ip(&format!("{version} addr del {forged} dev eth0"));
    }
    assert!(guest.ping(PUBLIC), "its own address is not spoofed");
    // Another VM's MAC address, with the VM's own IP address.
    guest.ns.ip(&format!("link set eth0 address {}", other.vm.mac));
    assert!(!guest.ping(PUBLIC));
    let denial = net.denial(|denial| denial.mac == Some(other.vm.mac));
    assert_eq!((denial.vm, denial.reason), (guest.vm.id, DenyReason::Spoofed));
    assert!(other.ping(PUBLIC), "the other VM keeps its MAC address");
    guest.ns.ip(&format!("link set eth0 address {}", guest.vm.mac));
    guest.reaches(PUBLIC, 80);
    let state = net.state();
    let counters = state.vms.iter().find(|vm| vm.id == guest.vm.id).unwrap().counters;
    assert!(counters.spoofed >= 5, "{counters:?}");
}

#[test]
fn the_host_and_private_networks_are_closed_under_internet() {
    let world = World::new();
    let mut net = world.net();
    serve(&world.host, &[HOST, "10.77.0.1"], 8080);
    let guest = Guest::new(&world, &mut net, 2);
    net.ask(Request::Watch {});
    for (to, port, reason) in [
        (PRIVATE, 80, DenyReason::Private),
        (METADATA, 80, DenyReason::Metadata),
        (HOST, 8080, DenyReason::Host),
        ("10.77.0.1", 8080, DenyReason::Host),
        ("10.77.0.77", 80, DenyReason::OtherVm),
        ("240.0.0.1", 80, DenyReason::Reserved),
    ] {
        guest.is_refused(to, port);
        let denial = net.denial(|denial| denial.protocol == Protocol::Tcp);
        let address: IpAddr = to.parse().unwrap();
        assert_eq!((denial.reason, denial.address, denial.port), (reason, Some(address), Some(port)));
        assert!(!guest.ping(to) || to == "10.77.0.1", "{to}");
        assert_eq!(guest.udp(to, 8080), None, "{to}");
    }
    assert!(net.state().vms[0].counters.denied >= 12);
    // Only what the allow list names is open; the same with the preset `open`.
    let mut vm = guest.vm.clone();
    vm.policy = policy(&["*", "10.99.0.1:80", &format!("{HOST}:8080")], &[]);
    net.update(&vm);
    guest.reaches(PRIVATE, 80);
    guest.is_refused(PRIVATE, 443);
    guest.reaches(HOST, 8080);
    guest.reaches(PUBLIC, 80);
    vm.policy = NetworkPolicy { preset: NetworkPreset::Open, ..policy(&[], &["*:443"]) };
    net.update(&vm);
    guest.reaches(PRIVATE, 80);
    guest.reaches(HOST, 8080);
    guest.is_refused(METADATA, 80);
    guest.is_refused(PUBLIC, 443);
    guest.is_refused("10.77.0.1", 8080);
    // An address that the host gets later is closed as well.
    vm.policy = policy(&[], &[]);
    net.update(&vm);
    world.host.ip("addr add 192.0.2.50/32 dev up0");
    serve(&world.host, &["192.0.2.50"], 8080);
    let deadline = Instant::now() + PATIENCE;
    while guest.tcp("192.0.2.50", 8080).is_ok() {
        assert!(Instant::now() < deadline, "the new address stays open");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn nobody_outside_begins_a_connection_to_a_vm() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    world.internet.ip(&format!("route add 10.77.0.0/16 via {HOST}"));
    let address = (guest.vm.ipv4, 8080);
    let listener = guest.ns.run(move || TcpListener::bind(address)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let from_outside = world.internet.run(move || {
        std::net::TcpStream::connect_timeout(&address.into(), Duration::from_secs(2)).map(|_| ())
    });
    assert!(from_outside.is_err());
    assert!(listener.accept().is_err());
    // The host itself can connect.
    world.host.run(move || std::net::TcpStream::connect_timeout(&address.into(), PATIENCE)).unwrap();
    let udp = world.internet.run(move || {
        let socket = UdpSocket::bind("198.51.100.2:0")?;
        socket.send_to(b"x", address)
    });
    udp.unwrap();
}

#[test]
fn frames_to_link_local_groups_pass_the_guard_as_all_others() {
    let world = World::new();
    let mut net = world.net();
    serve(&world.host, &["10.77.0.1"], 8080);
    let guest = Guest::new(&world, &mut net, 2);
    assert!(guest.ping(PUBLIC) && guest.ping("10.77.0.1"));
    // Bridges pass frames to these groups to their host on a separate path, unless a port is configured otherwise.
    for group in ["00", "02", "03", "0e", "0f"] {
        guest.ns.ip(&format!("neigh replace 10.77.0.1 lladdr 01:80:c2:00:00:{group} dev eth0 nud permanent"));
        assert_eq!(guest.udp("10.77.0.1", 8080), None, "{group}");
        assert_eq!(guest.udp(PUBLIC, 8080), None, "{group}");
    }
}

#[test]
fn a_port_gets_the_frames_for_its_own_vm_alone() {
    let world = World::new();
    let mut net = world.net();
    let [one, two] = [2, 3].map(|number| {
        let vm = vm(&net.instance, number);
        let tap = net.attach(&vm).tap;
        let port = world.host.ip(&format!("-details link show dev {tap}"));
        for word in ["learning off", "flood off", "isolated on", "group_fwd_mask 0xfffd"] {
            assert!(port.contains(word), "{word}: {port}");
        }
        let table = world.host.try_run("bridge", &format!("fdb show dev {tap}")).unwrap();
        assert!(
            table.lines().any(|line| line.starts_with(&vm.mac.to_string()) && line.ends_with("static")),
            "{table}"
        );
        Guest::run(&world, &net.instance, &vm, &tap)
    });
    // A VM cannot take over another's MAC address.
    one.ns.ip(&format!("link set eth0 address {}", two.vm.mac));
    assert!(!one.ping(PUBLIC));
    assert!(two.ping(PUBLIC));
}

#[test]
fn vms_choose_no_route_through_the_host() {
    let world = World::new();
    // A router that lets others choose one, also on interfaces that are made later.
    world.host.write("/proc/sys/net/ipv4/conf/all/accept_source_route", "1");
    world.host.write("/proc/sys/net/ipv4/conf/default/accept_source_route", "1");
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    let bridge = "/proc/sys/net/ipv4/conf/nxb0a1b2c3d/accept_source_route";
    let found = world.host.run(move || std::fs::read_to_string(bridge)).unwrap();
    assert_eq!(found.trim(), "0");
    guest.reaches(PUBLIC, 80);
}
