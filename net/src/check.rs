//! Checks requests. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nexus_net_wire::{Cidr, Instance, Vm};
use nexus_schema::id::VmId;
use nexus_schema::network::RULES_MAX;

use crate::error::Error;
use crate::link::Found;
use crate::nft::elements::Wired;
use crate::view::{gateways, subnets};

/// Maximum number of groups of a VM.
const GROUPS_MAX: usize = 64;

fn invalid(what: impl Into<String>) -> Error {
    Error::Invalid { what: what.into() }
}

/// Checks that the instance's addresses are consistent.
pub(crate) fn instance(instance: &Instance) -> Result<(), Error> {
    let v4 = (instance.v4.subnet, IpAddr::V4(instance.v4.gateway));
    let v6 = instance.v6.map(|subnet| (subnet.subnet, IpAddr::V6(subnet.gateway)));
    for (net, gateway) in [Some(v4), v6].into_iter().flatten() {
        if !net.contains(gateway) || net.address() == gateway {
            return Err(invalid(format!("the gateway {gateway} is not a host address in {net}")));
        }
    }
    if let Some((net, _)) = v6
        && !matches!(net.address(), IpAddr::V6(v6) if v6.is_unique_local())
    {
        return Err(invalid(format!("{net} is not a unique local network: it must be in fd00::/8")));
    }
    Ok(())
}

/// Checks that no other interface of this host has an address in the instance's networks.
pub(crate) fn is_free(instance: &Instance, found: &Found) -> Result<(), Error> {
    let bridge = found.bridge(instance.id).map(|bridge| bridge.index);
    for net in subnets(instance) {
        let taken =
            found.addresses.iter().find(|(of, address, _)| Some(*of) != bridge && net.contains(*address));
        if let Some((of, address, _)) = taken {
            let link = found.links.iter().find(|link| link.index == *of);
            let name = link.map(|link| link.name.as_str()).unwrap_or("another interface");
            return Err(Error::InUse {
                what: format!("{name} has {address}, which is in {net}: choose another subnet"),
            });
        }
    }
    Ok(())
}

/// Checks that a VM's addresses are in the instance's networks and not used by another VM.
pub(crate) fn vm(instance: &Instance, vm: &Vm, others: &BTreeMap<VmId, Wired>) -> Result<(), Error> {
    let is_in = |net: Cidr, address: IpAddr| net.contains(address) && net.address() != address;
    if !is_in(instance.v4.subnet, vm.ipv4.into()) {
        return Err(invalid(format!("{} is not an address in {}", vm.ipv4, instance.v4.subnet)));
    }
    match (instance.v6, vm.ipv6) {
        (Some(subnet), Some(v6)) if is_in(subnet.subnet, v6.into()) => {}
        (None, Some(v6)) => return Err(invalid(format!("{v6}: the instance has no IPv6"))),
        (Some(subnet), Some(v6)) => {
            return Err(invalid(format!("{v6} is not an address in {}", subnet.subnet)));
        }
        (_, None) => {}
    }
    if vm.mac.0[0] & 1 != 0 || vm.mac.0 == [0; 6] {
        return Err(invalid(format!("{} is not a unicast MAC address", vm.mac)));
    }
    let policy = &vm.policy;
    if policy.allow.len() > RULES_MAX || policy.deny.len() > RULES_MAX || vm.groups.len() > GROUPS_MAX {
        return Err(invalid(format!(
            "at most {RULES_MAX} entries of allow and of deny, and {GROUPS_MAX} groups"
        )));
    }
    let mine = [Some(IpAddr::V4(vm.ipv4)), vm.ipv6.map(IpAddr::V6)];
    for address in mine.into_iter().flatten() {
        if gateways(instance).any(|gateway| gateway == address) {
            return Err(Error::InUse { what: format!("{address} is the gateway's address") });
        }
        if let Some(other) = taken(vm.id, others, |wired| wired.addresses().any(|own| own == address)) {
            return Err(Error::InUse { what: format!("{address} is used by VM {other}") });
        }
    }
    match taken(vm.id, others, |wired| wired.vm.mac == vm.mac) {
        Some(other) => Err(Error::InUse { what: format!("{} is used by VM {other}", vm.mac) }),
        None => Ok(()),
    }
}

fn taken(vm: VmId, others: &BTreeMap<VmId, Wired>, has: impl Fn(&Wired) -> bool) -> Option<VmId> {
    others.values().find(|wired| wired.vm.id != vm && has(wired)).map(|wired| wired.vm.id)
}
