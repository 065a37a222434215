use std::collections::BTreeSet;

use nexus_net_policy::Surroundings;
use nexus_net_wire::Vm;
use nexus_schema::id::VmId;
use nexus_schema::network::NetworkPolicy;

use super::*;
use crate::nft::elements::{Wired, contents};
use crate::nft::expr::Verdict;
use crate::nft::{Contents, Element, MARK_CUT};

fn frame(drops_to_vms: bool) -> Frame {
    Frame {
        table: "nexus_0a1b2c3d".to_owned(),
        bridge: "nxb0a1b2c3d".to_owned(),
        v4: ("10.77.0.0/16".parse().unwrap(), Ipv4Addr::new(10, 77, 0, 1)),
        v6: Some(("fd4e:58::/64".parse().unwrap(), "fd4e:58::1".parse().unwrap())),
        log_group: 7,
        connections_max: 100,
        forwarding: Forwarding::default(),
        drops_to_vms,
    }
}

fn wired(number: u8) -> Wired {
    let vm = Vm {
        id: VmId::from_i64(number.into()).unwrap(),
        name: format!("vm-{number}"),
        owner_uid: 1,
        mac: format!("02:4e:00:00:00:{number:02x}").parse().unwrap(),
        ipv4: Ipv4Addr::new(10, 77, 0, number),
        ipv6: Some(format!("fd4e:58::{number:x}").parse().unwrap()),
        policy: NetworkPolicy::default(),
        groups: vec!["team".to_owned()],
    };
    Wired::new(vm, format!("nx{number}"), u32::from(number) + 10, &Surroundings::default())
}

fn elements<'a>(contents: &'a Contents, family: Family, set: &'static str) -> &'a BTreeSet<Element> {
    &contents[&(family, set)]
}

fn number_at(element: &Element, at: usize) -> u32 {
    u32::from_ne_bytes(element.key[at..at + 4].try_into().unwrap())
}

/// The position of the first rule that ends like this.
fn position(chain: &Chain, verdict: &Verdict) -> usize {
    let is_it = |rule: &Vec<Expr>| matches!(rule.last(), Some(Expr::Verdict(last)) if last == verdict);
    chain.rules.iter().position(is_it).unwrap_or_else(|| panic!("{verdict:?} in {}", chain.name))
}

#[test]
fn packets_of_open_connections_are_decided_first_and_cut_ones_never_match() {
    let [_, inet] = tables(&frame(false));
    for (name, accepting) in [("from_vm", 1), ("to_host", 1), ("to_vm", 2)] {
        let chain = inet.chains.iter().find(|chain| chain.name == name).unwrap();
        assert_eq!(position(chain, &Verdict::Accept), 0, "{name}");
        assert_eq!(position(chain, &Verdict::Goto("cut")), accepting, "{name}");
    }
    // These rules look the connection's mark up: one that is cut has a bit that no element has.
    let vms = [wired(2), wired(3)];
    let contents = contents(vms.iter(), &BTreeSet::new(), false);
    for (set, marks) in [("flows", &[0, 4][..]), ("mine4", &[0]), ("mine6", &[0])] {
        let elements = elements(&contents, Family::Inet, set);
        assert!(elements.len() >= 2, "{set}");
        for element in elements {
            for at in marks {
                assert_eq!(number_at(element, *at) & MARK_CUT, 0, "{set}: {element:?}");
            }
        }
    }
}

#[test]
fn addresses_are_those_of_taps_alone() {
    let vms = [wired(2), wired(3)];
    let contents = contents(vms.iter(), &BTreeSet::new(), false);
    let of = |set| elements(&contents, Family::Bridge, set);
    let taps: BTreeSet<u32> = of("taps").iter().map(|element| number_at(element, 0)).collect();
    assert_eq!(taps, BTreeSet::from([12, 13]));
    for set in ["own4", "own6"] {
        assert!(of(set).iter().all(|element| taps.contains(&number_at(element, 0))), "{set}");
    }
}

#[test]
fn packets_to_vms_pass_no_rule_of_the_bridge_where_the_kernel_holds_them_back() {
    let has_chain = |drops_to_vms| {
        let [bridge, _] = tables(&frame(drops_to_vms));
        bridge.chains.iter().any(|chain| chain.name == "postrouting")
    };
    assert!(has_chain(true) && !has_chain(false));
}
