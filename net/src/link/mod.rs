//! Interfaces, addresses, routes and neighbours: one bridge per instance, a TAP per VM on an isolated port of it.
//!
//! Guests have a /32 (or /128) and the gateway as their only neighbour, and ports do not pass frames to each other: so all that VMs say to
//! each other is routed, and passes the firewall. [`plan`] compares what should be with what [`kernel`] reads, and [`kernel`] does it.
//! A TAP is told by its alias, `nexus:INSTANCE:VM`, so that the next process knows whose it is.

pub(crate) mod kernel;
pub(crate) mod plan;
pub(crate) mod sysctl;
pub(crate) mod tap;

use std::net::IpAddr;

use nexus_net_wire::{InstanceId, Mac};
use nexus_schema::id::VmId;

/// An interface, as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: String,
    pub(crate) group: u32,
    /// The bridge that it is a port of.
    pub(crate) bridge: Option<u32>,
    /// Whether it passes frames to the bridge itself only.
    pub(crate) is_isolated: bool,
    pub(crate) is_up: bool,
    /// Whether a TAP is open.
    pub(crate) has_carrier: bool,
    pub(crate) is_bridge: bool,
    /// The user who may open a TAP.
    pub(crate) owner: Option<u32>,
    /// Bytes that the host received from it and sent to it.
    pub(crate) received: u64,
    pub(crate) sent: u64,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) links: Vec<Link>,
    /// Addresses with the length of their prefix, by interface.
    pub(crate) addresses: Vec<(u32, IpAddr, u8)>,
    /// Routes to single addresses, by the interface that they lead to.
    pub(crate) routes: Vec<(u32, IpAddr)>,
    /// Neighbours that are set for good.
    pub(crate) neighbours: Vec<(u32, IpAddr, Mac)>,
}

impl Found {
    /// The bridge of an instance, if it is there.
    pub(crate) fn bridge(&self, id: InstanceId) -> Option<&Link> {
        let name = bridge_name(id);
        self.links.iter().find(|link| link.name == name)
    }

    /// The TAPs of an instance and the VM of each; the first one of a VM counts.
    pub(crate) fn taps(&self, id: InstanceId) -> impl Iterator<Item = (VmId, &Link)> {
        self.links.iter().filter_map(move |link| Some((vm_of(id, &link.alias)?, link)))
    }
}

/// The name of an instance's bridge.
pub(crate) fn bridge_name(id: InstanceId) -> String {
    format!("nxb{id}")
}

/// The bridge's MAC address, which does not change with the ports that come and go.
pub(crate) fn bridge_mac(id: InstanceId) -> Mac {
    let [a, b, c, d] = id.number().to_be_bytes();
    Mac([0x02, 0x4e, a, b, c, d])
}

/// The group that all interfaces of an instance are in: they can be removed at once.
pub(crate) const fn group(id: InstanceId) -> u32 {
    id.number()
}

/// The alias of the bridge.
pub(crate) fn bridge_alias(id: InstanceId) -> String {
    format!("nexus:{id}")
}

/// The alias of a VM's TAP.
pub(crate) fn tap_alias(id: InstanceId, vm: VmId) -> String {
    format!("nexus:{id}:{vm}")
}

/// The VM that an alias names.
fn vm_of(id: InstanceId, alias: &str) -> Option<VmId> {
    alias.strip_prefix(&bridge_alias(id))?.strip_prefix(':')?.parse().ok()
}
