//! What is counted of the whole daemon, for `/metrics`.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::Nexus;

/// Counts since the daemon started, of all callers together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measures {
    /// VMs by state, now.
    pub vms: BTreeMap<&'static str, u64>,
    /// Guests that became ready.
    pub boots: u64,
    /// Links to guests that were lost.
    pub link_losses: u64,
    /// Bytes that VMs sent through their proxies.
    pub sent_bytes: u64,
    /// Bytes that VMs received through their proxies.
    pub received_bytes: u64,
    /// Connections that VMs' proxies refused by policy.
    pub denied: u64,
    /// Events that were dropped because there were too many.
    pub events_dropped: u64,
    /// Calls that are not in the audit log.
    pub audit_lost: u64,
}

impl Nexus {
    /// What is counted; from memory. For callers who may see everything.
    pub fn measures(&self) -> Measures {
        let shared = &self.shared;
        let mut vms = BTreeMap::new();
        for handle in shared.vms.all() {
            *vms.entry(handle.view.borrow().record.state.as_str()).or_default() += 1;
        }
        let (sent_bytes, received_bytes, denied) = shared.egresses.totals();
        Measures {
            vms,
            boots: shared.tally.boots.load(Ordering::Relaxed),
            link_losses: shared.tally.link_losses.load(Ordering::Relaxed),
            sent_bytes,
            received_bytes,
            denied,
            events_dropped: shared.events.dropped(),
            audit_lost: shared.calls.lost(),
        }
    }
}
