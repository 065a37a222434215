use nexus_schema::network::{NetworkMode, NetworkPreset};
use proptest::prelude::*;

use super::*;

fn policy(preset: NetworkPreset, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    NetworkPolicy {
        mode: NetworkMode::Proxy,
        preset,
        allow: rules(allow),
        deny: rules(deny),
        groups: Vec::new(),
    }
}

fn around() -> Surroundings {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    Surroundings {
        own: ["198.51.100.1", "10.0.0.7", "2001:db8::7", "fd12::7"].map(address).into(),
        closed: vec![
            (address("10.77.0.0"), address("10.77.255.255")),
            (address("fd4e:58::"), address("fd4e:58::ffff:ffff:ffff:ffff")),
        ],
    }
}

fn is_in(cells: &[Cell], address: IpAddr, port: u16) -> bool {
    let holds = |cell: &&Cell| {
        (cell.addresses.0..=cell.addresses.1).contains(&address)
            && (cell.ports.0..=cell.ports.1).contains(&port)
    };
    let count = cells.iter().filter(holds).count();
    assert!(count <= 1, "cells overlap at {address}:{port}");
    count == 1
}

#[test]
fn the_internet_is_what_is_public_and_not_the_hosts() {
    let cells = allowed_cells(&policy(NetworkPreset::Internet, &[], &[]), &around(), Family::V4);
    assert!(cells.iter().all(|cell| cell.ports == (0, u16::MAX)), "{cells:?}");
    assert!(cells.len() < 20, "{cells:?}");
    for (address, is_open) in [
        ("8.8.8.8", true),
        ("192.0.2.1", true),
        ("198.18.0.1", true),
        ("198.51.100.1", false),
        ("198.51.100.2", true),
        ("10.0.0.1", false),
        ("10.77.0.2", false),
        ("169.254.169.254", false),
        ("224.0.0.1", false),
        ("127.0.0.1", false),
    ] {
        assert_eq!(is_in(&cells, address.parse().unwrap(), 443), is_open, "{address}");
    }
}

#[test]
fn ports_are_kept_apart_where_entries_do_so() {
    let policy =
        policy(NetworkPreset::Internet, &["*", "10.0.0.5:80", "10.77.0.9"], &["*:25", "8.8.8.8:53-60"]);
    let cells = allowed_cells(&policy, &around(), Family::V4);
    for (address, port, is_open) in [
        ("8.8.4.4", 25, false),
        ("8.8.4.4", 24, true),
        ("8.8.8.8", 52, true),
        ("8.8.8.8", 53, false),
        ("8.8.8.8", 60, false),
        ("8.8.8.8", 61, true),
        ("8.8.8.8", 0, true),
        ("10.0.0.5", 80, true),
        ("10.0.0.5", 0, false),
        ("10.0.0.5", 81, false),
        ("10.77.0.9", 80, false),
    ] {
        assert_eq!(is_in(&cells, address.parse().unwrap(), port), is_open, "{address}:{port}");
    }
}

#[test]
fn pins_are_for_the_ports_of_a_name() {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let listed = policy(NetworkPreset::Internet, &["a.example:443", "b.example", "c.example:53"], &["*:25"]);
    let pins = |name: &str, text: &str| pin_ports(&listed, &around(), name, address(text));
    assert_eq!(pins("a.example", "8.8.8.8"), Ok(vec![(443, 443)]));
    let whole = pins("b.example", "8.8.8.8").unwrap();
    let has = |port: u16| whole.iter().any(|(first, last)| (*first..=*last).contains(&port));
    assert!(has(0) && has(80) && has(443) && has(65535));
    assert!(!has(25) && !has(53) && !has(853), "{whole:?}");
    assert_eq!(pins("c.example", "8.8.8.8"), Ok(vec![(53, 53)]));
    assert_eq!(pins("d.example", "8.8.8.8"), Err(DenyReason::NameNotAllowed));
    assert_eq!(pins("a.example", "10.0.0.1"), Err(DenyReason::Private));
    assert_eq!(pins("a.example", "198.51.100.1"), Err(DenyReason::Host));
    assert_eq!(pins("a.example", "10.77.0.3"), Err(DenyReason::OtherVm));
    assert_eq!(pins("a.example", "2002:7f00:1::"), Err(DenyReason::Reserved));
    assert!(has_name_list(&listed));
    assert!(!has_name_list(&policy(NetworkPreset::Internet, &["*", "10.0.0.5"], &[])));
    assert!(has_name_list(&policy(NetworkPreset::Internet, &["*:443"], &[])));
    assert!(!has_name_list(&policy(NetworkPreset::Internet, &[], &["a.example"])));
}

fn some_rules() -> impl Strategy<Value = Vec<NetworkRule>> {
    const TEXTS: [&str; 14] = [
        "*",
        "*:443",
        "*:1000-2000",
        "a.example",
        "*.example:80",
        "10.0.0.0/8",
        "10.0.0.0/9:80-90",
        "8.8.8.8:443",
        "0.0.0.0/0:25",
        "::/0",
        "2001:db8::/32:80",
        "127.0.0.1",
        "fd12::/16",
        "64:ff9b::808:808",
    ];
    let rule = proptest::sample::select(&TEXTS[..]);
    proptest::collection::vec(rule.prop_filter_map("an entry", |text| text.parse().ok()), 0..5)
}

/// Addresses near the limits of ranges.
fn some_address() -> impl Strategy<Value = IpAddr> {
    const NEAR: [&str; 16] = [
        "10.0.0.7",
        "10.77.0.0",
        "10.78.0.0",
        "8.8.8.8",
        "172.16.0.0",
        "224.0.0.0",
        "169.254.169.254",
        "255.255.255.255",
        "2001:db8::7",
        "fd12::7",
        "64:ff9b::808:808",
        "64:ff9b::a00:7",
        "2000::",
        "4000::",
        "fe80::",
        "fd4e:58::",
    ];
    let near = (proptest::sample::select(&NEAR[..]), -1_i128..=1).prop_map(|(text, by)| match text.parse() {
        Ok(IpAddr::V4(v4)) => {
            IpAddr::V4(u32::from(v4).wrapping_add_signed(i32::try_from(by).unwrap()).into())
        }
        Ok(IpAddr::V6(v6)) => IpAddr::V6(u128::from(v6).wrapping_add_signed(by).into()),
        Err(error) => panic!("{error}"),
    });
    prop_oneof![near, any::<IpAddr>()]
}

fn some_port() -> impl Strategy<Value = u16> {
    prop_oneof![
        proptest::sample::select(&[0_u16, 25, 53, 80, 90, 91, 443, 444, 1000, 2001][..]),
        any::<u16>()
    ]
}

proptest! {
    #[test]
    fn cells_hold_what_the_policy_allows(
        allow in some_rules(), deny in some_rules(), is_open: bool, address in some_address(), port in some_port()
    ) {
        let preset = if is_open { NetworkPreset::Open } else { NetworkPreset::Internet };
        let policy = NetworkPolicy { mode: NetworkMode::Proxy, preset, allow, deny, groups: Vec::new() };
        let around = around();
        let cells = allowed_cells(&policy, &around, Family::of(address));
        let is_allowed = decide_address(&policy, around.place(address, port), false).is_ok();
        prop_assert_eq!(is_in(&cells, address, port), is_allowed && !is_closed(address) && !around.closes(address));
    }

    #[test]
    fn pins_of_one_policy_are_the_same_or_do_not_overlap(allow in some_rules(), deny in some_rules(), address in some_address()) {
        let policy = NetworkPolicy { mode: NetworkMode::Proxy, preset: NetworkPreset::Internet, allow, deny, groups: Vec::new() };
        let pins: BTreeSet<(u16, u16)> = ["a.example", "b.example", "c.test"]
            .iter()
            .flat_map(|name| pin_ports(&policy, &around(), name, address).unwrap_or_default())
            .collect();
        for (one, next) in pins.iter().zip(pins.iter().skip(1)) {
            prop_assert!(one.1 < next.0, "{:?}", pins);
        }
    }
}
