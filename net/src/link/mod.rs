//! Interfaces, addresses, routes and neighbours: one bridge per instance, a TAP per VM on an isolated port of it.
//!
//! Guests have a /32 (or /128) and the gateway as their only neighbour, and ports do not pass frames to each other: so all traffic between VMs
//! is routed, and passes the firewall. [`plan`] compares the desired state with the one that [`kernel`] reads, and [`kernel`] changes it.
//! The alias of a TAP, `nexus:INSTANCE:VM`, tells the next process to which VM it belongs.

pub(crate) mod kernel;
pub(crate) mod plan;
pub(crate) mod shape;
pub(crate) mod sysctl;
pub(crate) mod tap;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nexus_net_wire::{InstanceId, Mac};
use nexus_schema::id::VmId;

use crate::nft::BRIDGE_PREFIX;

/// An interface of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: String,
    pub(crate) group: u32,
    /// The bridge that it is a port of.
    pub(crate) bridge: Option<u32>,
    /// Whether the port passes frames only to the bridge itself.
    pub(crate) is_isolated: bool,
    pub(crate) is_up: bool,
    /// Whether it has a carrier: for a TAP, whether a program has it open.
    pub(crate) has_carrier: bool,
    pub(crate) is_bridge: bool,
    /// The user who may open a TAP.
    pub(crate) owner: Option<u32>,
    /// Traffic that the host received from it and sent to it.
    pub(crate) received: Passed,
    pub(crate) sent: Passed,
    /// Whether it is a network card or based on one, so that other machines are behind it.
    pub(crate) is_card: bool,
    /// Whether it is a bridge or tunnel: of containers, other VMs, VPNs.
    pub(crate) is_of_others: bool,
}

/// Traffic of an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
}

/// The current state in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) links: Vec<Link>,
    /// Addresses, as interface index, address and prefix length.
    pub(crate) addresses: Vec<(u32, IpAddr, u8)>,
    /// The host's addresses in its own network namespace, if this one is another.
    pub(crate) outside: Vec<IpAddr>,
    /// Routes to single addresses, as interface index and address.
    pub(crate) routes: Vec<(u32, IpAddr)>,
    /// Permanent neighbours.
    pub(crate) neighbours: Vec<(u32, IpAddr, Mac)>,
    /// The interfaces that default routes lead to.
    pub(crate) uplinks: BTreeSet<u32>,
    /// The limits of what goes out of interfaces: to a VM, for a TAP.
    pub(crate) shapes: BTreeMap<u32, shape::Shape>,
}

impl Found {
    /// Returns the bridge of an instance, if it exists.
    pub(crate) fn bridge(&self, id: InstanceId) -> Option<&Link> {
        let name = bridge_name(id);
        self.links.iter().find(|link| link.name == name)
    }

    /// Returns the bridges of all instances.
    pub(crate) fn bridges(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| link.is_bridge && link.alias.starts_with(ALIAS))
    }

    /// Returns the interfaces to other machines: network cards, and those of default routes.
    pub(crate) fn outer(&self) -> BTreeSet<u32> {
        let cards = self.links.iter().filter(|link| link.is_card).map(|link| link.index);
        cards.chain(self.uplinks.iter().copied()).collect()
    }

    /// Returns the TAPs of an instance and the VM of each. If a VM has several, the first one counts.
    pub(crate) fn taps(&self, id: InstanceId) -> impl Iterator<Item = (VmId, &Link)> {
        self.links.iter().filter_map(move |link| Some((vm_of(id, &link.alias)?, link)))
    }
}

/// Returns the name of an instance's bridge.
pub(crate) fn bridge_name(id: InstanceId) -> String {
    format!("{BRIDGE_PREFIX}{id}")
}

/// Returns the bridge's MAC address. It is fixed: otherwise it would change with the ports.
pub(crate) fn bridge_mac(id: InstanceId) -> Mac {
    let [a, b, c, d] = id.number().to_be_bytes();
    Mac([0x02, 0x4e, a, b, c, d])
}

/// Returns the group of all interfaces of an instance, by which they can be removed at once.
pub(crate) const fn group(id: InstanceId) -> u32 {
    id.number()
}

/// Prefix of the aliases of all instances' interfaces.
const ALIAS: &str = "nexus:";

/// Returns the alias of the bridge. [`crate::forwarding::Forwarding`] may append to it.
pub(crate) fn bridge_alias(id: InstanceId) -> String {
    format!("{ALIAS}{id}")
}

/// Returns the alias of a VM's TAP.
pub(crate) fn tap_alias(id: InstanceId, vm: VmId) -> String {
    format!("{ALIAS}{id}:{vm}")
}

/// Returns the VM that an alias names.
fn vm_of(id: InstanceId, alias: &str) -> Option<VmId> {
    alias.strip_prefix(&bridge_alias(id))?.strip_prefix(':')?.parse().ok()
}
