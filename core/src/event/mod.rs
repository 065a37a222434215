//! What happened: changes of VMs, operations, ends of commands, refused connections, scarce disk and memory.
//!
//! ```text
//! rooms above ──> Events ──> ring in memory ──> readers, each with a cursor: a number
//!                              │                  (a caller reads what it may see, and learns of nothing else)
//!                              └──> rows, within 100 ms: the ring of a later daemon
//! ```
//! The rows are a copy of the ring. Numbers only ever grow, also when a daemon was killed before it stored what it had told; so a cursor stays
//! valid when the daemon restarts, and a reader is told when events after its cursor are missing.
//! Nothing here waits for the store or for a reader: adding an event is quick, and what is too much is counted and dropped.

mod flow;
mod journal;
mod ring;
mod tell;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nexus_schema::Reference;
use nexus_schema::id::{VmId, VmKind};
use nexus_schema::tools::event::{Event, EventKind};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

pub(crate) use self::journal::keep;
use self::ring::{Kept, Ring, Whose};
pub(crate) use self::tell::vm_of;
use crate::access::Caller;
use crate::os::shares::{Share, Shares};
use crate::store::events::EventRecord;

/// How many calls of one caller may wait for events at once.
const WAITS_MAX: usize = 64;
/// The state of the daemon in an event at its start and its end.
const STARTED: &str = "started";
const STOPPED: &str = "stopped";
/// What became of the daemon before, in an event at the start, if it did not stop in order.
const KILLED: &str = "killed";

/// The events of one daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ring: Mutex<Ring>,
    /// The number of the last event.
    newest: watch::Sender<u64>,
    dropped: AtomicU64,
    /// Wakes the journal.
    wake: Arc<Notify>,
    /// Cancelled when the daemon stops.
    closing: CancellationToken,
    /// Cancelled when all events are stored.
    stored: CancellationToken,
    /// The calls that wait for events.
    waits: Shares<Arc<str>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// Which events are wanted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Of this VM.
    pub(crate) vm: Option<VmId>,
    /// Of these kinds; empty for all.
    pub(crate) kinds: Vec<EventKind>,
}

/// What a reader gets.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Page {
    /// Oldest first.
    pub(crate) events: Vec<Event>,
    /// Where to go on.
    pub(crate) cursor: u64,
    /// Whether there are more.
    pub(crate) more: bool,
    /// Why some are missing.
    pub(crate) missed: Option<String>,
}

impl Events {
    /// No events yet.
    pub(crate) fn new() -> Self {
        let ring = Ring::new();
        Self(Arc::new(Inner {
            newest: watch::Sender::new(ring.last()),
            ring: Mutex::new(ring),
            dropped: AtomicU64::new(0),
            wake: Arc::default(),
            closing: CancellationToken::new(),
            stored: CancellationToken::new(),
            waits: Shares::new(WAITS_MAX),
        }))
    }

    /// Takes up what an earlier daemon stored, and adds the event of this one's start.
    pub(crate) fn load(&self, records: Vec<EventRecord>) {
        let is_first = records.is_empty();
        let mut of_daemon = records.iter().rev().filter(|record| record.event.kind == EventKind::Daemon);
        let is_in_order = of_daemon.next().is_some_and(|last| last.event.state.as_deref() == Some(STOPPED));
        self.0.ring().load(records);
        let (text, from) = match (is_first, is_in_order) {
            (true, _) => ("nexusd started", None),
            (false, true) => ("nexusd started again", Some(STOPPED.to_owned())),
            (false, false) => ("nexusd started again after it was killed", Some(KILLED.to_owned())),
        };
        let started = Event { state: Some(STARTED.into()), from, ..Event::new(EventKind::Daemon, text) };
        self.add(Whose::Host, started);
    }

    fn add(&self, whose: Whose, event: Event) {
        let (is_added, last) = {
            let mut ring = self.0.ring();
            (ring.add(whose, event, Instant::now()), ring.last())
        };
        if is_added {
            self.0.newest.send_if_modified(|newest| {
                let is_later = last > *newest;
                *newest = last.max(*newest);
                is_later
            });
        } else {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.0.wake.notify_one();
    }

    /// How many events were dropped since the daemon started.
    pub(crate) fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// The number of the last event, now and later.
    pub(crate) fn newest(&self) -> watch::Receiver<u64> {
        self.0.newest.subscribe()
    }

    /// The VM that a caller means by a reference, if it sees events of it, or would: a deleted one, too.
    pub(crate) fn find(&self, caller: &Caller, vm: &Reference<VmKind>) -> Option<VmId> {
        let ring = self.0.ring();
        let found = ring.vms().filter(|(id, source)| {
            let is_it = match vm {
                Reference::Id(wanted) => wanted == id,
                Reference::Name(name) => source.facts.as_ref().is_some_and(|facts| facts.name == *name),
            };
            is_it && sees(caller, *id, &ring)
        });
        found.max_by_key(|(_, source)| source.newest()).map(|(id, _)| id)
    }

    /// A place for a call that waits for events; `None` if the caller, with all tokens of its chain, has too many of them.
    pub(crate) fn place(&self, caller: &Caller) -> Option<Share<Arc<str>>> {
        self.0.waits.take(caller.root_owner())
    }

    /// The newest events that a caller sees.
    pub(crate) fn recent(&self, caller: &Caller, wanted: &Wanted, limit: usize) -> Page {
        let ring = self.0.ring();
        let mut seen = Seen::new(caller, &ring);
        let kept = ring.after(0).rev().filter(|kept| wanted.has(&kept.event) && seen.sees(kept));
        let mut events: Vec<Event> = kept.take(limit).map(|kept| kept.event.clone()).collect();
        events.reverse();
        Page { events, cursor: ring.last(), more: false, missed: None }
    }

    /// The events after a number that a caller sees; `None` if there is no such number yet.
    pub(crate) fn after(&self, caller: &Caller, wanted: &Wanted, seq: u64, limit: usize) -> Option<Page> {
        let ring = self.0.ring();
        if seq > ring.last() {
            return None;
        }
        let mut page = Page { missed: missing(caller, wanted, &ring, seq), ..Page::default() };
        let mut seen = Seen::new(caller, &ring);
        for kept in ring.after(seq) {
            if !seen.sees(kept) {
                continue;
            }
            let event = &kept.event;
            let was_killed = event.kind == EventKind::Daemon && event.from.as_deref() == Some(KILLED);
            if !wanted.has(event) {
                let is_of_it = wanted.vm.is_none() || wanted.vm == event.vm;
                if was_killed || (event.kind == EventKind::Dropped && is_of_it) {
                    page.missed.get_or_insert_with(|| missed(event, was_killed));
                }
                continue;
            }
            if page.events.len() == limit {
                page.more = true;
                break;
            }
            if was_killed {
                page.missed.get_or_insert_with(|| missed(event, was_killed));
            }
            page.events.push(event.clone());
        }
        page.cursor = match page.events.last() {
            Some(last) if page.more => last.seq,
            _ => ring.last(),
        };
        Some(page)
    }

    /// Shows a caller each event after a number that it sees. Returns the number to go on from, and whether events are missing.
    pub(crate) fn look(&self, caller: &Caller, seq: u64, mut see: impl FnMut(&Event)) -> (u64, bool) {
        let ring = self.0.ring();
        let mut seen = Seen::new(caller, &ring);
        let mut is_missing = missing(caller, &Wanted::default(), &ring, seq).is_some();
        for kept in ring.after(seq).filter(|kept| seen.sees(kept)) {
            is_missing |= kept.event.kind == EventKind::Dropped;
            see(&kept.event);
        }
        (ring.last(), is_missing)
    }

    /// Adds the event of the daemon's end, and waits until all are stored.
    pub(crate) async fn close(&self) {
        let stopped = Event { state: Some(STOPPED.into()), ..Event::new(EventKind::Daemon, "nexusd stops") };
        self.add(Whose::Host, stopped);
        self.0.closing.cancel();
        self.0.stored.cancelled().await;
    }
}

impl Inner {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wanted {
    fn has(&self, event: &Event) -> bool {
        (self.vm.is_none() || self.vm == event.vm)
            && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
    }
}

/// Whether a VM exists for a caller, or did.
fn sees(caller: &Caller, vm: VmId, ring: &Ring) -> bool {
    if caller.scope.is_some_and(|scope| scope != vm) {
        return false;
    }
    match ring.facts(vm) {
        Some(facts) => caller.sees_vm(vm, &facts.owner, &facts.tags),
        None => caller.grant().is_none(),
    }
}

/// What a caller sees, asked once for each VM.
struct Seen<'a> {
    caller: &'a Caller,
    ring: &'a Ring,
    vms: HashMap<VmId, bool>,
}

impl<'a> Seen<'a> {
    fn new(caller: &'a Caller, ring: &'a Ring) -> Self {
        Self { caller, ring, vms: HashMap::new() }
    }

    fn sees(&mut self, kept: &Kept) -> bool {
        if self.caller.grant().is_none() && self.caller.scope.is_none() {
            return true;
        }
        match &kept.whose {
            Whose::Host => true,
            Whose::Vm(vm) => self.sees_vm(*vm),
            Whose::Owner(owner) => {
                self.caller.scope.is_none() && self.caller.made(owner)
                    || kept.event.vm.is_some_and(|vm| self.sees_vm(vm))
            }
        }
    }

    fn sees_vm(&mut self, vm: VmId) -> bool {
        *self.vms.entry(vm).or_insert_with(|| sees(self.caller, vm, self.ring))
    }
}

/// Why events after a number are not kept any more, if that is so of events that a caller would see.
fn missing(caller: &Caller, wanted: &Wanted, ring: &Ring, seq: u64) -> Option<String> {
    let is_lost = |until: u64| until > seq;
    let of_vms = ring.vms().any(|(vm, source)| {
        is_lost(source.lost_until) && wanted.vm.is_none_or(|wanted| wanted == vm) && sees(caller, vm, ring)
    });
    let of_owners = || {
        wanted.vm.is_none()
            && ring.owners().any(|(owner, source)| is_lost(source.lost_until) && caller.made(owner))
    };
    if ring.is_unknown(seq) {
        return Some(
            "nexusd was killed before it could store its last events: some may be missing; vm_history and op_list are complete"
                .to_owned(),
        );
    }
    (is_lost(ring.forgotten_until) || of_vms || of_owners()).then(|| {
        "older events after the cursor are not kept any more; vm_list, vm_history and op_list show what is now".to_owned()
    })
}

/// Why events around another one are missing.
fn missed(event: &Event, was_killed: bool) -> String {
    match was_killed {
        true => format!(
            "nexusd was killed and started again at {}: events of its last moments may be missing; vm_history and op_list are complete",
            event.at
        ),
        false => event.text.clone(),
    }
}

#[cfg(test)]
mod tests;
