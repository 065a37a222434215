//! VMs reach the internet by IPv4 and IPv6, with the host's addresses. Attaching twice changes nothing.

use nexus_net_wire::{Answer, Request};

use crate::vm::{Guest, echoes};
use crate::world::{BENCHMARK, HOST, HOST_V6, PUBLIC, PUBLIC_V6, World, vm};

#[test]
fn a_vm_is_online_as_its_host() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    assert!(guest.ping(PUBLIC));
    let (mut stream, seen) = guest.tcp(PUBLIC, 80).unwrap();
    assert_eq!(seen, HOST, "the server sees the host");
    echoes(&mut stream).unwrap();
    assert_eq!(guest.udp(PUBLIC, 8080).as_deref(), Some(HOST));
    assert!(guest.ping(PUBLIC_V6));
    assert_eq!(guest.tcp(PUBLIC_V6, 80).unwrap().1, HOST_V6, "NAT66");
    assert_eq!(guest.tcp(BENCHMARK, 80).unwrap().1, HOST, "mirrors are there on some hosts");
    assert!(guest.ping(&guest.gateway.to_string()));
    let state = net.state();
    let [vm] = &state.vms[..] else { panic!("{state:?}") };
    assert!(vm.is_in_use);
    assert!(vm.counters.allowed >= 6, "{:?}", vm.counters);
    assert!(vm.counters.sent_bytes > 300 && vm.counters.received_bytes > 300, "{:?}", vm.counters);
    assert_eq!((vm.counters.denied, vm.counters.spoofed), (0, 0), "{:?}", vm.denied);
    assert_eq!(state.warnings, Vec::<String>::new());
}

#[test]
fn what_is_done_twice_changes_nothing() {
    let world = World::new();
    let mut net = world.net();
    assert_eq!(net.configure().changes, 0);
    let mut one = vm(&net.instance, 2);
    one.groups = vec!["team".to_owned()];
    one.policy = crate::world::policy(&["*", "10.0.0.5:80-90", "[fd00::/8]:443"], &["*:25", "8.8.8.8"]);
    let first = net.attach(&one);
    assert!(first.changes > 0);
    let listed = world.host.ip(&format!("-d link show {}", first.tap));
    let owned = |uid: u32| format!("type tap pi off vnet_hdr on persist on user {uid}");
    assert!(listed.contains(&owned(1002)), "{listed}");
    let again = net.attach(&one);
    assert_eq!((again.tap.as_str(), again.changes), (first.tap.as_str(), 0));
    let two = nexus_net_wire::Vm { groups: vec!["team".to_owned()], ..vm(&net.instance, 3) };
    assert_ne!(net.attach(&two).tap, first.tap);
    for vm in [&one, &two] {
        assert_eq!(net.attach(vm).changes, 0);
    }
    assert_eq!(net.update(&one), 0);
    assert_eq!(net.configure().changes, 0);
    let other_owner = nexus_net_wire::Vm { owner_uid: 1003, ..one.clone() };
    assert_eq!(net.attach(&other_owner).tap, first.tap);
    let listed = world.host.ip(&format!("-d link show {}", first.tap));
    assert!(listed.contains(&owned(1003)), "{listed}");
}

#[test]
fn what_others_change_is_put_right() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    net.ask(Request::Watch {});
    for damage in [
        "flush ruleset",
        "flush chain inet nexus_0a1b2c3d decide",
        "add rule inet nexus_0a1b2c3d forward accept",
        "delete table bridge nexus_0a1b2c3d",
        "flush set bridge nexus_0a1b2c3d own4",
    ] {
        world.host.nft(damage);
        assert!(net.repaired() > 0, "{damage}");
        assert_eq!(net.attach(&guest.vm).changes, 0, "{damage}");
        assert_eq!(net.configure().changes, 0, "{damage}");
        guest.reaches(PUBLIC, 80);
    }
    let tap = net.attach(&guest.vm).tap;
    world.host.ip(&format!("link set {tap} type bridge_slave isolated off"));
    assert!(net.attach(&guest.vm).changes > 0);
    let shown = world.host.ip(&format!("-d link show {tap}"));
    assert!(shown.contains("isolated on"), "{shown}");
    world.host.ip("route flush dev nxb0a1b2c3d");
    world.host.ip("neigh flush dev nxb0a1b2c3d nud permanent");
    assert!(net.attach(&guest.vm).changes > 0);
    guest.reaches(PUBLIC, 80);
    assert!(
        matches!(net.ask(Request::Detach { id: guest.vm.id }), Answer::Detach(done) if done.was_attached)
    );
}
