//! State that all parts of the process share: the current VMs, the pins, and the refusals.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use nexus_net_policy::Surroundings;
use nexus_net_wire::{Cidr, Instance, InstanceId};
use nexus_schema::id::VmId;
use nexus_schema::network::RuleProtocol;

use crate::conntrack::Flow;
use crate::denials::Denials;
use crate::nft::elements::Wired;
use crate::pins::Pins;

/// The instance and its VMs. Replaced as a whole at each change.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) instance: Option<Instance>,
    pub(crate) vms: BTreeMap<VmId, Wired>,
    pub(crate) around: Surroundings,
}

impl View {
    /// Returns the VM with an address.
    pub(crate) fn by_address(&self, address: IpAddr) -> Option<&Wired> {
        self.vms.values().find(|wired| wired.addresses().any(|own| own == address))
    }

    /// Returns the VM whose TAP has this index.
    pub(crate) fn by_index(&self, index: u32) -> Option<&Wired> {
        self.vms.values().find(|wired| wired.index == index)
    }

    /// Returns the host's addresses on the bridge.
    pub(crate) fn gateways(&self) -> Vec<IpAddr> {
        self.instance.iter().flat_map(gateways).collect()
    }

    /// Returns whether a VM may have a connection, by the same criteria as the firewall's rules.
    pub(crate) fn allows(&self, wired: &Wired, pins: &Pins, flow: Flow) -> bool {
        let Flow { protocol, address, port } = flow;
        if self.gateways().contains(&address) {
            // The rules let VMs open only allowed connections to the gateway.
            return true;
        }
        if let Some(other) = self.by_address(address) {
            return wired.may_talk_to(other);
        }
        let named = RuleProtocol::of_number(protocol);
        let policy = &wired.vm.policy;
        if named.is_none() && policy.names_protocols() {
            return false;
        }
        let has = |cell: &nexus_net_policy::Cell| {
            let (first, last) = cell.addresses;
            cell.protocols.only().is_none_or(|only| Some(only) == named)
                && first.is_ipv4() == address.is_ipv4()
                && (first..=last).contains(&address)
                && (cell.ports.0..=cell.ports.1).contains(&port)
        };
        let is_quic = protocol == 17 && port == 443;
        wired.cells.iter().any(has)
            || (!is_quic && pins.is_allowed(wired.vm.id, &policy.over(named), &self.around, (address, port)))
    }
}

/// Returns the addresses of an instance's gateway.
pub(crate) fn gateways(instance: &Instance) -> impl Iterator<Item = IpAddr> {
    let v6 = instance.v6.map(|subnet| IpAddr::V6(subnet.gateway));
    [Some(IpAddr::V4(instance.v4.gateway)), v6].into_iter().flatten()
}

/// Returns the networks of an instance.
pub(crate) fn subnets(instance: &Instance) -> impl Iterator<Item = Cidr> {
    [Some(instance.v4.subnet), instance.v6.map(|subnet| subnet.subnet)].into_iter().flatten()
}

/// Returns the name of an instance's tables.
pub(crate) fn table_name(id: InstanceId) -> String {
    format!("nexus_{id}")
}

/// The shared state. Code that changes pins holds their lock until the kernel has them, so that no policy changes in between.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    view: RwLock<Arc<View>>,
    pins: Mutex<Pins>,
    pub(crate) denials: Denials,
}

impl Shared {
    /// Returns the current network.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the current network.
    pub(crate) fn set_view(&self, view: View) {
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
    }

    /// Locks and returns the pins.
    pub(crate) fn pins(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
