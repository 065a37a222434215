//! What was refused lately, for those who ask and for those who watch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nexus_net_wire::{Denial, Event};
use nexus_schema::id::VmId;
use tokio::sync::broadcast;

/// How many refusals of a VM are remembered.
const DENIALS_MAX: usize = 50;
/// How many events wait for those who watch and are slow.
const EVENTS_MAX: usize = 1024;

/// The last refusals, and how many names were refused.
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

    /// Notes a refusal, and tells it.
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

    /// Tells those who watch.
    pub(crate) fn tell(&self, event: Event) {
        // Nobody may be watching.
        let _ = self.events.send(event);
    }

    /// All events from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// The last refusals of a VM, the newest first, and how many names it was refused.
    pub(crate) fn of(&self, vm: VmId) -> (Vec<Denial>, u64) {
        self.of_vms()
            .get(&vm)
            .map(|noted| (noted.last.iter().cloned().collect(), noted.names))
            .unwrap_or_default()
    }

    /// Forgets all VMs but these.
    pub(crate) fn retain(&self, vms: &BTreeSet<VmId>) {
        self.of_vms().retain(|vm, _| vms.contains(vm));
    }
}
