//! Names of VMs, names on the internet, and allow lists of names.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use nexus_net_wire::{Dns, Protocol, Request, Vm};
use nexus_schema::network::DenyReason;

use crate::dns::{A, AAAA, CNAME, HTTPS, NO_SUCH_NAME, OK, PTR, REFUSED, SERVER_FAILURE, serve_names};
use crate::vm::{Guest, echoes};
use crate::world::{Net, PATIENCE, PRIVATE, PUBLIC, PUBLIC_TOO, PUBLIC_V6, RESOLVER, World, policy, vm};

fn world() -> (World, Net) {
    let world = World::new();
    serve_names(&world.internet);
    let net = world.net();
    (world, net)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn names_of_the_internet_are_forwarded() {
    let (world, mut net) = world();
    let guest = Guest::new(&world, &mut net, 2);
    let reply = guest.look_up("a.example", A);
    assert_eq!((reply.code, reply.addresses), (OK, vec![address(PUBLIC)]));
    assert_eq!(guest.look_up("A.EXAMPLE", A).addresses, [address(PUBLIC)]);
    assert_eq!(guest.look_up("six.example", AAAA).addresses, [address(PUBLIC_V6)]);
    assert_eq!(guest.look_up("nothing.example", A).code, NO_SUCH_NAME);
    assert_eq!(guest.look_up("a.example", AAAA).code, OK);
    let alias = guest.look_up("alias.example", A);
    assert_eq!(
        (alias.kinds.as_slice(), alias.addresses),
        (&[CNAME, CNAME, A][..], vec![address(PUBLIC_TOO)])
    );
    assert_eq!(guest.look_up_by_tcp("a.example", A).addresses, [address(PUBLIC)]);
    let v6 = net.instance.v6.unwrap().gateway.into();
    assert_eq!(guest.look_up_at(v6, "a.example", A).unwrap().addresses, [address(PUBLIC)]);
    // Long answers are complete over TCP, and over UDP at most as long as the client allows.
    let cut = guest.look_up_with(guest.gateway, "many.example", A, 512).unwrap();
    assert!(cut.is_truncated && cut.length <= 512, "{cut:?}");
    assert_eq!(guest.look_up_by_tcp("many.example", A).addresses.len(), 60);
    assert_eq!(guest.look_up("web.example", HTTPS).kinds, [HTTPS], "without a list, nothing is withheld");
    // With another server, and with none.
    net.instance.dns = Dns::Servers(Vec::new());
    net.configure();
    let reply = guest.look_up("b.example", A);
    assert_eq!(reply.error.unwrap().1, "the host has no DNS server");
    assert!(net.state().warnings.iter().any(|warning| warning.contains("resolv.conf")));
    net.instance.dns = Dns::Servers(vec!["198.51.100.2:53".parse().unwrap()]);
    net.configure();
    let reply = guest.look_up("b.example", A);
    assert_eq!((reply.code, reply.error.unwrap().0), (2, 22), "nobody is there");
}

#[test]
fn vms_have_names_where_a_group_has_both() {
    let (world, mut net) = world();
    let grouped = |number, net: &Net| Vm { groups: vec!["team".to_owned()], ..vm(&net.instance, number) };
    let (one, two) = (grouped(2, &net), grouped(3, &net));
    let one = Guest::attach(&world, &mut net, &one);
    let two = Guest::attach(&world, &mut net, &two);
    let three = Guest::new(&world, &mut net, 4);
    let reply = one.look_up("vm-3.nexus.internal", A);
    assert_eq!((reply.code, reply.addresses), (OK, vec![IpAddr::V4(two.vm.ipv4)]));
    assert_eq!(one.look_up("vm-3.nexus.internal", AAAA).addresses, [IpAddr::V6(two.vm.ipv6.unwrap())]);
    assert_eq!(one.look_up("vm-2.nexus.internal", A).addresses, [IpAddr::V4(one.vm.ipv4)]);
    assert_eq!(one.look_up("gateway.nexus.internal", A).addresses, [one.gateway]);
    assert_eq!(one.look_up("3.0.77.10.in-addr.arpa", PTR).names, ["vm-3.nexus.internal"]);
    for (guest, name) in [
        (&three, "vm-2.nexus.internal"),
        (&one, "vm-4.nexus.internal"),
        (&one, "vm-9.nexus.internal"),
        (&three, "2.0.77.10.in-addr.arpa"),
    ] {
        assert_eq!(
            guest.look_up(name, if name.ends_with("arpa") { PTR } else { A }).code,
            NO_SUCH_NAME,
            "{name}"
        );
    }
    net.update(&Vm { name: "db".to_owned(), ..two.vm.clone() });
    assert_eq!(one.look_up("db.nexus.internal", A).addresses, [IpAddr::V4(two.vm.ipv4)]);
    assert_eq!(one.look_up("vm-3.nexus.internal", A).code, NO_SUCH_NAME);
}

#[test]
fn an_allow_list_holds_by_name() {
    let (world, mut net) = world();
    let listed = Vm {
        policy: policy(
            &["a.example", "alias.example:80", "*.list.example:8080", "six.example", "local.example"],
            &[],
        ),
        ..vm(&net.instance, 2)
    };
    let guest = Guest::attach(&world, &mut net, &listed);
    net.ask(Request::Watch {});
    // An address is closed before its name is looked up.
    guest.is_refused(PUBLIC, 80);
    assert_eq!(net.denial(|denial| denial.port == Some(80)).reason, DenyReason::AddressNotAllowed);
    assert!(!guest.ping(PUBLIC));
    assert_eq!(guest.look_up("a.example", A).addresses, [address(PUBLIC)]);
    let mut stream = guest.reaches(PUBLIC, 80);
    assert!(guest.ping(PUBLIC));
    assert_eq!(guest.udp(PUBLIC, 8080).as_deref(), Some(crate::world::HOST));
    // The answer comes from the cache, and is pinned as well.
    assert_eq!(guest.look_up("a.example", A).addresses, [address(PUBLIC)]);
    // Other addresses and names are refused.
    guest.is_refused(PUBLIC_TOO, 80);
    for name in ["b.example", "shared.example", "target.cdn.example", "list.example", "nothing.test"] {
        let reply = guest.look_up(name, A);
        assert_eq!(reply.code, REFUSED, "{name}");
        let (code, text) = reply.error.unwrap();
        assert_eq!(code, 18);
        assert!(text.contains("name not allowed: ask for vm_update network.allow="), "{text}");
        let denial = net.denial(|denial| denial.name.as_deref() == Some(name));
        assert_eq!((denial.protocol, denial.reason), (Protocol::Dns, DenyReason::NameNotAllowed));
    }
    assert_eq!(guest.look_up_by_tcp("b.example", A).code, REFUSED, "nor over TCP");
    // A chain of names, for the port in the entry.
    assert_eq!(guest.look_up("alias.example", A).addresses, [address(PUBLIC_TOO)]);
    guest.reaches(PUBLIC_TOO, 80);
    guest.is_refused(PUBLIC_TOO, 443);
    assert_eq!(net.denial(|denial| denial.port == Some(443)).name.as_deref(), Some("alias.example"));
    assert_eq!(guest.look_up("deep.list.example", A).code, OK);
    assert_eq!(guest.look_up("six.example", AAAA).addresses, [address(PUBLIC_V6)]);
    guest.reaches(PUBLIC_V6, 80);
    // QUIC, service records and other resolvers would bypass the list.
    assert_eq!(guest.udp(PUBLIC, 443), None);
    assert_eq!(net.denial(|denial| denial.protocol == Protocol::Udp).reason, DenyReason::Quic);
    assert!(guest.look_up("a.example", HTTPS).kinds.is_empty());
    assert_eq!(guest.look_up_at(address(RESOLVER), "a.example", A), None);
    assert_eq!(net.denial(|denial| denial.port == Some(53)).reason, DenyReason::Resolver);
    guest.is_refused(PUBLIC, 53);
    guest.is_refused(PUBLIC, 853);
    // An allowed name opens no private address.
    let reply = guest.look_up("local.example", A);
    assert_eq!((reply.code, reply.addresses.len()), (REFUSED, 0));
    assert!(reply.error.unwrap().1.contains("leads to 127.0.0.1"));
    // Long-lived connections outlive the pins of the old process and changes that still allow their name.
    echoes(&mut stream).unwrap();
    let mut changed = listed.clone();
    changed.policy = policy(&["a.example:80"], &[]);
    net.update(&changed);
    echoes(&mut stream).unwrap();
    guest.is_refused(PUBLIC, 443);
    guest.is_refused(PUBLIC_V6, 80);
    changed.policy = policy(&["b.example"], &[]);
    assert!(net.update(&changed) >= 1);
    echoes(&mut stream).unwrap_err();
    guest.is_refused(PUBLIC, 80);
}

#[test]
fn an_entry_of_one_protocol_is_for_that_one_alone() {
    let (world, mut net) = world();
    let (udp, tcp) = (format!("{PUBLIC}:8080/udp"), format!("{PUBLIC_TOO}/tcp"));
    let allow: [&str; 3] = [&udp, &tcp, "a.example:443/tcp"];
    let listed = Vm { policy: policy(&allow, &[]), ..vm(&net.instance, 2) };
    let guest = Guest::attach(&world, &mut net, &listed);
    assert_eq!(guest.udp(PUBLIC, 8080).as_deref(), Some(crate::world::HOST));
    guest.is_refused(PUBLIC, 8080);
    let mut stream = guest.reaches(PUBLIC_TOO, 80);
    assert_eq!(guest.udp(PUBLIC_TOO, 8080), None);
    assert!(!guest.ping(PUBLIC_TOO) && !guest.ping(PUBLIC));
    // A name opens its protocol as well.
    guest.is_refused(PUBLIC, 443);
    assert_eq!(guest.look_up("a.example", A).addresses, [address(PUBLIC)]);
    guest.reaches(PUBLIC, 443);
    guest.is_refused(PUBLIC, 80);
    assert_eq!(net.configure().changes, 0, "the kernel has what is wanted");
    // A change of the protocol cuts what was open by the other one.
    let mut changed = listed.clone();
    changed.policy = policy(&[&format!("{PUBLIC_TOO}/icmp")], &[]);
    assert!(net.update(&changed) >= 1);
    echoes(&mut stream).unwrap_err();
    assert!(guest.ping(PUBLIC_TOO) && !guest.ping(PUBLIC));
    guest.is_refused(PUBLIC_TOO, 80);
    changed.policy = policy(&[], &[&udp]);
    net.update(&changed);
    guest.reaches(PUBLIC, 8080);
    assert_eq!(guest.udp(PUBLIC, 8080), None);
    assert!(guest.ping(PUBLIC));
}

#[test]
fn public_names_lead_to_nothing_private() {
    let (world, mut net) = world();
    let guest = Guest::new(&world, &mut net, 2);
    let denied = Vm { policy: policy(&[], &["a.example", "*.cdn.example"]), ..vm(&net.instance, 3) };
    let denied = Guest::attach(&world, &mut net, &denied);
    net.ask(Request::Watch {});
    for (name, reason) in [
        ("rebind.example", DenyReason::Private),
        ("wander.example", DenyReason::Private),
        ("cloud.example", DenyReason::Metadata),
        ("local.example", DenyReason::Host),
        ("vm.example", DenyReason::OtherVm),
    ] {
        let reply = guest.look_up(name, A);
        assert_eq!((reply.code, reply.addresses.len()), (REFUSED, 0), "{name}");
        assert_eq!(net.denial(|denial| denial.name.as_deref() == Some(name)).reason, reason, "{name}");
        assert_eq!(guest.look_up_by_tcp(name, A).code, REFUSED, "{name}, by TCP");
    }
    for name in ["translated.example", "mapped.example", "tunnelled.example"] {
        let reply = guest.look_up(name, AAAA);
        assert_eq!((reply.code, reply.addresses.len()), (REFUSED, 0), "{name}");
    }
    assert_eq!(guest.look_up("mixed.example", A).addresses, [address(PUBLIC)], "public addresses stay");
    let mut open = guest.vm.clone();
    open.policy.preset = nexus_schema::network::NetworkPreset::Open;
    net.update(&open);
    assert_eq!(guest.look_up("rebind.example", A).code, OK);
    assert_eq!(guest.look_up("cloud.example", A).code, REFUSED);
    // A denied name is refused, also through an alias.
    for name in ["a.example", "alias.example"] {
        assert_eq!(denied.look_up(name, A).code, REFUSED, "{name}");
    }
    assert_eq!(denied.look_up("b.example", A).code, OK);
}

#[test]
fn an_allowed_name_that_moves_opens_nothing_private() {
    let (world, mut net) = world();
    let allow = ["wander.example", "translated.example", "*.cdn.example"];
    let listed = Vm { policy: policy(&allow, &[]), ..vm(&net.instance, 2) };
    let guest = Guest::attach(&world, &mut net, &listed);
    for (name, kind) in [("wander.example", A), ("stray.cdn.example", A), ("translated.example", AAAA)] {
        let reply = guest.look_up(name, kind);
        assert_eq!((reply.code, reply.addresses.len()), (REFUSED, 0), "{name}");
        assert_eq!(guest.look_up_by_tcp(name, kind).code, REFUSED, "{name}, by TCP");
    }
    guest.is_refused(PRIVATE, 80);
    let pins = ["pin4", "pin6"].map(|set| world.host.nft(&format!("list set inet nexus_0a1b2c3d {set}")));
    assert!(pins.iter().all(|set| !set.contains("elements")), "{pins:?}");
    // The public end of a chain with the same names is open.
    assert_eq!(guest.look_up("target.cdn.example", A).addresses, [address(PUBLIC_TOO)]);
    guest.reaches(PUBLIC_TOO, 80);
}

#[test]
fn two_names_of_one_address_open_the_ports_of_both() {
    let (world, mut net) = world();
    let listed = Vm { policy: policy(&["a.example:80", "shared.example:443"], &[]), ..vm(&net.instance, 2) };
    let guest = Guest::attach(&world, &mut net, &listed);
    guest.look_up("a.example", A);
    guest.reaches(PUBLIC, 80);
    guest.is_refused(PUBLIC, 443);
    guest.look_up("shared.example", A);
    guest.reaches(PUBLIC, 80);
    guest.reaches(PUBLIC, 443);
    guest.look_up("a.example", A);
    assert_eq!(net.configure().changes, 0, "the kernel has the known pins");
    guest.is_refused(PUBLIC, 8080);
}

#[test]
fn a_name_whose_way_cannot_be_opened_is_a_failure_and_tried_again() {
    let (world, mut net) = world();
    let listed = Vm { policy: policy(&["a.example:80-90"], &[]), ..vm(&net.instance, 2) };
    let guest = Guest::attach(&world, &mut net, &listed);
    // An overlapping range, which the kernel refuses.
    let tap = net.attach(&listed).tap;
    let shown = world.host.ip(&format!("-o link show {tap}"));
    let index: u32 = shown.split(':').next().unwrap().parse().unwrap();
    // In ranges nft takes marks for numbers in network byte order.
    let mark = (0x4e00_0000 | index).swap_bytes();
    let element = format!("inet nexus_0a1b2c3d pin4 {{ {mark:#x} . {PUBLIC} . 85-95 }}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        world.host.nft(&format!("add element {element}"));
        // The repairs that follow the attachment remove it.
        std::thread::park_timeout(Duration::from_millis(300));
        if world.host.nft("list set inet nexus_0a1b2c3d pin4").contains("85-95") {
            break;
        }
        assert!(Instant::now() < deadline, "the network never comes to rest");
    }
    let reply = guest.look_up("a.example", A);
    assert_eq!((reply.code, reply.addresses.len()), (SERVER_FAILURE, 0));
    let (code, text) = reply.error.unwrap();
    assert!(code == 14 && text.starts_with("a.example: cannot open its addresses in the firewall"), "{text}");
    guest.is_refused(PUBLIC, 80);
    world.host.nft(&format!("delete element {element}"));
    assert_eq!(guest.look_up("a.example", A).code, OK);
    guest.reaches(PUBLIC, 80);
}

#[test]
fn pins_outlive_the_process() {
    let (world, mut net) = world();
    let listed = Vm { policy: policy(&["a.example"], &[]), ..vm(&net.instance, 2) };
    let guest = Guest::attach(&world, &mut net, &listed);
    guest.look_up("a.example", A);
    guest.reaches(PUBLIC, 80);
    let shown = world.host.nft("list set inet nexus_0a1b2c3d pin4");
    assert!(shown.contains(r#"comment "a.example""#) && shown.contains("timeout"), "{shown}");
    let mut net = net.killed(&world);
    guest.reaches(PUBLIC, 80);
    net.configure();
    assert_eq!(net.attach(&listed).changes, 0);
    guest.reaches(PUBLIC, 80);
    // The table is created again with the open pins.
    net.ask(Request::Watch {});
    world.host.nft("flush ruleset");
    net.repaired();
    guest.reaches(PUBLIC, 80);
    net.update(&Vm { policy: policy(&["b.example"], &[]), ..listed });
    guest.is_refused(PUBLIC, 80);
    assert!(!world.host.nft("list set inet nexus_0a1b2c3d pin4").contains("a.example"));
}
