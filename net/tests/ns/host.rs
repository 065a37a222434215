//! What VMs change on their host, and what its own firewall makes of them.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nexus_net_wire::{Answer, Request};
use rustix::fs::{FlockOperation, flock};

use crate::dns::{A, OK, serve_names};
use crate::vm::Guest;
use crate::world::{HOST, Net, Ns, PUBLIC, World, instance, serve};

const LAN: &str = "192.0.2.2";
const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARD_V6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// A network of the host's own, as containers have one, with a server in it; the internet knows the way.
fn lan(world: &World) -> Ns {
    let lan = Ns::new();
    world.host.ip(&format!("link add lan0 type veth peer name lan1 netns {}", lan.thread));
    world.host.ip("addr add 192.0.2.1/24 dev lan0");
    world.host.ip("link set lan0 up");
    lan.ip(&format!("addr add {LAN}/24 dev lan1"));
    lan.ip("link set lan1 up");
    lan.ip("route add default via 192.0.2.1");
    world.internet.ip(&format!("route add 192.0.2.0/24 via {HOST}"));
    serve(&lan, &[LAN], 80);
    lan
}

fn connects(from: &Ns, to: &str, port: u16) -> bool {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    from.run(move || TcpStream::connect_timeout(&to, Duration::from_millis(600))).is_ok()
}

fn forwards(world: &World) -> [String; 2] {
    let read = |path: &'static str| world.host.run(move || std::fs::read_to_string(path).unwrap());
    [FORWARD, FORWARD_V6].map(|path| read(path).trim().to_owned())
}

fn clean_up(mut net: Net) {
    assert!(matches!(net.ask(Request::Cleanup { instance: Some(net.instance.id) }), Answer::Cleanup(_)));
    assert!(net.child.wait().unwrap().success());
}

#[test]
fn a_host_that_did_not_forward_does_so_for_vms_alone() {
    let world = World::new();
    world.host.write(FORWARD, "0");
    world.host.write(FORWARD_V6, "0");
    let lan = lan(&world);
    let mut net = world.net();
    assert_eq!(forwards(&world), ["1", "1"]);
    let guest = Guest::new(&world, &mut net, 2);
    guest.reaches(PUBLIC, 80);
    guest.reaches(crate::world::PUBLIC_V6, 80);
    assert!(!connects(&world.internet, LAN, 80), "others go through the host");
    assert!(connects(&lan, PUBLIC, 80), "the host's own networks are its own matter");
    world.host.nft("add table ip ports");
    world.host.nft("add chain ip ports pre { type nat hook prerouting priority -100 ; }");
    world.host.nft("add rule ip ports pre tcp dport 8088 dnat to 192.0.2.2:80");
    assert!(connects(&world.internet, HOST, 8088), "ports that the host forwards are its own matter, too");
    // Whoever comes next knows it.
    let mut net = net.killed(&world);
    assert_eq!(net.configure().changes, 0);
    net.attach(&guest.vm);
    let mut other = world.start(instance("ffffffff", "10.88"), None);
    other.configure();
    let second = Guest::new(&world, &mut other, 2);
    second.reaches(PUBLIC, 80);
    guest.reaches(PUBLIC, 80);
    clean_up(net);
    assert_eq!(forwards(&world), ["1", "1"], "the other instance needs it");
    second.reaches(PUBLIC, 80);
    assert!(!connects(&world.internet, LAN, 80));
    clean_up(other);
    assert_eq!(forwards(&world), ["0", "0"]);
}

#[test]
fn a_host_that_forwarded_goes_on_as_it_did() {
    let world = World::new();
    world.host.write(FORWARD, "1");
    world.host.write(FORWARD_V6, "1");
    let _lan = lan(&world);
    let mut net = world.net();
    Guest::new(&world, &mut net, 2).reaches(PUBLIC, 80);
    assert!(connects(&world.internet, LAN, 80));
    clean_up(net);
    assert!(connects(&world.internet, LAN, 80));
    assert_eq!(forwards(&world), ["1", "1"]);
}

/// The chains of firewalls: Docker's, one by hand, and one like firewalld's, which drops by its last rule.
const FIREWALLS: [&str; 11] = [
    "add table ip filter",
    "add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
    "add chain ip filter DOCKER-USER",
    "add rule ip filter FORWARD counter jump DOCKER-USER",
    "add table inet mine",
    "add chain inet mine input { type filter hook input priority 0 ; policy drop ; }",
    "add rule inet mine input iifname lo accept",
    "add table inet firewalld",
    "add chain inet firewalld filter_FORWARD { type filter hook forward priority 10 ; }",
    "add rule inet firewalld filter_FORWARD ct state established,related accept",
    "add rule inet firewalld filter_FORWARD counter reject with icmpx admin-prohibited",
];

#[test]
fn the_firewall_of_the_host_is_told_and_opened_and_closed_again() {
    let world = World::new();
    serve_names(&world.internet);
    let mut net = world.net();
    net.ask(Request::Watch {});
    let guest = Guest::new(&world, &mut net, 2);
    assert_eq!(net.state().firewall, []);
    for line in FIREWALLS {
        world.host.nft(line);
    }
    // The table by hand lets the host's resolver hear answers.
    world.host.nft("add rule inet mine input ct state established,related accept");
    let theirs = || {
        ["ip filter", "inet mine", "inet firewalld"]
            .map(|table| world.host.nft(&format!("-s list table {table}")))
    };
    let before = theirs();
    let state = net.until(|state| state.firewall.len() == 3 && state.warnings.len() == 3);
    let told = state.warnings.join("\n");
    for words in [
        "chain FORWARD of table ip filter (docker)",
        "chain input of table inet mine;",
        "chain filter_FORWARD of table inet firewalld (firewalld)",
        "run nexusctl setup-firewall",
    ] {
        assert!(told.contains(words), "{words} in {told}");
    }
    assert_eq!(guest.udp(PUBLIC, 8080), None);

    net.instance.opens_firewall = true;
    assert_eq!(net.configure().changes, 2 + 4 + 2);
    assert_eq!(net.configure().changes, 0);
    guest.reaches(PUBLIC, 80);
    assert!(guest.ping(&guest.gateway.to_string()));
    assert_eq!(guest.look_up("a.example", A).code, OK);
    let state = net.state();
    assert!(state.firewall.iter().all(|chain| chain.open && chain.problem.is_none()), "{:?}", state.firewall);
    assert_eq!(state.warnings, Vec::<String>::new());
    let docker = world.host.nft("list chain ip filter DOCKER-USER");
    assert!(
        docker.contains("iifname \"nxb0a1b2c3d\" accept") && docker.contains("nexus:0a1b2c3d:"),
        "{docker}"
    );
    assert!(!world.host.nft("list chain ip filter FORWARD").contains("nxb"));
    // A firewall that is loaded anew.
    world.host.nft("flush chain ip filter DOCKER-USER");
    assert!(net.repaired() > 0);
    guest.reaches(PUBLIC, 80);

    net.instance.opens_firewall = false;
    assert_eq!(net.configure().changes, 8);
    assert_eq!(theirs(), before);
    assert_eq!(guest.udp(PUBLIC, 8080), None);
    net.instance.opens_firewall = true;
    net.configure();
    drop(guest);
    clean_up(net);
    assert!(!world.host.nft("list ruleset").contains("nexus"));
}

/// The same by the old iptables: policies, a jump to another chain, and a last rule that drops the rest.
const OLD: [(&str, &str); 7] = [
    ("iptables-legacy", "-N mine"),
    ("iptables-legacy", "-A mine -p tcp --dport 9 -j DROP"),
    ("iptables-legacy", "-A FORWARD -j mine"),
    ("iptables-legacy", "-P FORWARD DROP"),
    ("iptables-legacy", "-A INPUT -i up0 -j ACCEPT"),
    ("iptables-legacy", "-A INPUT -j DROP"),
    ("ip6tables-legacy", "-P FORWARD DROP"),
];

#[test]
fn chains_of_the_old_iptables_are_told_and_opened_and_closed_again() {
    let world = World::new();
    serve_names(&world.internet);
    let old = |program: &str, arguments: &str| {
        let done = world.host.try_run(program, arguments);
        done.unwrap_or_else(|said| panic!("{program} {arguments}: {said}"))
    };
    let mut net = world.net();
    let guest = Guest::new(&world, &mut net, 2);
    assert_eq!(net.state().firewall, [], "nobody has made a table, nor did this");
    for (program, line) in OLD {
        old(program, line);
    }
    let theirs = || ["iptables-legacy", "ip6tables-legacy"].map(|program| old(program, "-S"));
    // Packets that the jump has counted.
    let counted = || {
        let listed = old("iptables-legacy", "-S FORWARD -v");
        let jump = listed.lines().find(|line| line.contains("mine")).unwrap().to_owned();
        let mut words = jump.split_whitespace().skip_while(|word| *word != "-c");
        words.nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = theirs();
    assert_eq!(net.configure().changes, 0);
    let state = net.state();
    let told = state.warnings.join("\n");
    for words in [
        "chain FORWARD of table ip filter (iptables-legacy); run nexusctl setup-firewall",
        "chain INPUT of table ip filter (iptables-legacy)",
        "chain FORWARD of table ip6 filter (iptables-legacy)",
    ] {
        assert!(told.contains(words), "{words} in {told}");
    }
    assert_eq!(state.firewall.len(), 3, "{:?}", state.firewall);
    assert_eq!(guest.udp(PUBLIC, 8080), None);
    let passed = counted();
    assert!(passed > 0);

    net.instance.opens_firewall = true;
    assert_eq!(net.configure().changes, 2 + 3 + 2);
    assert_eq!(net.configure().changes, 0);
    guest.reaches(PUBLIC, 80);
    guest.reaches(crate::world::PUBLIC_V6, 80);
    assert!(guest.ping(&guest.gateway.to_string()));
    assert_eq!(guest.look_up("a.example", A).code, OK);
    let state = net.state();
    assert!(state.firewall.iter().all(|chain| chain.open && chain.problem.is_none()), "{:?}", state.firewall);
    assert_eq!(state.warnings, Vec::<String>::new());
    assert!(old("iptables-legacy", "-S FORWARD").contains("-A FORWARD -i nxb0a1b2c3d -j ACCEPT"));
    assert_eq!(counted(), passed, "ours come first, and theirs keep what they have counted");

    net.instance.opens_firewall = false;
    assert_eq!(net.configure().changes, 7);
    assert_eq!(theirs(), before);
    assert_eq!(guest.udp(PUBLIC, 8080), None);
    assert!(counted() > passed, "the jump leads where it did");

    // While another program changes tables, nobody waits for it; the rules are added once it is done.
    let lock = File::options().create(true).truncate(false).write(true).open("/run/xtables.lock").unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    net.instance.opens_firewall = true;
    assert_eq!(net.configure().changes, 0);
    let told = net.state().warnings.join("\n");
    assert!(told.contains("holds /run/xtables.lock; nexus-net tries again"), "{told}");
    let another = Guest::new(&world, &mut net, 3);
    assert_eq!(another.udp(PUBLIC, 8080), None);
    drop(lock);
    net.until(|state| state.firewall.iter().all(|chain| chain.open && chain.problem.is_none()));
    another.reaches(PUBLIC, 80);
    guest.reaches(PUBLIC, 80);
    drop(another);
    drop(guest);
    clean_up(net);
    assert_eq!(theirs(), before);
}
