use nexus_schema::network::NetworkMode::{None as NoNetwork, Proxy};
use nexus_schema::network::NetworkPreset::{Internet, Open};
use proptest::prelude::*;

use super::*;

fn rules(texts: &[&str]) -> Vec<NetworkRule> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn policy(preset: NetworkPreset, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    NetworkPolicy { mode: Proxy, preset, allow: rules(allow), deny: rules(deny), ..NetworkPolicy::default() }
}

fn place(address: &str, port: u16) -> Place {
    let address: IpAddr = address.parse().unwrap();
    Place { address, port, range: range(address), is_own: false, is_of_vms: false }
}

/// Decides about a connection to a name that resolves to an address, or to the address itself.
fn decide(policy: &NetworkPolicy, name: Option<&str>, address: &str, port: u16) -> Result<(), DenyReason> {
    if let Some(name) = name {
        decide_name(policy, name, port)?;
    }
    decide_address(policy, place(address, port), name.is_some())
}

#[test]
fn entries_of_one_protocol_are_for_that_one_alone() {
    use nexus_schema::network::RuleProtocol::{Icmp, Tcp, Udp};
    let around = Surroundings::default();
    let address: IpAddr = "8.8.8.8".parse().unwrap();
    let open = |policy: &NetworkPolicy, protocol, port: u16| {
        let cells = allowed_cells(policy, &around, Family::V4);
        let has = |cell: &&Cell| {
            (cell.addresses.0..=cell.addresses.1).contains(&address)
                && (cell.ports.0..=cell.ports.1).contains(&port)
                && [Protocols::All, Protocols::Only(protocol)].contains(&cell.protocols)
        };
        cells.iter().filter(has).count() == 1
    };
    let listed = policy(Internet, &["8.8.8.8:53/udp", "8.8.8.8:443/tcp"], &[]);
    assert!(open(&listed, Udp, 53) && !open(&listed, Tcp, 53) && !open(&listed, Icmp, 0));
    assert!(open(&listed, Tcp, 443) && !open(&listed, Udp, 443));
    let denied = policy(Internet, &[], &["*/udp"]);
    assert!(open(&denied, Tcp, 53) && !open(&denied, Udp, 53) && open(&denied, Icmp, 0));
    let ping = policy(Internet, &["8.8.8.8/icmp"], &[]);
    assert!(open(&ping, Icmp, 0) && !open(&ping, Tcp, 443) && !open(&ping, Udp, 53));
    assert_eq!(Protocols::of(&policy(Internet, &["8.8.8.8"], &[])), [Protocols::All]);

    let named = policy(Internet, &["a.example:443/tcp"], &[]);
    let pins = pin_cells(&named, &around, "a.example", address).unwrap();
    let expected = Cell { addresses: (address, address), ports: (443, 443), protocols: Protocols::Only(Tcp) };
    assert_eq!(pins, [expected]);
    assert_eq!(pin_cells(&named, &around, "b.example", address), Err(DenyReason::NameNotAllowed));
    assert!(has_name_list(&policy(Internet, &["*/tcp"], &[])), "for UDP it is one");
}

#[test]
fn packages_open_their_names_and_nothing_else() {
    let with = |allow: &[&str]| NetworkPolicy {
        packages: rules(&["pip.example:443", "10.0.0.7:8080"]),
        ..policy(NetworkPreset::Packages, allow, &[])
    };
    let policy = with(&[]);
    assert_eq!(decide_name(&policy, "pip.example", 443), Ok(()));
    assert_eq!(decide_name(&policy, "pip.example", 80), Err(DenyReason::NameNotAllowed));
    assert_eq!(decide_name(&policy, "other.example", 443), Err(DenyReason::NameNotAllowed));
    let decide = |policy: &NetworkPolicy, address: &str, port, by_name| {
        let place = Surroundings::default().place(address.parse().unwrap(), port);
        decide_address(policy, place, by_name)
    };
    assert_eq!(decide(&policy, "8.8.8.8", 443, true), Ok(()), "found by an allowed name");
    assert_eq!(decide(&policy, "8.8.8.8", 443, false), Err(DenyReason::AddressNotAllowed));
    assert_eq!(
        decide(&policy, "10.0.0.7", 8080, false),
        Ok(()),
        "the host's own configuration names this address"
    );
    assert_eq!(
        decide(&policy, "10.0.0.8", 443, true),
        Err(DenyReason::Private),
        "a name opens no private address"
    );
    assert!(has_name_list(&policy));
    let cells = allowed_cells(&policy, &Surroundings::default(), Family::V4);
    assert_eq!(cells.len(), 1, "{cells:?}");
    // What a hint says keeps the names.
    let hint = allowing(&policy, "x.example", 443, DenyReason::NameNotAllowed);
    let hint: Vec<&str> = hint.iter().map(String::as_str).collect();
    let more = with(&hint);
    assert_eq!(decide_name(&more, "x.example", 443), Ok(()));
    assert_eq!(decide_name(&more, "pip.example", 443), Ok(()));
    // Without names, nothing is allowed.
    let none = NetworkPolicy { packages: Vec::new(), ..policy };
    assert_eq!(decide_name(&none, "pip.example", 443), Err(DenyReason::NoNetwork));
    assert!(allowed_cells(&none, &Surroundings::default(), Family::V4).is_empty());
}

#[test]
fn presets_open_what_they_say() {
    use DenyReason::{Host, LinkLocal, Metadata, Multicast, OtherVm, Private, Reserved};
    for (address, internet, open) in [
        ("8.8.8.8", Ok(()), Ok(())),
        ("2600::1", Ok(()), Ok(())),
        ("192.0.2.1", Ok(()), Ok(())),
        ("198.18.0.1", Ok(()), Ok(())),
        ("10.0.0.1", Err(Private), Ok(())),
        ("100.64.0.1", Err(Private), Ok(())),
        ("fd12::1", Err(Private), Ok(())),
        ("::ffff:192.168.0.1", Err(Private), Ok(())),
        ("127.0.0.1", Err(Host), Err(Host)),
        ("::1", Err(Host), Err(Host)),
        ("0.0.0.0", Err(Host), Err(Host)),
        ("::ffff:127.0.0.1", Err(Host), Err(Host)),
        ("169.254.1.1", Err(LinkLocal), Err(LinkLocal)),
        ("169.254.169.254", Err(Metadata), Err(Metadata)),
        ("fd00:ec2::254", Err(Metadata), Err(Metadata)),
        ("224.0.0.1", Err(Multicast), Err(Multicast)),
        ("255.255.255.255", Err(Reserved), Err(Reserved)),
    ] {
        for name in [None, Some("example.org")] {
            assert_eq!(decide(&policy(Internet, &[], &[]), name, address, 443), internet, "{address}");
            assert_eq!(decide(&policy(Open, &[], &[]), name, address, 443), open, "{address}");
        }
    }
    let own = Place { is_own: true, ..place("203.0.113.9", 22) };
    assert_eq!(decide_address(&policy(Internet, &["203.0.113.0/24"], &[]), own, false), Err(Host));
    assert_eq!(decide_address(&policy(Internet, &["203.0.113.9"], &[]), own, false), Ok(()));
    assert_eq!(decide_address(&policy(Internet, &[], &[]), own, true), Err(Host));
    assert_eq!(decide_address(&policy(Open, &[], &[]), own, true), Ok(()));
    // Only groups let VMs talk to each other, not policies.
    let vm = Place { is_of_vms: true, ..place("10.128.0.2", 80) };
    for open in [
        policy(Open, &[], &[]),
        policy(Open, &["*"], &[]),
        policy(Internet, &["10.128.0.2", "10.0.0.0/8"], &[]),
    ] {
        assert_eq!(decide_address(&open, vm, false), Err(OtherVm));
        assert_eq!(decide_address(&open, vm, true), Err(OtherVm));
    }
}

/// Allow list, deny list, name, address, port, and the decision.
type Row<'a> = (&'a [&'a str], &'a [&'a str], Option<&'a str>, &'a str, u16, Result<(), DenyReason>);

#[test]
fn lists_are_obeyed() {
    use DenyReason::{AddressNotAllowed, Denied, Host, Metadata, NameNotAllowed, Private};
    let table: &[Row] = &[
        // Names.
        (&["a.example"], &[], Some("a.example"), "8.8.8.8", 443, Ok(())),
        (&["a.example"], &[], Some("b.example"), "8.8.8.8", 443, Err(NameNotAllowed)),
        (&["a.example"], &[], None, "8.8.8.8", 443, Err(AddressNotAllowed)),
        (&["a.example:443"], &[], Some("a.example"), "8.8.8.8", 80, Err(NameNotAllowed)),
        (&["*.example"], &[], Some("a.b.example"), "8.8.8.8", 80, Ok(())),
        // No name opens a private address.
        (&["a.example"], &[], Some("a.example"), "10.0.0.1", 443, Err(Private)),
        (&["localhost"], &[], Some("localhost"), "127.0.0.1", 443, Err(Host)),
        (&["*"], &[], Some("a.example"), "::ffff:10.0.0.1", 443, Err(Private)),
        // Entries with addresses open these, with and without a name.
        (&["10.0.0.0/8"], &[], None, "10.1.2.3", 443, Ok(())),
        (&["10.0.0.0/8"], &[], Some("a.example"), "10.1.2.3", 443, Err(NameNotAllowed)),
        (&["10.0.0.0/8", "a.example"], &[], Some("a.example"), "10.1.2.3", 443, Ok(())),
        (&["127.0.0.1:8080"], &[], None, "127.0.0.1", 8080, Ok(())),
        (&["127.0.0.1:8080"], &[], None, "::ffff:127.0.0.1", 8080, Ok(())),
        (&["127.0.0.1:8080"], &[], None, "127.0.0.1", 8081, Err(AddressNotAllowed)),
        (&["127.0.0.1:8080"], &[], None, "8.8.8.8", 443, Err(AddressNotAllowed)),
        // Wide networks open no private range.
        (&["0.0.0.0/0"], &[], None, "8.8.8.8", 443, Ok(())),
        (&["0.0.0.0/0"], &[], None, "10.0.0.1", 443, Err(Private)),
        (&["0.0.0.0/0"], &[], None, "127.0.0.1", 443, Err(Host)),
        (&["0.0.0.0/1"], &[], None, "127.0.0.1", 443, Err(Host)),
        (&["64:ff9b::/97"], &[], None, "64:ff9b::7f00:1", 443, Err(Host)),
        (&["2002::/17"], &[], None, "2002:7f00:1::", 443, Err(Host)),
        (&["127.0.0.0/8"], &[], None, "127.0.0.1", 443, Ok(())),
        (&["fd12::/16"], &[], None, "fd12::1", 443, Ok(())),
        (&[], &["8.8.8.8"], None, "64:ff9b::808:808", 443, Err(Denied)),
        (&["::/0"], &[], None, "::1", 443, Err(Host)),
        (&["192.168.0.0/15"], &[], None, "192.168.0.1", 443, Err(Private)),
        (&["127.0.0.0/8"], &[], None, "127.0.0.1", 443, Ok(())),
        (&["fc00::/7"], &[], None, "fd12::1", 443, Ok(())),
        (&["169.254.0.0/16"], &[], None, "169.254.169.254", 443, Err(Metadata)),
        (&["169.254.169.254"], &[], None, "169.254.169.254", 443, Ok(())),
        // `*` allows what the preset allows.
        (&["*", "10.0.0.5:80"], &[], Some("a.example"), "8.8.8.8", 443, Ok(())),
        (&["*", "10.0.0.5:80"], &[], None, "8.8.8.8", 443, Ok(())),
        (&["*", "10.0.0.5:80"], &[], None, "10.0.0.5", 80, Ok(())),
        (&["*", "10.0.0.5:80"], &[], None, "10.0.0.6", 80, Err(Private)),
        (&["*:443"], &[], Some("a.example"), "8.8.8.8", 80, Err(NameNotAllowed)),
        // Deny lists.
        (&[], &["a.example"], Some("a.example"), "8.8.8.8", 443, Err(Denied)),
        (&[], &["a.example"], Some("b.example"), "8.8.8.8", 443, Ok(())),
        (&["a.example"], &["8.8.8.0/24"], Some("a.example"), "8.8.8.8", 443, Err(Denied)),
        (&["10.0.0.0/8"], &["10.0.0.1"], None, "10.0.0.1", 443, Err(Denied)),
        (&["10.0.0.0/8"], &["10.0.0.1"], None, "::ffff:10.0.0.1", 443, Err(Denied)),
        (&[], &["*:25"], Some("a.example"), "8.8.8.8", 25, Err(Denied)),
        (&[], &["*:25"], None, "8.8.8.8", 25, Err(Denied)),
    ];
    for (allow, deny, name, address, port, expected) in table {
        let policy = policy(Internet, allow, deny);
        assert_eq!(
            decide(&policy, *name, address, *port),
            *expected,
            "{allow:?} {deny:?} {name:?} {address}:{port}"
        );
    }
}

#[test]
fn a_hint_names_the_list_that_allows() {
    use DenyReason::{AddressNotAllowed, Denied, NameNotAllowed, Private};
    for (allow, host, reason, expected) in [
        (&["a.example"][..], "b.example", NameNotAllowed, &["a.example", "b.example:443"][..]),
        (&[], "10.0.0.5", Private, &["*", "10.0.0.5:443"]),
        (&["a.example"], "::1", AddressNotAllowed, &["a.example", "[::1]:443"]),
        (&[], "a.example", Denied, &[]),
    ] {
        assert_eq!(allowing(&policy(Internet, allow, &[]), host, 443, reason), expected);
    }
}

fn some_rules() -> impl Strategy<Value = Vec<NetworkRule>> {
    const TEXTS: [&str; 9] = [
        "*",
        "*:443",
        "a.example",
        "*.example",
        "b.example:80",
        "10.0.0.0/8",
        "8.8.8.8:443",
        "::/0",
        "127.0.0.1",
    ];
    proptest::collection::vec(
        proptest::sample::select(&TEXTS[..]).prop_map(|text| text.parse().unwrap()),
        0..4,
    )
}

proptest! {
    #[test]
    fn nothing_goes_without_a_network(name in "[a-z.]{1,20}", address: IpAddr, port: u16, allow in some_rules()) {
        let policy = NetworkPolicy { mode: NoNetwork, allow, ..NetworkPolicy::default() };
        let place = Place { address, port, range: range(address), is_own: false, is_of_vms: false };
        prop_assert_eq!(decide_name(&policy, &name, port), Err(DenyReason::NoNetwork));
        prop_assert_eq!(decide_address(&policy, place, true), Err(DenyReason::NoNetwork));
    }

    #[test]
    fn what_is_denied_is_denied_whatever_is_allowed(address: IpAddr, port: u16, allow in some_rules(), by_name: bool) {
        let deny = vec![NetworkRule::exact(&address.to_string(), port).unwrap()];
        let policy = NetworkPolicy { mode: Proxy, preset: Open, allow, deny, ..NetworkPolicy::default() };
        let place = Place { address, port, range: range(address), is_own: false, is_of_vms: false };
        prop_assert_eq!(decide_address(&policy, place, by_name), Err(DenyReason::Denied));
    }

    #[test]
    fn no_name_leads_to_what_no_address_opens(address: IpAddr, port: u16, names in some_rules(), is_own: bool) {
        // Only names and `*`: they open no address.
        let allow: Vec<_> = names.into_iter().filter(|rule| !matches!(rule.target(), Target::Net(..))).collect();
        let policy = NetworkPolicy { mode: Proxy, preset: Internet, allow, deny: Vec::new(), ..NetworkPolicy::default() };
        let place = Place { address, port, range: range(address), is_own, is_of_vms: false };
        if decide_address(&policy, place, true).is_ok() {
            prop_assert_eq!(place.range, Range::Public);
            prop_assert!(!is_own);
        }
    }

    #[test]
    fn following_a_hint_helps(address: IpAddr, port in 1_u16.., allow in some_rules(), by_name: bool) {
        let mut policy = NetworkPolicy { mode: Proxy, preset: Internet, allow, deny: Vec::new(), ..NetworkPolicy::default() };
        let place = Place { address, port, range: range(address), is_own: false, is_of_vms: false };
        if let Err(reason) = decide_address(&policy, place, by_name) {
            let allow = allowing(&policy, &address.to_string(), port, reason);
            policy.allow = allow.iter().map(|text| text.parse().unwrap()).collect();
            prop_assert_eq!(decide_address(&policy, place, by_name), Ok(()));
        }
    }
}
