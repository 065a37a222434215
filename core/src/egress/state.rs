//! What the daemon keeps of a VM's network: its policy, and what was counted.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nexus_schema::id::VmId;
use nexus_schema::network::{DenyReason, NetworkPolicy};
use nexus_schema::tools::vm::{DeniedConnection, NetworkCounts, VmNetwork};
use tokio::sync::{Semaphore, watch};

/// How many refused connections of a VM are remembered.
const DENIED_MAX: usize = 20;
/// How many names of one VM are looked up at once.
const LOOKUPS_MAX: usize = 4;

/// The network of one VM.
#[derive(Debug)]
pub(crate) struct Egress {
    policy: watch::Sender<Arc<NetworkPolicy>>,
    pub(super) counts: Counts,
    denied: Mutex<VecDeque<DeniedConnection>>,
    pub(super) lookups: Arc<Semaphore>,
}

/// What was counted since the daemon started.
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
    pub(super) fn new(policy: NetworkPolicy) -> Self {
        Self {
            policy: watch::Sender::new(Arc::new(policy)),
            counts: Counts::default(),
            denied: Mutex::default(),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
        }
    }

    /// What may be reached from now on; connections that it does not allow are cut.
    pub(crate) fn set(&self, policy: &NetworkPolicy) {
        self.policy.send_if_modified(|now| {
            let is_new = **now != *policy;
            if is_new {
                *now = Arc::new(policy.clone());
            }
            is_new
        });
    }

    /// What may be reached, and all that it becomes.
    pub(super) fn policy(&self) -> watch::Receiver<Arc<NetworkPolicy>> {
        self.policy.subscribe()
    }

    fn denied(&self) -> MutexGuard<'_, VecDeque<DeniedConnection>> {
        self.denied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a refused connection.
    pub(super) fn note_denied(&self, host: &str, port: u16, reason: DenyReason, hint: String) {
        self.counts.denied.fetch_add(1, Ordering::Relaxed);
        let mut denied = self.denied();
        denied.truncate(DENIED_MAX - 1);
        let at = crate::os::clock::now();
        denied.push_front(DeniedConnection { at, host: host.to_owned(), port, reason, hint });
    }

    /// The network as callers see it.
    fn shown(&self, policy: &NetworkPolicy) -> VmNetwork {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = NetworkCounts {
            allowed: get(&self.counts.allowed),
            denied: get(&self.counts.denied),
            failed: get(&self.counts.failed),
            open: get(&self.counts.open),
            sent_bytes: get(&self.counts.sent),
            received_bytes: get(&self.counts.received),
        };
        let denied = self.denied().iter().cloned().collect();
        VmNetwork { counts, denied, ..VmNetwork::from(policy.clone()) }
    }
}

/// Counts one thing while it is there.
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
#[derive(Debug, Default)]
pub(crate) struct Egresses(Mutex<HashMap<VmId, Arc<Egress>>>);

impl Egresses {
    fn all(&self) -> MutexGuard<'_, HashMap<VmId, Arc<Egress>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network of a VM, under this policy from now on.
    pub(crate) fn of(&self, vm: VmId, policy: &NetworkPolicy) -> Arc<Egress> {
        let egress = self.all().entry(vm).or_insert_with(|| Arc::new(Egress::new(policy.clone()))).clone();
        egress.set(policy);
        egress
    }

    /// A VM's network as callers see it.
    pub(crate) fn shown(&self, vm: VmId, policy: &NetworkPolicy) -> VmNetwork {
        match self.all().get(&vm) {
            Some(egress) => egress.shown(policy),
            None => VmNetwork::from(policy.clone()),
        }
    }

    /// Forgets a VM that is deleted.
    pub(crate) fn forget(&self, vm: VmId) {
        self.all().remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_refused_connections_are_remembered_and_all_are_counted() {
        let (egresses, vm) = (Egresses::default(), VmId::from_i64(1).unwrap());
        let policy = NetworkPolicy::default();
        assert_eq!(egresses.shown(vm, &policy), VmNetwork::default());
        let egress = egresses.of(vm, &policy);
        for port in 1..=30 {
            egress.note_denied("a.example", port, DenyReason::Denied, String::new());
        }
        let shown = egresses.shown(vm, &policy);
        assert_eq!((shown.counts.denied, shown.denied.len()), (30, DENIED_MAX));
        assert_eq!((shown.denied[0].port, shown.denied[DENIED_MAX - 1].port), (30, 11));
        egresses.forget(vm);
        assert_eq!(egresses.shown(vm, &policy), VmNetwork::default());
    }
}
