//! The daemon's state of each VM's network: its policy and counters.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use nexus_net_policy::{allowing, inner};
use nexus_net_wire::Cidr;
use nexus_schema::Timestamp;
use nexus_schema::egress::EgressOpening;
use nexus_schema::id::VmId;
use nexus_schema::link::Refusal;
use nexus_schema::network::{DenyReason, NetworkPolicy};
use nexus_schema::tools::network::{LoggedConnection, Verdict};
use nexus_schema::tools::vm::{DeniedConnection, NetworkCounts, VmNetwork};
use tokio::sync::{Semaphore, watch};

use super::bucket::Bucket;
use super::log::Writer;
use super::upstream::{Upstream, Via};
use crate::event::Events;

/// Maximum number of refused connections of a VM that are remembered.
const DENIED_MAX: usize = 20;
/// Maximum number of concurrent name lookups of one VM.
const LOOKUPS_MAX: usize = 4;

/// The network of one VM.
#[derive(Debug)]
pub(crate) struct Egress {
    vm: VmId,
    log: Writer,
    events: Events,
    policy: watch::Sender<Arc<NetworkPolicy>>,
    pub(super) counts: Counts,
    /// Rate limits of all connections together.
    pub(super) to_vm: Bucket,
    pub(super) from_vm: Bucket,
    denied: Mutex<VecDeque<DeniedConnection>>,
    pub(super) lookups: Arc<Semaphore>,
    subnets: Subnets,
    /// The proxy of the daemon's environment.
    pub(super) upstream: Option<Arc<Upstream>>,
}

/// The subnets of the network that VMs in mode `nat` share; empty until they are chosen.
type Subnets = Arc<RwLock<Vec<Cidr>>>;

/// Counters since the daemon started.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) allowed: AtomicU64,
    pub(super) denied: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
}

impl Egress {
    fn new(
        vm: VmId,
        (log, events): (Writer, Events),
        policy: NetworkPolicy,
        subnets: Subnets,
        upstream: Option<Arc<Upstream>>,
    ) -> Self {
        Self {
            vm,
            log,
            events,
            policy: watch::Sender::new(Arc::new(policy)),
            counts: Counts::default(),
            to_vm: Bucket::new(),
            from_vm: Bucket::new(),
            denied: Mutex::default(),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
            subnets,
            upstream,
        }
    }

    /// Changes the policy; connections that it does not allow are closed.
    pub(crate) fn set(&self, policy: &NetworkPolicy) {
        self.to_vm.set(policy.bandwidth.rx);
        self.from_vm.set(policy.bandwidth.tx);
        self.policy.send_if_modified(|now| {
            let is_new = **now != *policy;
            if is_new {
                *now = Arc::new(policy.clone());
            }
            is_new
        });
    }

    /// Returns a receiver of the policy and its changes.
    pub(super) fn policy(&self) -> watch::Receiver<Arc<NetworkPolicy>> {
        self.policy.subscribe()
    }

    /// Returns whether an address, or the IPv4 address that is embedded in it, is in the network that VMs share.
    pub(super) fn is_of_vms(&self, address: IpAddr) -> bool {
        let subnets = self.subnets.read().unwrap_or_else(PoisonError::into_inner);
        [address.to_canonical(), inner(address)]
            .into_iter()
            .any(|address| subnets.iter().any(|subnet| subnet.contains(address)))
    }

    /// Returns the host's proxy for a connection, if it goes through one.
    pub(super) fn via(&self, host: &str, opening: &EgressOpening) -> Option<Via> {
        self.upstream.as_ref()?.via(host, opening.port, opening.how)
    }

    fn denied(&self) -> MutexGuard<'_, VecDeque<DeniedConnection>> {
        self.denied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a connection that the proxy refused.
    pub(super) fn note_denied(
        &self,
        (host, address): (&str, Option<IpAddr>),
        port: u16,
        reason: DenyReason,
        hint: String,
    ) {
        self.counts.denied.fetch_add(1, Ordering::Relaxed);
        let at = crate::os::clock::now();
        self.note(DeniedConnection { at, host: host.to_owned(), port, reason, hint }, "tcp", address);
    }

    /// Records a refusal at the VM's interface, with a hint. It is not counted here, since `nexus-net` counts it.
    pub(crate) fn refused_at_interface(
        &self,
        at: Timestamp,
        protocol: &str,
        host: String,
        address: Option<IpAddr>,
        port: u16,
        reason: DenyReason,
    ) -> Refusal {
        let mut allow = allowing(&self.policy.borrow(), &host, port, reason);
        if port == 0 {
            // Port 0 stands for a name, or for a protocol without ports.
            allow.iter_mut().for_each(|entry| {
                if let Some(rest) = entry.strip_suffix(":0") {
                    *entry = rest.to_owned();
                }
            });
        }
        let hint = reason.hint(&allow);
        self.note(
            DeniedConnection { at, host: host.clone(), port, reason, hint: hint.clone() },
            protocol,
            address,
        );
        Refusal { host, port, reason, hint, allow }
    }

    fn note(&self, one: DeniedConnection, protocol: &str, address: Option<IpAddr>) {
        self.events.denied(self.vm, protocol, &one);
        self.log.write(
            self.vm,
            LoggedConnection {
                at: one.at,
                verdict: Verdict::Denied,
                protocol: protocol.to_owned(),
                host: one.host.clone(),
                address: address.filter(|address| address.to_string() != one.host),
                port: one.port,
                reason: Some(one.reason),
            },
        );
        let mut denied = self.denied();
        denied.truncate(DENIED_MAX - 1);
        denied.push_front(one);
    }

    /// Logs a connection that the proxy made or failed to make.
    pub(super) fn log(&self, verdict: Verdict, host: &str, port: u16, address: Option<IpAddr>) {
        self.log.write(
            self.vm,
            LoggedConnection {
                at: crate::os::clock::now(),
                verdict,
                protocol: "tcp".to_owned(),
                host: host.to_owned(),
                address: address.filter(|address| address.to_string() != host),
                port,
                reason: None,
            },
        );
    }

    /// Returns the network as callers see it.
    fn shown(&self, policy: &NetworkPolicy) -> VmNetwork {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = NetworkCounts {
            allowed: get(&self.counts.allowed),
            denied: get(&self.counts.denied),
            failed: get(&self.counts.failed),
            open: get(&self.counts.open),
            sent_bytes: get(&self.counts.sent),
            received_bytes: get(&self.counts.received),
            ..NetworkCounts::default()
        };
        let denied = self.denied().iter().cloned().collect();
        VmNetwork { counts, denied, ..VmNetwork::from(policy.clone()) }
    }
}

/// Increments a counter until it is dropped.
pub(super) struct Counted<'a>(&'a AtomicU64);

impl<'a> Counted<'a> {
    pub(super) fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The networks of all VMs that ran since the daemon started.
#[derive(Debug)]
pub(crate) struct Egresses {
    all: Mutex<HashMap<VmId, Arc<Egress>>>,
    log: Writer,
    events: Events,
    subnets: Subnets,
    upstream: Option<Arc<Upstream>>,
    /// The totals of VMs that were deleted.
    gone: Mutex<(u64, u64, u64)>,
}

impl Egresses {
    /// Creates an empty set; the logs are in `directory`, and `events` hears of refused connections.
    pub(crate) fn new(directory: PathBuf, events: Events) -> Self {
        let (all, subnets) = (Mutex::default(), Subnets::default());
        Self { all, log: Writer::start(directory), events, subnets, upstream: None, gone: Mutex::default() }
    }

    /// Makes connections go through a proxy.
    pub(crate) fn through(self, upstream: Option<Upstream>) -> Self {
        Self { upstream: upstream.map(Arc::new), ..self }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<VmId, Arc<Egress>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the subnets that VMs share: the proxy refuses to connect to them.
    pub(crate) fn share(&self, subnets: [Cidr; 2]) {
        *self.subnets.write().unwrap_or_else(PoisonError::into_inner) = subnets.into();
    }

    /// Returns the network of a VM, and sets its policy.
    pub(crate) fn of(&self, vm: VmId, policy: &NetworkPolicy) -> Arc<Egress> {
        let (subnets, upstream) = (&self.subnets, &self.upstream);
        let fresh = || {
            let (policy, heard) = (policy.clone(), (self.log.clone(), self.events.clone()));
            Arc::new(Egress::new(vm, heard, policy, subnets.clone(), upstream.clone()))
        };
        let egress = self.all().entry(vm).or_insert_with(fresh).clone();
        egress.set(policy);
        egress
    }

    /// Returns the network of a VM, if it ran since the daemon started.
    pub(crate) fn get(&self, vm: VmId) -> Option<Arc<Egress>> {
        self.all().get(&vm).cloned()
    }

    /// Returns a VM's network as callers see it.
    pub(crate) fn shown(&self, vm: VmId, policy: &NetworkPolicy) -> VmNetwork {
        match self.all().get(&vm) {
            Some(egress) => egress.shown(policy),
            None => VmNetwork::from(policy.clone()),
        }
    }

    /// Returns the bytes that all VMs have sent and received, and how many of their connections were refused, since the daemon started.
    pub(crate) fn totals(&self) -> (u64, u64, u64) {
        let all = self.all();
        let sum = |of: fn(&Counts) -> &AtomicU64| {
            all.values().map(|egress| of(&egress.counts).load(Ordering::Relaxed)).sum::<u64>()
        };
        let gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        (
            sum(|counts| &counts.sent) + gone.0,
            sum(|counts| &counts.received) + gone.1,
            sum(|counts| &counts.denied) + gone.2,
        )
    }

    /// Forgets a VM that is deleted.
    pub(crate) fn forget(&self, vm: VmId) {
        if let Some(egress) = self.all().remove(&vm) {
            let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
            let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
            gone.0 += get(&egress.counts.sent);
            gone.1 += get(&egress.counts.received);
            gone.2 += get(&egress.counts.denied);
        }
        self.log.remove(vm);
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::network::NetworkMode;

    use super::*;

    #[test]
    fn what_is_refused_at_an_interface_has_a_hint_that_can_be_followed() {
        let directory = tempfile::tempdir().unwrap();
        let egresses = Egresses::new(directory.path().to_owned(), Events::new());
        let allow = vec!["a.example".parse().unwrap()];
        let policy = NetworkPolicy { mode: NetworkMode::Nat, allow, ..NetworkPolicy::default() };
        let egress = egresses.of(VmId::from_i64(1).unwrap(), &policy);
        let at = crate::os::clock::now();
        for (protocol, host, port, expected) in [
            ("dns", "b.example", 0, "b.example"),
            ("tcp", "8.8.8.8", 443, "8.8.8.8:443"),
            ("icmp", "::1", 0, "[::1]"),
        ] {
            let told = egress.refused_at_interface(
                at,
                protocol,
                host.into(),
                None,
                port,
                DenyReason::NameNotAllowed,
            );
            assert_eq!(told.allow, ["a.example", expected]);
            let entry: nexus_schema::network::NetworkRule = expected.parse().unwrap();
            assert_eq!(entry.to_string().trim_matches(['[', ']']), expected.trim_matches(['[', ']']));
        }
        let shown = egresses.shown(VmId::from_i64(1).unwrap(), &policy);
        assert_eq!((shown.denied.len(), shown.counts.denied), (3, 0), "nexus-net counts them");
    }

    #[test]
    fn the_last_refused_connections_are_remembered_and_all_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let (egresses, vm) =
            (Egresses::new(directory.path().to_owned(), Events::new()), VmId::from_i64(1).unwrap());
        let policy = NetworkPolicy::default();
        assert_eq!(egresses.shown(vm, &policy), VmNetwork::default());
        let egress = egresses.of(vm, &policy);
        for port in 1..=30 {
            egress.note_denied(("a.example", None), port, DenyReason::Denied, String::new());
        }
        let shown = egresses.shown(vm, &policy);
        assert_eq!((shown.counts.denied, shown.denied.len()), (30, DENIED_MAX));
        assert_eq!((shown.denied[0].port, shown.denied[DENIED_MAX - 1].port), (30, 11));
        egresses.forget(vm);
        assert_eq!(egresses.shown(vm, &policy), VmNetwork::default());
    }
}
