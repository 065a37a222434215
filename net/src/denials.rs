//! Recent refusals, for `state` and for clients that watch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nexus_net_wire::{Denial, Event};
use nexus_schema::id::VmId;
use tokio::sync::broadcast;

/// Maximum number of remembered refusals of a VM.
const DENIALS_MAX: usize = 50;
/// Maximum number of events that wait for slow watchers.
const EVENTS_MAX: usize = 1024;

/// The last refusals, and the number of refused names.
#[derive(Debug)]
pub(crate) struct Denials {
    of_vms: Mutex<BTreeMap<VmId, Noted>>,
    events: broadcast::Sender<Event>,
}

#[derive(Debug, Default)]
struct Noted {
    last: VecDeque<Denial>,
    names: u64,
}

impl Default for Denials {
    fn default() -> Self {
        Self { of_vms: Mutex::default(), events: broadcast::channel(EVENTS_MAX).0 }
    }
}

impl Denials {
    fn of_vms(&self) -> MutexGuard<'_, BTreeMap<VmId, Noted>> {
        self.of_vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a refusal, and sends it to the watchers.
    pub(crate) fn note(&self, denial: Denial) {
        {
            let mut of_vms = self.of_vms();
            let noted = of_vms.entry(denial.vm).or_default();
            noted.names += u64::from(denial.protocol == nexus_net_wire::Protocol::Dns);
            noted.last.truncate(DENIALS_MAX - 1);
            noted.last.push_front(denial.clone());
        }
        self.tell(Event::Denied(denial));
    }

    /// Sends an event to the watchers.
    pub(crate) fn tell(&self, event: Event) {
        // An error means that nobody is watching.
        let _ = self.events.send(event);
    }

    /// Returns a receiver of all events from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Returns the last refusals of a VM, newest first, and the number of refused names.
    pub(crate) fn of(&self, vm: VmId) -> (Vec<Denial>, u64) {
        self.of_vms()
            .get(&vm)
            .map(|noted| (noted.last.iter().cloned().collect(), noted.names))
            .unwrap_or_default()
    }

    /// Forgets all VMs except these.
    pub(crate) fn retain(&self, vms: &BTreeSet<VmId>) {
        self.of_vms().retain(|vm, _| vms.contains(vm));
    }
}
