use std::collections::BTreeMap;

use nexus_schema::ByteSize;

use super::*;
use crate::link::{Link, Passed, bridge_name};

const ID: u32 = 0x0a1b_2c3d;

fn desired(has_unknown: bool) -> Desired {
    Desired {
        id: InstanceId::new(ID).unwrap(),
        alias: "nexus:0a1b2c3d".to_owned(),
        gateways: vec!["10.77.0.1".parse().unwrap()],
        ports: vec![Port {
            index: 7,
            mac: Mac([2, 0, 0, 0, 0, 2]),
            addresses: vec!["10.77.0.2".parse().unwrap()],
            link_local: Some("fe80::2".parse().unwrap()),
            shape: None,
        }],
        has_unknown,
    }
}

fn link(index: u32, name: &str) -> Link {
    let is_bridge = name.starts_with("nxb");
    Link {
        index,
        name: name.to_owned(),
        alias: if is_bridge { "nexus:0a1b2c3d".to_owned() } else { "nexus:0a1b2c3d:x".to_owned() },
        group: ID,
        bridge: (!is_bridge).then_some(3),
        is_isolated: !is_bridge,
        is_up: true,
        has_carrier: false,
        is_bridge,
        owner: None,
        received: Passed::default(),
        sent: Passed::default(),
        is_card: false,
        is_of_others: false,
    }
}

fn whole() -> Found {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let mac = Mac([2, 0, 0, 0, 0, 2]);
    Found {
        links: vec![link(1, "lo"), link(3, &bridge_name(InstanceId::new(ID).unwrap())), link(7, "nx0")],
        addresses: vec![(1, address("127.0.0.1"), 8), (3, address("10.77.0.1"), 32)],
        outside: Vec::new(),
        routes: vec![(3, address("10.77.0.2")), (2, address("192.0.2.1"))],
        neighbours: vec![(3, address("10.77.0.2"), mac), (3, address("fe80::2"), mac)],
        uplinks: BTreeSet::new(),
        shapes: BTreeMap::new(),
    }
}

#[test]
fn what_is_as_it_should_be_is_left_alone() {
    assert_eq!(changes(&desired(false), &whole()), []);
}

#[test]
fn a_port_joins_isolated_before_it_is_up_and_after_its_neighbours_are_known() {
    let mut found = whole();
    found.links.truncate(1);
    let all = changes(&desired(false), &Found { links: found.links, ..Found::default() });
    assert_eq!(all[..2], [Change::MakeBridge, Change::NameBridge("nexus:0a1b2c3d".to_owned())]);
    let mut found_otherwise = whole();
    found_otherwise.links[1].alias = "nexus:0a1b2c3d:fwd4".to_owned();
    let named = [Change::NameBridge("nexus:0a1b2c3d".to_owned())];
    assert_eq!(changes(&desired(false), &found_otherwise), named);
    assert_eq!(all[all.len() - 2..], [Change::Join(7, Mac([2, 0, 0, 0, 0, 2])), Change::Raise(7)]);
    let mut found = whole();
    found.links[2].is_isolated = false;
    assert_eq!(
        changes(&desired(false), &found),
        [Change::Join(7, Mac([2, 0, 0, 0, 0, 2])), Change::Raise(7)]
    );
    let mut found = whole();
    found.links[2].is_up = false;
    assert_eq!(changes(&desired(false), &found), [Change::Raise(7)]);
}

#[test]
fn what_is_nobodys_goes_unless_there_are_vms_that_are_not_known_yet() {
    let mut found = whole();
    let stale: IpAddr = "10.77.0.9".parse().unwrap();
    found.routes.push((3, stale));
    found.neighbours.push((3, stale, Mac([2, 0, 0, 0, 0, 9])));
    found.addresses.push((3, "10.66.0.1".parse().unwrap(), 24));
    let others = Change::RemoveAddress("10.66.0.1".parse().unwrap(), 24);
    assert_eq!(
        changes(&desired(false), &found),
        [others.clone(), Change::RemoveRoute(stale), Change::RemoveNeighbour(stale)]
    );
    assert_eq!(changes(&desired(true), &found), [others]);
}

#[test]
fn limits_of_known_ports_are_as_they_should_be() {
    let [slow, fast] = [1, 2].map(|rate| Shape::of(ByteSize::mib(rate)));
    let mut wanted = desired(false);
    wanted.ports[0].shape = Some(slow);
    let mut found = whole();
    assert_eq!(changes(&wanted, &found), [Change::Shape(7, Some(slow))]);
    // Of an interface that is nobody's here.
    found.shapes.insert(1, fast);
    found.shapes.insert(7, slow);
    assert_eq!(changes(&wanted, &found), []);
    found.shapes.insert(7, fast);
    assert_eq!(changes(&wanted, &found), [Change::Shape(7, Some(slow))]);
    assert_eq!(changes(&desired(false), &found), [Change::Shape(7, None)]);
}
