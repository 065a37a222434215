//! Network mode `nat` of a VM: addresses are leased, the interface is connected before the VMM starts and disconnected after the VMM has
//! ended, and the guest is notified of refused connections.
//!
//! ```text
//! lease (row) ─> attach: nexus-net makes the TAP ─> connected (row) ─> VMM ─> its end ─> detach ─> disconnected (row)
//! ```
//! The row says which boot has an interface. So a daemon that was killed at any point knows at its next start what to keep: it attaches
//! the interfaces of running VMs again, and removes all others.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_net_policy::has_name_list;
use nexus_net_wire::{CONNECTIONS_MAX, Cidr, InstanceId, Mac, State};
use nexus_schema::id::{BootId, VmId};
use nexus_schema::link::{Interface, InterfaceAddress, REFUSED_REQUEST, Refusal, RefusedParams};
use nexus_schema::network::{NetworkMode, NetworkPolicy};
use nexus_schema::tools::vm::{NetworkInterface, VmNetwork, VmState};
use nexus_schema::{ErrorCode, Reference, ToolError};
use tokio::sync::mpsc;

use super::defaults::{self, SharedNetwork};
use crate::context::{Shared, network_error};
use crate::net::{self, Addresses, Denial, Dns, Event, Instance, NatError, Protocol, Vm};
use crate::op::store_error;
use crate::os::failpoint;
use crate::os::site::Site;
use crate::store::leases::{self, Lease};
use crate::store::vms::VmRecord;
use crate::store::{StoreError, settings};
use crate::vmm::PlanInterface;
use crate::vmm::doctor::Choice;

/// Domain of VMs' names, and the first search domain of guests.
const DOMAIN: &str = "nexus.internal";
/// Port of name servers.
const DNS_PORT: u16 = 53;
/// Most events of `nexus-net` handled at once, and so most refusals in one message to a guest.
const BATCH_MAX: usize = 64;
/// Timeout of the notification of a guest about refusals.
const HEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// A VM's addresses.
#[derive(Debug, Clone)]
pub(crate) struct Leased {
    pub(crate) lease: Lease,
    pub(crate) addresses: Addresses,
}

impl Leased {
    /// Returns the interface's configuration for the guest.
    pub(crate) fn of_guest(&self) -> Interface {
        let (gateway, gateway6) = self.addresses.gateways();
        let number = self.lease.number;
        // Each VM is alone in its network: packets from one VM to another pass through the gateway, which enforces the policy.
        let v4 = (format!("{}/32", self.addresses.ipv4(number)), gateway.into());
        let v6 = (format!("{}/128", self.addresses.ipv6(number)), gateway6.into());
        let addresses =
            [v4, v6].map(|(address, gateway)| InterfaceAddress { address, gateway: Some(gateway) });
        Interface { mac: self.lease.mac.clone(), addresses: addresses.into(), mtu: None }
    }

    /// Returns the guest's name server.
    pub(crate) fn resolver(&self) -> Ipv4Addr {
        self.addresses.gateways().0
    }

    fn shown(&self, boot: Option<BootId>) -> NetworkInterface {
        let number = self.lease.number;
        NetworkInterface {
            mac: self.lease.mac.clone(),
            ipv4: self.addresses.ipv4(number),
            ipv6: self.addresses.ipv6(number),
            gateway: self.addresses.gateways().0,
            tap: self.lease.tap.clone().filter(|_| boot.is_some() && self.lease.boot == boot),
        }
    }
}

/// Fails if the driver or the host does not support mode `nat`.
pub(crate) fn check(host: &crate::vmm::doctor::Host, choice: &Choice) -> Result<(), ToolError> {
    let unsuitable = |what: &str, hint: &str| {
        let what = format!("the driver {} {what}", choice.driver);
        Err(ToolError::new(ErrorCode::HostUnsuitable, what).hint(hint))
    };
    if !choice.caps.has_interface {
        return unsuitable("does not support network interfaces", "use network proxy");
    }
    host.check_nat()?;
    if Site::of_this_process() == Site::Own && !choice.caps.takes_open_tap {
        return unsuitable(
            "does not support network nat under a daemon of an ordinary user",
            "use driver qemu, or network proxy",
        );
    }
    Ok(())
}

/// Returns the addresses of the shared network. Without a setting, a subnet is chosen at first use.
pub(crate) async fn addresses(shared: &Shared) -> Result<Addresses, ToolError> {
    let addresses = find_addresses(shared).await?;
    let (v4, v6) = addresses.subnets();
    shared.egresses.share([v4.subnet, v6.subnet]);
    Ok(addresses)
}

async fn find_addresses(shared: &Shared) -> Result<Addresses, ToolError> {
    let instance = shared.instance;
    if let Some(subnet) = defaults::network(&shared.store).await?.subnet {
        return Ok(Addresses::new(subnet, instance));
    }
    let known = shared.store.read(leases::subnet).await.map_err(store_error)?;
    if let Some(subnet) = known.and_then(|text| text.parse().ok()) {
        return Ok(Addresses::new(subnet, instance));
    }
    let routes =
        net::host_routes().map_err(|e| ToolError::internal(format!("read the host's routes: {e}")))?;
    let chosen: Cidr = net::choose(instance, &routes).ok_or_else(|| {
        ToolError::new(ErrorCode::HostUnsuitable, "the host has routes to all default subnets for VMs")
            .hint("set network.subnet to a free subnet, or use network proxy")
    })?;
    let text = chosen.to_string();
    tracing::info!(subnet = text, "chose a subnet for VMs");
    shared.store.write(move |tx| leases::set_subnet(tx, &text)).await.map_err(store_error)?;
    Ok(Addresses::new(chosen, instance))
}

/// Returns the addresses of a VM; leases some if it has none.
pub(crate) async fn lease(shared: &Shared, vm: VmId) -> Result<Leased, ToolError> {
    let addresses = addresses(shared).await?;
    let last = addresses.last();
    let lease = shared.store.write(move |tx| leases::take(tx, vm, last)).await.map_err(store_error)?;
    Ok(Leased { lease, addresses })
}

/// Returns the addresses of a VM, if it has any.
pub(crate) async fn leased(shared: &Shared, vm: VmId) -> Result<Option<Leased>, ToolError> {
    let found = shared.store.read(move |db| leases::of_vm(db, vm)).await.map_err(store_error)?;
    match found {
        Some(lease) => Ok(Some(Leased { lease, addresses: addresses(shared).await? })),
        None => Ok(None),
    }
}

/// Returns the search domains of a guest with this lease: that of VMs, then those of the setting; without one those of the host, if its name
/// servers are asked and no list of names decides: each refused name would be refused in each domain as well. A guest without a lease gets none.
pub(crate) async fn search(
    shared: &Shared,
    record: &VmRecord,
    leased: Option<&Leased>,
) -> Result<Vec<String>, ToolError> {
    if leased.is_none() {
        return Ok(Vec::new());
    }
    let SharedNetwork { dns, search, .. } = defaults::network(&shared.store).await?;
    let more = match search.is_empty() && dns.is_empty() && !has_name_list(&record.spec.network) {
        true => net::host_search().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the host's search domains");
            Vec::new()
        }),
        false => search,
    };
    let mut all = vec![DOMAIN.to_owned()];
    for domain in more {
        if !all.contains(&domain) {
            all.push(domain);
        }
    }
    Ok(all)
}

/// Connects the interface of a boot. Returns the name of its TAP device on the host.
pub(crate) async fn connect(
    shared: &Shared,
    record: &VmRecord,
    leased: &Leased,
    boot: BootId,
) -> Result<String, ToolError> {
    let vm = described(shared, record, leased)?;
    let instance = instance(shared, leased.addresses).await?;
    let tap = shared.nat.attach(&instance, vm).await.map_err(network_error)?;
    failpoint::reach("net-attached");
    let (id, name) = (record.id, tap.clone());
    shared.store.write(move |tx| leases::connect(tx, id, boot, &name)).await.map_err(store_error)?;
    Ok(tap)
}

/// Returns the interface of a VM with a TAP for the launch plan.
pub(crate) fn interface(shared: &Shared, record: &VmRecord, leased: &Leased, tap: String) -> PlanInterface {
    let from = shared.nat.hands_over().then(|| shared.paths.network());
    PlanInterface { tap, mac: leased.lease.mac.clone(), from, bandwidth: record.spec.network.bandwidth }
}

/// Disconnects the interface of a VM whose VMM has ended. If this fails, the daemon does it at its next start.
pub(crate) async fn disconnect(shared: &Shared, record: &VmRecord) {
    let (id, name) = (record.id, &record.name);
    if let Err(error) = shared.nat.detach(id).await {
        tracing::warn!(vm = %name, error = %nexus_schema::error::chain(&error), "cannot remove a vm's network device; nexusd retries at its next start");
        return;
    }
    failpoint::reach("net-detached");
    let is_kept = record.spec.network.mode == NetworkMode::Nat;
    let written = shared.store.write(move |tx| match is_kept {
        true => leases::disconnect(tx, id),
        false => leases::release(tx, id),
    });
    if let Err(error) = written.await {
        tracing::warn!(vm = %name, %error, "cannot record that a vm's network device was removed");
    }
}

/// Applies a VM's policy to its interface, if it has addresses. Open connections that the policy does not allow are closed.
pub(crate) async fn update(shared: &Shared, record: &VmRecord) -> Result<(), ToolError> {
    let Some(leased) = leased(shared, record.id).await? else { return Ok(()) };
    shared.nat.update(described(shared, record, &leased)?).await.map_err(network_error)
}

/// Releases the addresses of a VM that does not use them now.
pub(crate) async fn release(shared: &Shared, vm: VmId) -> Result<(), ToolError> {
    shared.store.write(move |tx| leases::release(tx, vm)).await.map_err(store_error)
}

/// Returns whether a VM may have an interface that no row knows: the daemon ended while it started the VM.
pub(crate) fn may_be_connected(record: &VmRecord) -> bool {
    record.state == VmState::Starting && record.spec.network.mode == NetworkMode::Nat
}

/// Removes network devices of VMs that no longer run, after those of running VMs were attached again.
pub(crate) async fn settle(shared: &Shared, was_used: bool) {
    let kept = async {
        let is_there = shared.nat.state().await.map_err(network_error)?.is_some();
        if !is_there && !was_used {
            return Ok(());
        }
        let instance = instance(shared, addresses(shared).await?).await?;
        shared.nat.retain(&instance).await.map_err(network_error)
    };
    if let Err(error) = kept.await {
        tracing::warn!(%error, "cannot remove network devices of VMs that have ended");
    }
}

/// Returns the id of this installation that is part of the names of its network devices and rules on the host.
pub(crate) fn instance_id(shared: &Shared) -> InstanceId {
    let bits = shared.instance.as_i64().cast_unsigned();
    let folded = (bits ^ (bits >> 32)) as u32;
    InstanceId::new(folded.max(1)).expect("it is 1 or more")
}

async fn instance(shared: &Shared, addresses: Addresses) -> Result<Instance, ToolError> {
    let SharedNetwork { dns: servers, opens_firewall, .. } = defaults::network(&shared.store).await?;
    let dns = match servers.is_empty() {
        true => Dns::FromHost,
        false => Dns::Servers(servers.into_iter().map(|server| SocketAddr::new(server, DNS_PORT)).collect()),
    };
    let (v4, v6) = addresses.subnets();
    Ok(Instance {
        id: instance_id(shared),
        v4,
        v6: Some(v6),
        host_addresses: Vec::new(),
        dns,
        opens_firewall,
        connections_max: CONNECTIONS_MAX,
    })
}

/// Applies the settings of the shared network, even if no VM uses it now; returns its state.
pub(crate) async fn apply(shared: &Shared) -> Result<State, ToolError> {
    let instance = instance(shared, addresses(shared).await?).await?;
    shared.nat.apply(&instance).await.map_err(network_error)
}

/// Returns the description of a VM for `nexus-net`.
fn described(shared: &Shared, record: &VmRecord, leased: &Leased) -> Result<Vm, ToolError> {
    let policy = &record.spec.network;
    let number = leased.lease.number;
    let mac: Mac = leased
        .lease
        .mac
        .parse()
        .map_err(|e| ToolError::internal(format!("the MAC of {}: {e}", record.name)))?;
    // In any other mode, the interface that a VM was started with passes nothing.
    let mode = if policy.mode == NetworkMode::Nat { NetworkMode::Nat } else { NetworkMode::None };
    Ok(Vm {
        id: record.id,
        name: record.name.to_string(),
        owner_uid: shared.nat.owner(crate::vmm::uid_of(record.cid, shared.config.jail)),
        mac,
        ipv4: leased.addresses.ipv4(number),
        ipv6: Some(leased.addresses.ipv6(number)),
        // The firewall knows no presets of the daemon's host.
        policy: NetworkPolicy { mode, ..policy.clone() }.effective().into_owned(),
        groups: policy.groups.iter().map(ToString::to_string).collect(),
    })
}

/// Returns the policy as it applies now: a VM that runs without an interface uses the proxy instead of `nat` until its next start.
fn in_force(policy: &NetworkPolicy, lacks_interface: bool) -> NetworkPolicy {
    let mode = match policy.mode {
        NetworkMode::Nat if lacks_interface => NetworkMode::Proxy,
        mode => mode,
    };
    NetworkPolicy { mode, ..policy.clone() }
}

/// Returns the policy of the VM's proxy. Unless mode `proxy` applies now, the proxy refuses everything: the policy of a VM with an interface
/// is enforced at the interface, and the VM must not bypass it over vsock.
pub(crate) fn of_proxy(policy: &NetworkPolicy, lacks_interface: bool) -> NetworkPolicy {
    let now = in_force(policy, lacks_interface);
    let mode = if now.mode == NetworkMode::Proxy { NetworkMode::Proxy } else { NetworkMode::None };
    NetworkPolicy { mode, ..now }
}

/// Returns a VM's network for callers.
pub(crate) async fn shown(shared: &Shared, record: &VmRecord) -> Result<VmNetwork, ToolError> {
    shown_with(shared, record, None).await
}

/// Returns a VM's network for callers, with the counters of this state of `nexus-net` if it is given.
pub(crate) async fn shown_with(
    shared: &Shared,
    record: &VmRecord,
    state: Option<&State>,
) -> Result<VmNetwork, ToolError> {
    let policy = &record.spec.network;
    let mut network = shared.egresses.shown(record.id, policy);
    let Some(leased) = leased(shared, record.id).await? else {
        network.until_next_start = until_next_start(record, None);
        return Ok(network);
    };
    let boot = record.boot_id.filter(|_| record.state.may_run());
    network.until_next_start = until_next_start(record, leased.lease.boot.filter(|on| Some(*on) == boot));
    network.interface = Some(leased.shown(boot));
    if network.interface.as_ref().is_some_and(|interface| interface.tap.is_some()) {
        match state {
            Some(state) => add_counts(record.id, state, &mut network),
            None => match shared.nat.state().await {
                Ok(Some((_, state))) => add_counts(record.id, &state, &mut network),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "cannot read the counters of nexus-net"),
            },
        }
    }
    Ok(network)
}

fn until_next_start(record: &VmRecord, connected: Option<BootId>) -> Option<NetworkMode> {
    let lacks_interface = record.state.may_run() && connected.is_none();
    let now = in_force(&record.spec.network, lacks_interface).mode;
    (now != record.spec.network.mode).then_some(now)
}

/// Adds the counters of `nexus-net`.
fn add_counts(vm: VmId, state: &State, network: &mut VmNetwork) {
    let counted = state.vms.iter().find(|one| one.id == vm);
    if let Some(counters) = counted.map(|one| one.counters) {
        let counts = &mut network.counts;
        counts.allowed += counters.allowed;
        counts.denied += counters.denied + counters.spoofed;
        counts.sent_bytes += counters.sent_bytes;
        counts.received_bytes += counters.received_bytes;
        counts.sent_packets += counters.sent_packets;
        counts.received_packets += counters.received_packets;
        counts.open += counters.open;
    }
}

/// Handles events of `nexus-net` until the daemon ends.
pub(crate) async fn hear(shared: Weak<Shared>, mut events: mpsc::Receiver<Event>) {
    while let Some(first) = events.recv().await {
        let Some(shared) = shared.upgrade() else { return };
        let mut denials = Vec::new();
        let more = std::iter::from_fn(|| events.try_recv().ok());
        for event in std::iter::once(first).chain(more).take(BATCH_MAX) {
            match event {
                Event::Denied(denial) => denials.push(denial),
                Event::Missed(count) => {
                    tracing::warn!(count, "too many refused connections: some were not reported")
                }
                Event::Repaired { changes } => {
                    tracing::warn!(changes, "repaired the network of VMs after another program changed it");
                }
                Event::NotCut { connections, why } => {
                    tracing::error!(
                        connections,
                        why,
                        "connections that are no longer allowed are not cut yet"
                    );
                }
            }
        }
        tell(&shared, denials);
    }
}

/// Records refusals and notifies the guests.
fn tell(shared: &Arc<Shared>, denials: Vec<Denial>) {
    let mut told: BTreeMap<VmId, Vec<Refusal>> = BTreeMap::new();
    for denial in denials {
        let Some(egress) = shared.egresses.get(denial.vm) else { continue };
        let protocol = match denial.protocol {
            Protocol::Dns => "dns".to_owned(),
            Protocol::Tcp => "tcp".to_owned(),
            Protocol::Udp => "udp".to_owned(),
            Protocol::Icmp => "icmp".to_owned(),
            Protocol::Arp => "arp".to_owned(),
            Protocol::Other(number) => format!("protocol {number}"),
        };
        let place = denial.name.clone().or_else(|| Some(denial.address?.to_string()));
        let host = place.or_else(|| Some(denial.mac?.to_string())).unwrap_or_else(|| protocol.clone());
        let refusal = egress.refused_at_interface(
            denial.at,
            &protocol,
            host,
            denial.address,
            denial.port.unwrap_or(0),
            denial.reason,
        );
        told.entry(denial.vm).or_default().push(refusal);
    }
    for (vm, connections) in told {
        let Ok(handle) = shared.vms.of_daemon(&Reference::Id(vm)) else { continue };
        let Some(link) = handle.view.borrow().link.clone() else { continue };
        tokio::spawn(async move {
            let params = serde_json::to_string(&RefusedParams { connections })
                .and_then(serde_json::value::RawValue::from_string);
            let Ok(params) = params else { return };
            if let Err(error) = link.request(REFUSED_REQUEST, &params, HEAR_TIMEOUT).await {
                tracing::debug!(%error, "cannot notify a guest of refused connections");
            }
        });
    }
}

/// Removes the shared network from the host. Returns whether there was one.
pub(crate) async fn clean_up(shared: &Shared) -> Result<bool, ToolError> {
    let users = shared.store.read(leases::connected).await.map_err(store_error)?;
    if !users.is_empty() {
        let names: Vec<_> = users.iter().map(ToString::to_string).collect();
        let what = format!("VMs are using the shared network: {}", names.join(", "));
        return Err(ToolError::new(ErrorCode::InUse, what).hint("call vm_stop for them first"));
    }
    let was_used = shared.store.read(leases::subnet).await.map_err(store_error)?.is_some()
        || shared.store.read(|db| settings::get(db, defaults::SUBNET)).await.map_err(store_error)?.is_some();
    match shared.nat.clean_up(instance_id(shared), was_used).await {
        Ok(interfaces) => Ok(interfaces > 0),
        Err(NatError::Down) => Ok(false),
        Err(error) => Err(network_error(error)),
    }
}

/// Fails if running VMs have addresses of the current subnet.
pub(crate) async fn check_change(shared: &Shared) -> Result<(), ToolError> {
    let users = shared
        .store
        .read(|db| -> Result<_, StoreError> { leases::connected(db) })
        .await
        .map_err(store_error)?;
    if users.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = users.iter().map(ToString::to_string).collect();
    Err(ToolError::invalid(format!(
        "running VMs have addresses of the current subnet: {}; stop them first",
        names.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nat_without_an_interface_is_the_proxy_until_the_next_start() {
        let policy = |mode| NetworkPolicy { mode, ..NetworkPolicy::default() };
        for (asked, lacks, now) in [
            (NetworkMode::Nat, true, NetworkMode::Proxy),
            (NetworkMode::Nat, false, NetworkMode::Nat),
            (NetworkMode::Proxy, false, NetworkMode::Proxy),
            (NetworkMode::None, true, NetworkMode::None),
        ] {
            assert_eq!(in_force(&policy(asked), lacks).mode, now);
            let by_proxy = if now == NetworkMode::Proxy { now } else { NetworkMode::None };
            assert_eq!(of_proxy(&policy(asked), lacks).mode, by_proxy);
        }
    }
}
