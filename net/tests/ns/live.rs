//! Policies change while connections are open: those that are no longer allowed are cut, the others continue.

use std::time::{Duration, Instant};

use nexus_net_wire::{Protocol, Request};
use nexus_schema::network::{DenyReason, NetworkMode, NetworkPolicy};

use crate::vm::{Guest, echoes};
use crate::world::{PUBLIC, PUBLIC_TOO, PUBLIC_V6, World, policy};

#[test]
fn a_change_cuts_what_it_no_longer_allows_and_nothing_else() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    let bystander = Guest::new(&world, &mut net, 3);
    net.ask(Request::Watch {});
    let mut kept = guest.reaches(PUBLIC, 80);
    let mut cut = guest.reaches(PUBLIC, 443);
    let mut cut_too = guest.reaches(PUBLIC_TOO, 80);
    let mut cut_v6 = guest.reaches(PUBLIC_V6, 80);
    let mut others = bystander.reaches(PUBLIC_TOO, 80);
    let mut vm = guest.vm.clone();
    vm.policy = policy(&[&format!("{PUBLIC}:80")], &[]);
    let start = Instant::now();
    assert_eq!(net.update(&vm), 3);
    for stream in [&mut cut, &mut cut_too, &mut cut_v6] {
        let error = echoes(stream).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    for stream in [&mut kept, &mut others] {
        echoes(stream).unwrap();
    }
    let denial = net.denial(|denial| denial.port == Some(443));
    assert_eq!((denial.protocol, denial.reason), (Protocol::Tcp, DenyReason::AddressNotAllowed));
    guest.is_refused(PUBLIC_TOO, 80);
    vm.policy = NetworkPolicy { mode: NetworkMode::None, ..vm.policy };
    assert_eq!(net.update(&vm), 1);
    echoes(&mut kept).unwrap_err();
    guest.is_refused(PUBLIC, 80);
    assert_eq!(net.update(&vm), 0, "cut connections are not cut again");
    vm.policy = policy(&[], &[]);
    net.update(&vm);
    echoes(&mut guest.reaches(PUBLIC, 80)).unwrap();
    echoes(&mut others).unwrap();
}

#[test]
fn a_flow_of_datagrams_is_cut_and_goes_on_again() {
    let world = World::new();
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    let socket = guest.ns.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.connect((PUBLIC, 8080)).unwrap();
    socket.set_read_timeout(Some(crate::world::SILENCE)).unwrap();
    let is_answered = || {
        let mut buffer = [0; 64];
        socket.send(b"x").is_ok() && socket.recv(&mut buffer).is_ok()
    };
    assert!(is_answered());
    let mut vm = guest.vm.clone();
    vm.policy = policy(&[PUBLIC_TOO], &[]);
    assert_eq!(net.update(&vm), 1);
    assert!(!is_answered());
    assert!(!is_answered());
    vm.policy = policy(&[], &[]);
    net.update(&vm);
    // Each refusal was reported to the socket once.
    assert!((0..5).any(|_| is_answered()));
}
