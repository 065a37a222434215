//! Plans the changes of interfaces, addresses, routes and neighbours. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use nexus_net_wire::{InstanceId, Mac};

use super::shape::Shape;
use super::{Found, group};

/// A VM's part of the desired state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    /// Index of the TAP.
    pub(crate) index: u32,
    pub(crate) mac: Mac,
    pub(crate) addresses: Vec<IpAddr>,
    /// An address that gets a neighbour entry, but no route.
    pub(crate) link_local: Option<IpAddr>,
    /// The limit of the traffic to the VM.
    pub(crate) shape: Option<Shape>,
}

/// The desired state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) id: InstanceId,
    /// The bridge's alias.
    pub(crate) alias: String,
    /// The gateway's addresses.
    pub(crate) gateways: Vec<IpAddr>,
    pub(crate) ports: Vec<Port>,
    /// Whether there are TAPs whose VMs are not known yet. Then nothing is removed that could belong to them.
    pub(crate) has_unknown: bool,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Creates the bridge; it is down.
    MakeBridge,
    /// Sets the bridge's alias and group.
    NameBridge(String),
    AddAddress(IpAddr),
    RemoveAddress(IpAddr, u8),
    RaiseBridge,
    AddRoute(IpAddr),
    RemoveRoute(IpAddr),
    SetNeighbour(IpAddr, Mac),
    RemoveNeighbour(IpAddr),
    /// Makes a TAP an isolated port that only gets frames for this address. It is set down before, so that it is never up as a port without
    /// isolation.
    Join(u32, Mac),
    Raise(u32),
    /// Limits what goes out of a TAP, or ends that.
    Shape(u32, Option<Shape>),
}

/// Returns the changes from the current to the desired state, in the order in which they must be made.
pub(crate) fn changes(desired: &Desired, found: &Found) -> Vec<Change> {
    let mut changes = Vec::new();
    let bridge = found.bridge(desired.id);
    let index = bridge.map(|bridge| bridge.index);
    match bridge {
        None => changes.extend([Change::MakeBridge, Change::NameBridge(desired.alias.clone())]),
        Some(bridge) if bridge.alias != desired.alias || bridge.group != group(desired.id) => {
            changes.push(Change::NameBridge(desired.alias.clone()));
        }
        Some(_) => {}
    }
    let whole = |address: &IpAddr| if address.is_ipv4() { 32 } else { 128 };
    let addresses: BTreeSet<(IpAddr, u8)> =
        of_bridge(index, &found.addresses, |(of, address, prefix)| (*of, (*address, *prefix)));
    let gateways: BTreeSet<(IpAddr, u8)> =
        desired.gateways.iter().map(|address| (*address, whole(address))).collect();
    // Old addresses are removed before new ones are added, since they could conflict.
    changes.extend(
        addresses.difference(&gateways).map(|(address, prefix)| Change::RemoveAddress(*address, *prefix)),
    );
    changes.extend(gateways.difference(&addresses).map(|(address, _)| Change::AddAddress(*address)));
    if bridge.is_none_or(|bridge| !bridge.is_up) {
        changes.push(Change::RaiseBridge);
    }
    let routes = of_bridge(index, &found.routes, |(of, address)| (*of, *address));
    let wanted: BTreeSet<IpAddr> = desired.ports.iter().flat_map(|port| port.addresses.clone()).collect();
    let neighbours = of_bridge(index, &found.neighbours, |(of, address, mac)| (*of, (*address, *mac)));
    let known: BTreeSet<(IpAddr, Mac)> = desired
        .ports
        .iter()
        .flat_map(|port| port.addresses.iter().chain(&port.link_local).map(|address| (*address, port.mac)))
        .collect();
    if !desired.has_unknown {
        changes.extend(routes.difference(&wanted).copied().map(Change::RemoveRoute));
        let is_known = |address: &IpAddr| known.iter().any(|(of, _)| of == address);
        let surplus = neighbours.iter().filter(|(address, _)| !is_known(address));
        changes.extend(surplus.map(|(address, _)| Change::RemoveNeighbour(*address)));
    }
    let missing = known.difference(&neighbours);
    changes.extend(missing.map(|(address, mac)| Change::SetNeighbour(*address, *mac)));
    changes.extend(wanted.difference(&routes).copied().map(Change::AddRoute));
    for port in &desired.ports {
        if found.shapes.get(&port.index).copied() != port.shape {
            changes.push(Change::Shape(port.index, port.shape));
        }
        let link = found.links.iter().find(|link| link.index == port.index);
        let is_joined = |link: &&super::Link| link.bridge == index && index.is_some() && link.is_isolated;
        if link.filter(is_joined).is_none() {
            changes.extend([Change::Join(port.index, port.mac), Change::Raise(port.index)]);
        } else if link.is_some_and(|link| !link.is_up) {
            changes.push(Change::Raise(port.index));
        }
    }
    changes
}

/// Returns the items of the bridge.
fn of_bridge<T, U: Ord>(bridge: Option<u32>, all: &[T], split: impl Fn(&T) -> (u32, U)) -> BTreeSet<U> {
    let split = all.iter().map(split);
    split.filter(|(of, _)| Some(*of) == bridge).map(|(_, rest)| rest).collect()
}

#[cfg(test)]
mod tests;
