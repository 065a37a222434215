//! State that is left after kills is adopted or removed, and at the end nothing is left.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nexus_net_wire::{Answer, Request};

use crate::vm::{Guest, echoes};
use crate::world::{Net, PUBLIC, World, instance, vm};

/// Everything that the process could have left.
fn left(world: &World) -> String {
    let links = world.host.ip("-o link show");
    let links: Vec<&str> = links.lines().filter(|line| line.contains("nx")).collect();
    format!(
        "{}{}{}",
        links.join("\n"),
        world.host.nft("list ruleset"),
        world.host.ip("route show proto static")
    )
}

#[test]
fn fifty_vms_come_and_go_and_leave_nothing() {
    let world = World::new();
    let mut net = world.net();
    let start = Instant::now();
    let mut taps = BTreeSet::new();
    for number in 2..52 {
        let vm = vm(&net.instance, number);
        taps.insert(net.attach(&vm).tap);
    }
    let attached = start.elapsed();
    assert_eq!((taps.len(), net.state().vms.len()), (50, 50));
    // A boot should wait at most 20 ms for each; the limit is higher because the test machine may be loaded.
    assert!(attached < Duration::from_secs(25), "{attached:?}");
    let ids: Vec<_> = (2..12).map(|number| vm(&net.instance, number).id).collect();
    match net.ask(Request::Retain { ids: ids.clone() }) {
        Answer::Retain(retained) => assert_eq!(retained.removed.len(), 40),
        other => panic!("{other:?}"),
    }
    assert_eq!(net.state().vms.len(), 10);
    for id in ids {
        assert!(matches!(net.ask(Request::Detach { id }), Answer::Detach(done) if done.was_attached));
        assert!(matches!(net.ask(Request::Detach { id }), Answer::Detach(done) if !done.was_attached));
    }
    for number in 2..52 {
        let vm = vm(&net.instance, number);
        net.attach(&vm);
    }
    let start = Instant::now();
    match net.ask(Request::Cleanup { instance: None }) {
        Answer::Cleanup(cleaned) => assert_eq!(cleaned.interfaces, 51),
        other => panic!("{other:?}"),
    }
    assert!(start.elapsed() < Duration::from_secs(3), "at once and not one by one: {:?}", start.elapsed());
    assert!(net.child.wait().unwrap().success());
    assert_eq!(left(&world), "");
}

#[test]
fn vms_keep_their_network_when_the_process_is_killed() {
    let world = World::new();
    let mut net = world.net();
    let mut guest = Guest::new(&world, &mut net, 2);
    let gone = vm(&net.instance, 3);
    net.attach(&gone);
    let mut stream = guest.reaches(PUBLIC, 80);
    let rules = world.host.nft("list ruleset");
    let mut net = net.killed(&world);
    echoes(&mut stream).unwrap();
    guest.reaches(PUBLIC, 443);
    let configured = net.configure();
    assert_eq!(configured.found.len(), 2, "{configured:?}");
    assert_eq!(configured.changes, 0);
    guest.reaches(PUBLIC, 443);
    let tap = net.attach(&guest.vm.clone());
    assert_eq!(tap.changes, 0);
    match net.ask(Request::Retain { ids: vec![guest.vm.id] }) {
        Answer::Retain(retained) => assert_eq!(retained.removed, [gone.id]),
        other => panic!("{other:?}"),
    }
    echoes(&mut stream).unwrap();
    guest.reaches(PUBLIC, 80);
    assert!(!world.host.nft("list ruleset").contains("10.77.0.3") && rules.contains("10.77.0.3"));
    // A new policy also applies to connections that were opened before the kill.
    guest.vm.policy = crate::world::policy(&["a.example"], &[]);
    assert!(net.update(&guest.vm) >= 1);
    echoes(&mut stream).unwrap_err();
}

#[test]
fn a_kill_at_any_step_of_an_attachment_is_taken_up() {
    let world = World::new();
    for point in
        ["tap-made", "tap-named", "tap-kept", "tables-made", "address-added", "tap-joined", "tap-raised"]
    {
        let mut net = world.start(instance("0a1b2c3d", "10.77"), Some(point));
        // Some failpoints are already hit during the configuration.
        let _ = net.call(Request::Configure { instance: net.instance.clone() });
        let vm = vm(&net.instance, 2);
        let _ = net.call(Request::Attach { vm: vm.clone() });
        assert!(!net.child.wait().unwrap().success(), "{point}: it is killed there");
        let mut net = net.restarted(&world);
        net.configure();
        let guest = Guest::attach(&world, &mut net, &vm);
        guest.reaches(PUBLIC, 80);
        assert_eq!(net.configure().changes, 0, "{point}");
        assert_eq!(net.attach(&vm).changes, 0, "{point}");
        let taps = world.host.ip("-o link show");
        assert_eq!(
            taps.lines().filter(|line| line.contains(": nx") && !line.contains(": nxb")).count(),
            1,
            "{taps}"
        );
        end(&world, net);
        assert_eq!(left(&world), "", "{point}");
    }
}

#[test]
fn a_kill_at_any_step_of_a_removal_is_taken_up() {
    let world = World::new();
    for (point, request) in [
        ("tap-removed", Request::Detach { id: vm(&instance("0a1b2c3d", "10.77"), 2).id }),
        ("tap-removed", Request::Retain { ids: Vec::new() }),
        ("links-removed", Request::Cleanup { instance: None }),
    ] {
        let mut net = world.start(instance("0a1b2c3d", "10.77"), Some(point));
        net.configure();
        for number in [2, 3] {
            let vm = vm(&net.instance, number);
            net.attach(&vm);
        }
        net.call(request).unwrap_err();
        assert!(!net.child.wait().unwrap().success(), "{point}: it is killed there");
        let mut net = net.restarted(&world);
        if point == "links-removed" {
            end(&world, net);
        } else {
            net.configure();
            net.ask(Request::Retain { ids: Vec::new() });
            assert!(!world.host.ip("-o link show").contains(": nx0"));
            assert!(!world.host.nft("list ruleset").contains("10.77.0.2"));
            end(&world, net);
        }
        assert_eq!(left(&world), "", "{point}");
    }
}

/// Cleans up without a configuration, as `network_cleanup` does when no process is running.
fn end(world: &World, mut net: Net) {
    net.ask(Request::Cleanup { instance: Some(net.instance.id) });
    assert!(net.child.wait().unwrap().success());
    let _ = world;
}

#[test]
fn two_instances_are_side_by_side_and_leave_each_other_alone() {
    let world = World::new();
    let mut first = world.net();
    let mut second = world.start(instance("ffffffff", "10.88"), None);
    second.configure();
    let one = Guest::new(&world, &mut first, 2);
    let two = Guest::new(&world, &mut second, 2);
    one.reaches(PUBLIC, 80);
    two.reaches(PUBLIC, 80);
    crate::world::serve(&two.ns, &["10.88.0.2"], 8080);
    // Even with the preset `open`, VMs cannot connect to another instance's VMs.
    let mut vm = one.vm.clone();
    vm.policy.preset = nexus_schema::network::NetworkPreset::Open;
    first.update(&vm);
    one.tcp("10.88.0.2", 8080).unwrap_err();
    second.ask(Request::Watch {});
    two.is_refused("10.77.0.2", 8080);
    assert_eq!(second.denial(|_| true).vm, two.vm.id, "each instance reports its own refusals");
    end(&world, second);
    one.reaches(PUBLIC, 80);
    assert_eq!(first.attach(&vm).changes, 0);
    end(&world, first);
    assert_eq!(left(&world), "");
}

#[test]
fn strangers_in_the_group_are_left_alone() {
    let world = World::new();
    let net = world.net();
    world.host.ip("link add stranger type bridge");
    world.host.ip(&format!("link set stranger group {}", 0x0a1b_2c3d));
    end(&world, net);
    assert_eq!(left(&world), "");
    world.host.ip("link show stranger");
}
