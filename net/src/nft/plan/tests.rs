use std::net::Ipv4Addr;

use super::*;
use crate::forwarding::Forwarding;
use crate::nft::rules::{Frame, tables};
use crate::nft::sets::PIN4;

fn frame(group: u16) -> Frame {
    Frame {
        table: "nexus_0a1b2c3d".to_owned(),
        bridge: "nxb0a1b2c3d".to_owned(),
        v4: ("10.77.0.0/16".parse().unwrap(), Ipv4Addr::new(10, 77, 0, 1)),
        v6: Some(("fd4e:58::/64".parse().unwrap(), "fd4e:58::1".parse().unwrap())),
        log_group: group,
        connections_max: 100,
        forwarding: Forwarding::default(),
        drops_to_vms: false,
    }
}

fn element(index: u32, rest: u8) -> Element {
    Element { key: [&index.to_ne_bytes()[..], &[rest; 8]].concat(), end: Some(vec![rest; 12]), rate: None }
}

fn contents(elements: &[Element]) -> Contents {
    Contents::from([((Family::Inet, "allow4"), elements.iter().cloned().collect())])
}

/// The state of a kernel with exactly these tables.
fn built(tables: &[Table], contents: &Contents) -> BTreeMap<Family, Found> {
    let found = |element: &Element| FoundElement {
        element: element.clone(),
        expires: None,
        comment: None,
        packets: 0,
    };
    let one = |table: &Table| {
        let rules = |chain: &super::super::Chain| {
            chain.rules.iter().enumerate().map(|(at, rule)| tag(chain.name, at, rule)).collect()
        };
        let of_set =
            |set: &Set| contents.get(&(table.family, set.name)).into_iter().flatten().map(found).collect();
        let built = Found {
            chains: table.chains.iter().map(|chain| (chain.name.to_owned(), rules(chain))).collect(),
            sets: table.sets.iter().map(|set| (set.name.to_owned(), of_set(set))).collect(),
        };
        (table.family, built)
    };
    tables.iter().map(one).collect()
}

#[test]
fn what_is_as_it_should_be_is_left_alone() {
    let (tables, none) = (tables(&frame(7)), BTreeSet::new());
    let wanted = contents(&[element(3, 1), element(4, 2)]);
    let found = built(&tables, &wanted);
    let desired = Desired { tables: &tables, contents: wanted, pins: Vec::new(), kept: &none };
    assert_eq!(changes(&desired, &found), []);
    assert_eq!(changes(&desired, &BTreeMap::new()).len(), 2, "without tables, both are created");
}

#[test]
fn only_what_differs_changes_and_what_is_not_known_yet_stays() {
    let (tables, kept) = (tables(&frame(7)), BTreeSet::from([5]));
    let found = built(&tables, &contents(&[element(3, 1), element(4, 2), element(5, 3)]));
    let desired = Desired {
        tables: &tables,
        contents: contents(&[element(3, 1), element(4, 9)]),
        pins: Vec::new(),
        kept: &kept,
    };
    let changes = changes(&desired, &found);
    let [Change::Remove { elements: gone, .. }, Change::Add { elements: come, .. }] = &changes[..] else {
        panic!("{changes:?}")
    };
    assert_eq!(gone, &[element(4, 2)], "old elements are removed first");
    assert_eq!(come, &[Added::from(element(4, 9))]);
    assert_eq!(count(&changes), 2);
}

#[test]
fn a_table_that_others_changed_is_made_anew_with_what_is_kept_and_pinned() {
    let (tables, kept) = (tables(&frame(7)), BTreeSet::from([5]));
    let mut found = built(&tables, &contents(&[element(4, 2), element(5, 3), element(6, 4)]));
    let pin = Added { element: element(3, 7), timeout: Some(Duration::from_secs(9)), comment: None };
    let desired = Desired {
        tables: &tables,
        contents: contents(&[element(3, 1)]),
        pins: vec![(PIN4.clone(), vec![pin.clone()])],
        kept: &kept,
    };
    for damage in 0..4 {
        let mut damaged = found.clone();
        let inet = damaged.get_mut(&Family::Inet).unwrap();
        match damage {
            0 => drop(inet.chains.get_mut("decide").unwrap().pop()),
            1 => inet.chains.get_mut("forward").unwrap().insert(0, String::new()),
            2 => drop(inet.chains.remove("cut")),
            _ => drop(inet.sets.remove("peer4")),
        }
        let changes = changes(&desired, &damaged);
        let [Change::Replace { table, contents }] = &changes[..] else { panic!("{damage}: {changes:?}") };
        assert_eq!(table.family, Family::Inet);
        let of = |name: &str| {
            let found = contents.iter().find(|(set, _)| set.name == name);
            found.map(|(_, elements)| elements.clone()).unwrap_or_default()
        };
        assert_eq!(of("allow4"), [Added::from(element(3, 1)), Added::from(element(5, 3))]);
        assert_eq!(of("pin4").first(), Some(&pin));
    }
    // Rules of another version, or with another log group, differ.
    let others = super::super::rules::tables(&frame(8));
    found = built(&others, &Contents::new());
    assert_eq!(changes(&desired, &found).len(), 2);
}
