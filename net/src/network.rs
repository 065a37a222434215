//! The desired state of the network, and its reconciliation with the kernel. One task owns it and handles one request after the other.
//!
//! Every request describes a desired state. The difference to the kernel's state is then applied, in an order in which a VM can never send
//! before its rules exist: bridge, settings, tables, then the rest. If the process is killed in between, the next one adopts everything that
//! is left: TAPs are identified by their alias, and one without an alias vanishes with the process that created it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nexus_net_policy::Surroundings;
use nexus_net_wire::{
    Attached, Cleaned, Configured, Detached, Event, Instance, InstanceId, Retained, Updated, Vm,
};
use nexus_schema::id::VmId;
use nexus_schema::tools::network::FirewallChain;
use tokio::sync::{mpsc, oneshot};

use crate::backoff::Backoff;
use crate::check;
use crate::dns::Setup;
use crate::error::Error;
use crate::firewall;
use crate::forwarding::Forwarding;
use crate::host_firewall;
use crate::link::kernel::Links;
use crate::link::plan::{Change as LinkChange, Desired as DesiredLinks, Port, changes as link_changes};
use crate::link::shape::{Shape, is_lacking};
use crate::link::{Found as FoundLinks, bridge_alias, bridge_name, group, sysctl};
use crate::nflog::Log;
use crate::nft::elements::{Wired, link_local};
use crate::nft::rules::Frame;
use crate::own;
use crate::view::{Shared, View, gateways, subnets, table_name};

mod again;
mod judge;
mod state;

/// The network of one process.
pub(crate) struct Network {
    links: Links,
    shared: Arc<Shared>,
    instance: Option<Instance>,
    vms: BTreeMap<VmId, Wired>,
    /// Group of nfnetlink_log; set once its socket is bound.
    log_group: Option<u16>,
    resolver: mpsc::Sender<(Setup, oneshot::Sender<Result<(), Error>>)>,
    /// The families in which the host forwards packets of VMs only.
    forwarding: Forwarding,
    /// Whether the kernel can hold packets back. If not, those above the limit to a VM are dropped.
    can_shape: bool,
    /// When to retry to cut connections.
    to_judge: Backoff,
    /// When to retry to change the rules of the host's firewall.
    to_open: Backoff,
    /// Chains of the host's firewall that drop packets of VMs, unless rules are added.
    firewall: Vec<FirewallChain>,
}

impl Network {
    /// Creates an empty state, without changing anything. Must be called in the network namespace of the VMs.
    pub(crate) fn new(
        links: Links,
        shared: Arc<Shared>,
        resolver: mpsc::Sender<(Setup, oneshot::Sender<Result<(), Error>>)>,
    ) -> Self {
        Self {
            links,
            shared,
            instance: None,
            vms: BTreeMap::new(),
            log_group: None,
            resolver,
            forwarding: Forwarding::default(),
            can_shape: true,
            to_judge: Backoff::default(),
            to_open: Backoff::default(),
            firewall: Vec::new(),
        }
    }

    fn instance(&self) -> Result<&Instance, Error> {
        self.instance.as_ref().ok_or(Error::NotConfigured)
    }

    /// Creates or changes the instance's network.
    pub(crate) async fn configure(&mut self, instance: Instance) -> Result<Configured, Error> {
        check::instance(&instance)?;
        let found = self.links.read().await?;
        check::is_free(&instance, &found)?;
        if let Some(old) = &self.instance
            && old.id != instance.id
        {
            return Err(Error::Invalid {
                what: format!("this process serves instance {}, not {}", old.id, instance.id),
            });
        }
        // Opened before anything is created, since nothing works without it.
        let mut netfilter = firewall::open()?;
        if self.log_group.is_none() {
            let log = Log::bind(instance.id.number());
            let log =
                log.map_err(|source| Error::Firewall { what: "bind a group of nfnetlink_log", source })?;
            self.log_group = Some(log.group());
            tokio::spawn(crate::events::tell_refusals(log, Arc::clone(&self.shared)));
        }
        let id = instance.id;
        self.instance = Some(instance.clone());
        self.rewire(&found);
        let changes = self.reconcile(&mut netfilter, found).await?;
        let changes = changes + self.open_firewall(&mut netfilter)?;
        self.judge(&mut netfilter)?;
        self.set_up_resolver(&instance).await?;
        let found = self.links.read().await?;
        let found = found.taps(id).map(|(vm, _)| vm).filter(|vm| !self.vms.contains_key(vm)).collect();
        Ok(Configured { bridge: bridge_name(id), found, changes })
    }

    /// Returns the server that asks those of the host, if they cannot all be reached from here.
    fn relay(&self) -> Option<SocketAddr> {
        self.links.is_apart().then_some(own::RELAY)
    }

    async fn set_up_resolver(&self, instance: &Instance) -> Result<(), Error> {
        let setup =
            Setup { gateways: gateways(instance).collect(), dns: instance.dns.clone(), relay: self.relay() };
        let gone = || Error::Resolver {
            what: "start the resolver".to_owned(),
            source: std::io::Error::from(std::io::ErrorKind::BrokenPipe),
        };
        let (done, answer) = oneshot::channel();
        self.resolver.send((setup, done)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Creates a VM's TAP and rules.
    pub(crate) async fn attach(&mut self, vm: Vm) -> Result<Attached, Error> {
        let instance = self.instance()?.clone();
        check::vm(&instance, &vm, &self.vms)?;
        let found = self.links.read().await?;
        let mut netfilter = firewall::open()?;
        let mut changes = 0;
        let there = found.taps(instance.id).find(|(of, _)| *of == vm.id).map(|(_, link)| link.clone());
        let is_new = there.is_none();
        let (tap, index) = match there {
            Some(link) => {
                if link.owner != Some(vm.owner_uid) {
                    Links::change_owner(&link.name, vm.owner_uid)?;
                    changes += 1;
                }
                (link.name, link.index)
            }
            None => {
                changes += 1;
                self.links.make_tap(instance.id, vm.id, vm.owner_uid).await?
            }
        };
        if crate::nft::mark(index).is_none() {
            self.links.remove(index).await?;
            return Err(Error::Invalid {
                what: format!("the interface index {index} is too large for a packet mark"),
            });
        }
        if !self.vms.contains_key(&vm.id) {
            firewall::recall(&mut netfilter, instance.id, (vm.id, index), &mut self.shared.pins())?;
        }
        let around = self.around(&found)?;
        let wired = Wired::new(vm, tap.clone(), index, &around);
        let id = wired.vm.id;
        if is_new {
            // Before its port is up. An existing TAP belongs to the same VM, whose connections continue.
            let addresses: Vec<IpAddr> = wired.addresses().collect();
            crate::conntrack::forget_addresses(&mut netfilter, &addresses)
                .map_err(|source| Error::Firewall { what: "forget old connections of addresses", source })?;
        }
        let before = self.vms.insert(id, wired);
        changes += self.reconcile(&mut netfilter, self.links.read().await?).await?;
        if before.is_some_and(|before| before != self.vms[&id]) {
            self.judge(&mut netfilter)?;
        }
        Ok(Attached { tap, changes })
    }

    /// Changes a VM's policy.
    pub(crate) async fn update(&mut self, vm: Vm) -> Result<Updated, Error> {
        let instance = self.instance()?.clone();
        check::vm(&instance, &vm, &self.vms)?;
        let old = self.vms.get(&vm.id).ok_or(Error::NoSuchVm { id: vm.id })?;
        if (old.vm.mac, old.vm.ipv4, old.vm.ipv6) != (vm.mac, vm.ipv4, vm.ipv6) {
            return Err(Error::Invalid {
                what: "addresses cannot be changed while a VM is attached".to_owned(),
            });
        }
        let found = self.links.read().await?;
        let mut netfilter = firewall::open()?;
        let around = self.around(&found)?;
        let wired = Wired::new(vm, old.tap.clone(), old.index, &around);
        self.vms.insert(wired.vm.id, wired);
        let changes = self.reconcile(&mut netfilter, found).await?;
        let cut = self.judge(&mut netfilter)?;
        Ok(Updated { cut, changes })
    }

    /// Removes a VM's network.
    pub(crate) async fn detach(&mut self, id: VmId) -> Result<Detached, Error> {
        let instance = self.instance()?.clone();
        let was_known = self.vms.remove(&id).is_some();
        let found = self.links.read().await?;
        let mine = |of: VmId| of == id;
        let removed = self.remove_taps(instance.id, &found, mine).await?;
        if was_known || !removed.is_empty() {
            let mut netfilter = firewall::open()?;
            self.reconcile(&mut netfilter, self.links.read().await?).await?;
            forget(&mut netfilter, &removed)?;
            self.forget_gone();
        }
        Ok(Detached { was_attached: was_known || !removed.is_empty() })
    }

    /// Removes the networks of all VMs except these.
    pub(crate) async fn retain(&mut self, ids: Vec<VmId>) -> Result<Retained, Error> {
        let instance = self.instance()?.clone();
        let ids: BTreeSet<VmId> = ids.into_iter().collect();
        let mut removed: BTreeSet<VmId> = self.vms.keys().copied().filter(|id| !ids.contains(id)).collect();
        self.vms.retain(|id, _| ids.contains(id));
        let found = self.links.read().await?;
        let taps = self.remove_taps(instance.id, &found, |id| !ids.contains(&id)).await?;
        removed.extend(found.taps(instance.id).map(|(id, _)| id).filter(|id| !ids.contains(id)));
        let mut netfilter = firewall::open()?;
        self.reconcile(&mut netfilter, self.links.read().await?).await?;
        forget(&mut netfilter, &taps)?;
        self.forget_gone();
        Ok(Retained { removed: removed.into_iter().collect() })
    }

    fn forget_gone(&self) {
        let ids: BTreeSet<VmId> = self.vms.keys().copied().collect();
        self.shared.pins().retain(&ids);
        self.shared.denials.retain(&ids);
    }

    async fn remove_taps(
        &self,
        id: InstanceId,
        found: &FoundLinks,
        is_chosen: impl Fn(VmId) -> bool,
    ) -> Result<Vec<u32>, Error> {
        let chosen = found.taps(id).filter(|(vm, _)| is_chosen(*vm));
        let chosen: Vec<u32> = chosen.map(|(_, link)| link.index).collect();
        for index in &chosen {
            self.links.remove(*index).await?;
            crate::failpoint::hit("tap-removed");
        }
        Ok(chosen)
    }

    /// Removes everything that belongs to the instance.
    pub(crate) async fn cleanup(&mut self, id: Option<InstanceId>) -> Result<Cleaned, Error> {
        let id = match (id, &self.instance) {
            (Some(id), _) => id,
            (None, Some(instance)) => instance.id,
            (None, None) => return Err(Error::NotConfigured),
        };
        self.vms.clear();
        self.instance = None;
        self.to_judge = Backoff::default();
        self.to_open = Backoff::default();
        self.shared.set_view(View::default());
        let found = self.links.read().await?;
        let forwarding = std::mem::take(&mut self.forwarding)
            | found.bridge(id).map(|_| Forwarding::recorded(&found)).unwrap_or_default();
        // First, because the bridge's alias says whether to do it. A namespace of its own ends with its settings.
        if !self.links.is_apart() {
            forwarding.end(&found, id);
        }
        let ours: Vec<u32> = found
            .links
            .iter()
            .filter(|link| link.alias.starts_with(&bridge_alias(id)) || link.name == bridge_name(id))
            .map(|link| link.index)
            .collect();
        let has_group =
            |index: &u32| found.links.iter().any(|link| link.index == *index && link.group == group(id));
        let strangers =
            found.links.iter().filter(|link| link.group == group(id) && !ours.contains(&link.index));
        if strangers.count() == 0 && ours.iter().any(has_group) {
            self.links.remove_group(id).await?;
        }
        for index in &ours {
            self.links.remove(*index).await?;
        }
        crate::failpoint::hit("links-removed");
        let mut netfilter = firewall::open()?;
        firewall::remove(&mut netfilter, id)?;
        host_firewall::clean(&mut netfilter, id).await.map_err(|source| Error::Firewall {
            what: "remove our rules from the host's firewall",
            source,
        })?;
        forget(&mut netfilter, &ours)?;
        Ok(Cleaned { interfaces: ours.len() as u64 })
    }

    /// Reverts changes by other programs; returns the number of repairs.
    pub(crate) async fn repair(&mut self) -> Result<u64, Error> {
        if self.instance.is_none() {
            return Ok(0);
        }
        let found = self.links.read().await?;
        // If another program removed a TAP, its VM is detached; its next attach creates a new TAP.
        let before = self.vms.len();
        self.vms.retain(|_, wired| found.links.iter().any(|link| link.index == wired.index));
        self.rewire(&found);
        let mut netfilter = firewall::open()?;
        let changes = self.reconcile(&mut netfilter, found).await? + (before - self.vms.len()) as u64;
        let changes = changes + self.open_firewall(&mut netfilter)?;
        if changes > 0 {
            self.shared.denials.tell(Event::Repaired { changes });
        }
        Ok(changes)
    }

    /// Returns the facts about the host that decisions depend on.
    fn around(&self, found: &FoundLinks) -> Result<Surroundings, Error> {
        let instance = self.instance()?;
        let bridge = found.bridge(instance.id).map(|bridge| bridge.index);
        let addresses = found.addresses.iter().filter(|(of, ..)| Some(*of) != bridge);
        let mut own: BTreeSet<IpAddr> = addresses.map(|(_, address, _)| *address).collect();
        own.extend(&instance.host_addresses);
        own.extend(&found.outside);
        let mut closed: Vec<_> = subnets(instance).map(|net| (net.address(), net.last())).collect();
        if self.links.is_apart() {
            own.extend(own::uplink_addresses());
            closed.push(own::uplink_range());
        }
        Ok(Surroundings { own, closed })
    }

    /// Recomputes what policies allow if the host's addresses have changed. Returns whether they have.
    fn rewire(&mut self, found: &FoundLinks) -> bool {
        let Ok(around) = self.around(found) else { return false };
        if self.shared.view().around == around {
            return false;
        }
        for wired in self.vms.values_mut() {
            *wired = Wired::new(wired.vm.clone(), wired.tap.clone(), wired.index, &around);
        }
        true
    }

    /// Applies the desired state.
    async fn reconcile(
        &mut self,
        netfilter: &mut crate::nft::socket::Netfilter,
        found: FoundLinks,
    ) -> Result<u64, Error> {
        let instance = self.instance()?.clone();
        // A new address of the host is closed to all VMs at once.
        let is_rewired = self.rewire(&found);
        let around = self.around(&found)?;
        self.shared.set_view(View { instance: Some(instance.clone()), vms: self.vms.clone(), around });
        let known: BTreeSet<u32> = self.vms.values().map(|wired| wired.index).collect();
        let kept: BTreeSet<u32> = found
            .taps(instance.id)
            .filter(|(vm, link)| !self.vms.contains_key(vm) && !known.contains(&link.index))
            .map(|(_, link)| link.index)
            .collect();
        self.forwarding = self.forwarding.look(&found, instance.v6.is_some());
        let desired = self.desired_links(&instance, !kept.is_empty());
        let links = link_changes(&desired, &found);
        tracing::debug!(?links, "changing links");
        let is_first =
            |change: &&LinkChange| matches!(change, LinkChange::MakeBridge | LinkChange::NameBridge(_));
        let mut changes = links.len() as u64;
        for change in links.iter().filter(is_first) {
            self.links.apply(instance.id, change).await?;
            crate::failpoint::hit("bridge-made");
        }
        let is_shape = |change: &&LinkChange| matches!(change, LinkChange::Shape(..));
        for change in links.iter().filter(is_shape) {
            self.shape(instance.id, change).await?;
        }
        changes += sysctl::apply(&sysctl::wanted(&bridge_name(instance.id), instance.v6.is_some()))?;
        let frame = Frame {
            table: table_name(instance.id),
            bridge: bridge_name(instance.id),
            v4: (instance.v4.subnet, instance.v4.gateway),
            v6: instance.v6.map(|subnet| (subnet.subnet, subnet.gateway)),
            log_group: self.log_group.unwrap_or_default(),
            connections_max: instance.connections_max,
            forwarding: self.forwarding,
            drops_to_vms: !self.can_shape,
        };
        changes += {
            let pins = self.shared.pins();
            firewall::reconcile(netfilter, &frame, &self.shared.view(), &pins, (&kept, &found.outer()))?
        };
        crate::failpoint::hit("tables-made");
        for change in links.iter().filter(|change| !is_first(change) && !is_shape(change)) {
            self.links.apply(instance.id, change).await?;
            match change {
                LinkChange::Join(..) => crate::failpoint::hit("tap-joined"),
                LinkChange::Raise(_) => crate::failpoint::hit("tap-raised"),
                LinkChange::AddAddress(_) => crate::failpoint::hit("address-added"),
                _ => {}
            }
        }
        if is_rewired {
            self.judge(netfilter)?;
        }
        Ok(changes)
    }

    /// Limits the traffic to a VM, if the kernel can.
    async fn shape(&mut self, id: InstanceId, change: &LinkChange) -> Result<(), Error> {
        match self.links.apply(id, change).await {
            Err(error) if error.errno().is_some_and(is_lacking) => {
                tracing::warn!(%error, "the kernel has no sch_tbf: packets to VMs above their limits are dropped");
                self.can_shape = false;
                Ok(())
            }
            done => Ok(done?),
        }
    }

    fn desired_links(&self, instance: &Instance, has_unknown: bool) -> DesiredLinks {
        let ports = self.vms.values().map(|wired| {
            let link_local = wired.vm.ipv6.map(|_| IpAddr::V6(link_local(wired.vm.mac)));
            let rx = wired.vm.policy.bandwidth.rx.filter(|_| self.can_shape);
            Port {
                index: wired.index,
                mac: wired.vm.mac,
                addresses: wired.addresses().collect(),
                link_local,
                shape: rx.map(Shape::of),
            }
        });
        DesiredLinks {
            id: instance.id,
            alias: self.forwarding.alias(instance.id),
            gateways: gateways(instance).collect(),
            ports: ports.collect(),
            has_unknown,
        }
    }
}

/// Deletes the connections of removed TAPs from the kernel's table.
fn forget(netfilter: &mut crate::nft::socket::Netfilter, indices: &[u32]) -> Result<(), Error> {
    for mark in indices.iter().filter_map(|index| crate::nft::mark(*index)) {
        crate::conntrack::forget(netfilter, mark)
            .map_err(|source| Error::Firewall { what: "forget the connections of a VM", source })?;
    }
    Ok(())
}
