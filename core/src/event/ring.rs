//! The newest events, each source with a share of its own: whoever causes many displaces only its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nexus_schema::Name;
use nexus_schema::id::VmId;
use nexus_schema::tools::event::{Event, EventKind};

use super::flow::{Flow, Limit};
use crate::store::events::EventRecord;
use crate::store::now;

/// How many events are kept: in all, and of one source.
const KEPT: usize = 8192;
const KEPT_OF_ONE: usize = 512;
/// How many changes of its state a VM may have, which a guest that reboots or lets go of its link can cause.
const STATES: Limit = Limit { burst: 100.0, per_second: 5.0 };
/// How many other events a VM may have, which its guest causes at will.
const OF_GUEST: Limit = Limit { burst: 100.0, per_second: 10.0 };
/// How many operations a caller may begin and end.
const OPS: Limit = Limit { burst: 1000.0, per_second: 100.0 };

/// What causes events.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Whose {
    /// The daemon or its host.
    Host,
    /// A VM.
    Vm(VmId),
    /// A caller.
    Owner(Arc<str>),
}

/// What decides who may see a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmFacts {
    pub(crate) name: Name,
    pub(crate) owner: Arc<str>,
    pub(crate) tags: BTreeMap<String, String>,
}

/// One source.
#[derive(Debug)]
pub(super) struct Source {
    /// Of a VM: as it is, or was last.
    pub(super) facts: Option<VmFacts>,
    /// Whether it is a VM that exists.
    is_there: bool,
    /// The numbers of its events.
    order: VecDeque<u64>,
    /// The number of its last event that is not kept any more.
    pub(super) lost_until: u64,
    first: Flow,
    second: Flow,
    /// How many of its events did not pass since that was told last.
    dropped: u64,
}

impl Source {
    /// The number of its newest event that is kept.
    pub(super) fn newest(&self) -> Option<u64> {
        self.order.back().copied()
    }
}

/// One event, and whose it is.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) event: Event,
    pub(super) whose: Whose,
    is_stored: bool,
}

/// The newest events.
#[derive(Debug)]
pub(super) struct Ring {
    kept: BTreeMap<u64, Kept>,
    sources: HashMap<Whose, Source>,
    /// The number of the last event.
    last: u64,
    /// Numbers that only earlier daemons can have told: after the last that is stored, up to the first of this one.
    unknown: std::ops::Range<u64>,
    /// The number of the last event of sources that are forgotten.
    pub(super) forgotten_until: u64,
    /// Events that are not stored yet.
    unstored: VecDeque<u64>,
    /// Stored events that are not kept any more.
    gone: Vec<u64>,
    /// Sources of which it is not told yet that events were dropped.
    untold: BTreeSet<Whose>,
}

/// Microseconds of the clock.
fn micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(0)
}

impl Ring {
    /// Numbers begin with the microseconds of the clock, so that no later daemon uses a number again that an earlier one told but could not
    /// store.
    pub(super) fn new() -> Self {
        Self {
            kept: BTreeMap::new(),
            sources: HashMap::new(),
            last: micros(),
            unknown: 0..0,
            forgotten_until: 0,
            unstored: VecDeque::new(),
            gone: Vec::new(),
            untold: BTreeSet::new(),
        }
    }

    /// Takes up the events that an earlier daemon stored.
    pub(super) fn load(&mut self, records: Vec<EventRecord>) {
        self.forgotten_until = records.first().map_or(0, |first| first.event.seq.saturating_sub(1));
        for EventRecord { event, owner, tags } in records {
            let owner: Option<Arc<str>> = owner.map(Into::into);
            let whose = match (event.kind, event.vm, &owner) {
                (EventKind::Op, _, Some(owner)) | (_, None, Some(owner)) => Whose::Owner(Arc::clone(owner)),
                (_, Some(vm), _) => Whose::Vm(vm),
                (_, None, None) => Whose::Host,
            };
            let facts = match (&whose, &event.vm_name, owner) {
                (Whose::Vm(_), Some(name), Some(owner)) => Some(VmFacts { name: name.clone(), owner, tags }),
                _ => None,
            };
            let source = self.source(&whose);
            source.facts = facts.or_else(|| source.facts.take());
            source.order.push_back(event.seq);
            self.last = self.last.max(event.seq);
            self.kept.insert(event.seq, Kept { event, whose, is_stored: true });
        }
        let stored = self.kept.last_key_value().map_or(0, |(seq, _)| *seq);
        self.unknown = stored + 1..self.last + 1;
        // Of which source events were displaced is not stored: it is assumed of all that it may be true of.
        let is_full = self.kept.len() >= KEPT;
        for source in self.sources.values_mut() {
            if is_full || source.order.len() >= KEPT_OF_ONE {
                source.lost_until = source.order.front().map_or(0, |first| first.saturating_sub(1));
            }
        }
    }

    fn source(&mut self, whose: &Whose) -> &mut Source {
        self.sources.entry(whose.clone()).or_insert_with(|| {
            let (first, second) = match whose {
                Whose::Owner(_) => (OPS, OPS),
                Whose::Host | Whose::Vm(_) => (STATES, OF_GUEST),
            };
            let now = Instant::now();
            Source {
                facts: None,
                is_there: false,
                order: VecDeque::new(),
                lost_until: 0,
                first: Flow::new(first, now),
                second: Flow::new(second, now),
                dropped: 0,
            }
        })
    }

    /// The number of the last event.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Whether an earlier daemon told of an event with this number, and could not store it.
    pub(super) fn is_unknown(&self, seq: u64) -> bool {
        self.unknown.contains(&seq)
    }

    /// The facts about a VM.
    pub(super) fn facts(&self, vm: VmId) -> Option<&VmFacts> {
        self.sources.get(&Whose::Vm(vm))?.facts.as_ref()
    }

    /// All VMs that exist or have events.
    pub(super) fn vms(&self) -> impl Iterator<Item = (VmId, &Source)> {
        self.sources.iter().filter_map(|(whose, source)| match whose {
            Whose::Vm(vm) => Some((*vm, source)),
            Whose::Host | Whose::Owner(_) => None,
        })
    }

    /// All callers that have events.
    pub(super) fn owners(&self) -> impl Iterator<Item = (&Arc<str>, &Source)> {
        self.sources.iter().filter_map(|(whose, source)| match whose {
            Whose::Owner(owner) => Some((owner, source)),
            Whose::Host | Whose::Vm(_) => None,
        })
    }

    /// The events after a number, oldest first.
    pub(super) fn after(&self, seq: u64) -> impl DoubleEndedIterator<Item = &Kept> {
        self.kept.range(seq.saturating_add(1)..).map(|(_, kept)| kept)
    }

    /// Sets the facts about a VM that exists.
    pub(super) fn know(&mut self, vm: VmId, facts: VmFacts) {
        let source = self.source(&Whose::Vm(vm));
        source.is_there = true;
        source.facts = Some(facts);
    }

    /// Has a VM forgotten once it has no events any more.
    pub(super) fn gone(&mut self, vm: VmId) {
        let whose = Whose::Vm(vm);
        self.source(&whose).is_there = false;
        self.forget_if_empty(&whose);
    }

    /// Adds an event, unless its source has too many; whether it was added.
    pub(super) fn add(&mut self, whose: Whose, event: Event, now: Instant) -> bool {
        let source = self.source(&whose);
        let flow = match event.kind {
            EventKind::Vm | EventKind::Op => &mut source.first,
            EventKind::Command | EventKind::Denied | EventKind::Pressure => &mut source.second,
            EventKind::Daemon | EventKind::Dropped => return self.push(whose, event),
        };
        if flow.take(now) {
            return self.push(whose, event);
        }
        source.dropped += 1;
        self.untold.insert(whose);
        false
    }

    fn push(&mut self, whose: Whose, mut event: Event) -> bool {
        self.last += 1;
        (event.seq, event.at) = (self.last, now());
        let source = self.source(&whose);
        if let Some(facts) = &source.facts {
            event.vm_name = Some(facts.name.clone());
        }
        source.order.push_back(event.seq);
        let is_over = source.order.len() > KEPT_OF_ONE;
        self.unstored.push_back(event.seq);
        self.kept.insert(event.seq, Kept { event, whose: whose.clone(), is_stored: false });
        if is_over {
            self.evict(&whose);
        } else if self.kept.len() > KEPT {
            let most = self.sources.iter().max_by_key(|(_, source)| source.order.len());
            if let Some(most) = most.map(|(whose, _)| whose.clone()) {
                self.evict(&most);
            }
        }
        true
    }

    /// Removes the oldest event of a source.
    fn evict(&mut self, whose: &Whose) {
        let Some(source) = self.sources.get_mut(whose) else { return };
        let Some(seq) = source.order.pop_front() else { return };
        source.lost_until = seq;
        if self.kept.remove(&seq).is_some_and(|kept| kept.is_stored) {
            self.gone.push(seq);
        }
        self.forget_if_empty(whose);
    }

    fn forget_if_empty(&mut self, whose: &Whose) {
        let is_empty = |source: &Source| source.order.is_empty() && !source.is_there && source.dropped == 0;
        if self.sources.get(whose).is_some_and(is_empty)
            && let Some(source) = self.sources.remove(whose)
        {
            self.forgotten_until = self.forgotten_until.max(source.lost_until);
        }
    }

    /// Adds an event for each source of which some were dropped.
    pub(super) fn tell_dropped(&mut self) {
        for whose in std::mem::take(&mut self.untold) {
            let Some(source) = self.sources.get_mut(&whose) else { continue };
            let count = std::mem::take(&mut source.dropped);
            let (who, vm) = match (&whose, &source.facts) {
                (Whose::Vm(vm), Some(facts)) => (facts.name.to_string(), Some(*vm)),
                (Whose::Vm(vm), None) => (vm.to_string(), Some(*vm)),
                (Whose::Owner(owner), _) => (owner.to_string(), None),
                (Whose::Host, _) => ("the host".to_owned(), None),
            };
            let text = format!("{count} events of {who} were dropped: there were too many at once");
            self.push(whose, Event { vm, dropped: Some(count), ..Event::new(EventKind::Dropped, text) });
        }
    }

    /// Whether it is to be told that events were dropped.
    pub(super) fn has_untold(&self) -> bool {
        !self.untold.is_empty()
    }

    /// What is to be stored and deleted now.
    pub(super) fn batch(&mut self) -> (Vec<EventRecord>, Vec<u64>) {
        let mut records = Vec::new();
        for seq in std::mem::take(&mut self.unstored) {
            let Some(kept) = self.kept.get_mut(&seq) else { continue };
            kept.is_stored = true;
            let facts = self.sources.get(&kept.whose).and_then(|source| source.facts.as_ref());
            let owner = match &kept.whose {
                Whose::Owner(owner) => Some(owner.to_string()),
                Whose::Vm(_) => facts.map(|facts| facts.owner.to_string()),
                Whose::Host => None,
            };
            let tags = facts.map(|facts| facts.tags.clone()).unwrap_or_default();
            records.push(EventRecord { event: kept.event.clone(), owner, tags });
        }
        (records, std::mem::take(&mut self.gone))
    }

    /// Takes a batch back that could not be stored.
    pub(super) fn unstore(&mut self, records: &[EventRecord], gone: Vec<u64>) {
        for record in records.iter().rev() {
            let seq = record.event.seq;
            if let Some(kept) = self.kept.get_mut(&seq) {
                kept.is_stored = false;
                self.unstored.push_front(seq);
            }
        }
        let evicted: BTreeSet<u64> = records.iter().map(|record| record.event.seq).collect();
        self.gone.retain(|seq| !evicted.contains(seq));
        self.gone.extend(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(id: i64) -> VmId {
        VmId::from_i64(id).unwrap()
    }

    fn facts(name: &str) -> VmFacts {
        VmFacts { name: name.parse().unwrap(), owner: "uid:0".into(), tags: BTreeMap::new() }
    }

    fn state(id: i64) -> Event {
        Event { vm: Some(vm(id)), ..Event::new(EventKind::Vm, "x") }
    }

    fn count(ring: &Ring, id: i64) -> usize {
        ring.after(0).filter(|kept| kept.whose == Whose::Vm(vm(id))).count()
    }

    /// Adds an event however many there were.
    fn force(ring: &mut Ring, id: i64) {
        ring.push(Whose::Vm(vm(id)), state(id));
    }

    #[test]
    fn a_flood_displaces_only_its_own_and_the_drops_are_counted() {
        let mut ring = Ring::new();
        let now = Instant::now();
        ring.know(vm(1), facts("quiet"));
        ring.know(vm(2), facts("loud"));
        assert!(ring.add(Whose::Vm(vm(1)), state(1), now));
        let denied = || Event { vm: Some(vm(2)), ..Event::new(EventKind::Denied, "x") };
        let passed = (0..100_000).filter(|_| ring.add(Whose::Vm(vm(2)), denied(), now)).count();
        assert_eq!(passed, OF_GUEST.burst as usize);
        // Its own changes of state are not lost for that.
        assert!(ring.add(Whose::Vm(vm(2)), state(2), now));
        assert!(ring.has_untold());
        ring.tell_dropped();
        let told = &ring.after(0).last().unwrap().event;
        assert_eq!((told.kind, told.dropped), (EventKind::Dropped, Some(100_000 - passed as u64)));
        assert!(told.text.contains("of loud were dropped") && !ring.has_untold());
        (0..5000).for_each(|_| force(&mut ring, 2));
        assert_eq!((count(&ring, 1), count(&ring, 2)), (1, KEPT_OF_ONE));
        assert_eq!(ring.sources[&Whose::Vm(vm(1))].lost_until, 0);
        assert!(ring.sources[&Whose::Vm(vm(2))].lost_until > 0);
    }

    #[test]
    fn when_all_is_full_whoever_has_most_gives_way() {
        let mut ring = Ring::new();
        for id in 10..=50 {
            (0..KEPT_OF_ONE / 2).for_each(|_| force(&mut ring, id));
        }
        (0..10).for_each(|_| force(&mut ring, 1));
        (0..KEPT_OF_ONE).for_each(|_| force(&mut ring, 2));
        assert_eq!(ring.kept.len(), KEPT);
        assert_eq!(count(&ring, 1), 10);
        // A VM that is deleted is forgotten with its last event.
        ring.know(vm(3), facts("c"));
        ring.gone(vm(3));
        assert!(ring.facts(vm(3)).is_none());
    }

    #[test]
    fn a_later_daemon_goes_on_with_higher_numbers() {
        let mut ring = Ring::new();
        ring.know(vm(1), facts("a"));
        force(&mut ring, 1);
        ring.push(Whose::Owner("uid:7".into()), Event::new(EventKind::Op, "x"));
        ring.push(Whose::Host, Event::new(EventKind::Daemon, "x"));
        let (records, gone) = ring.batch();
        assert_eq!((records.len(), gone.len()), (3, 0));
        // What could not be stored is in the next batch, and what was evicted meanwhile is not.
        ring.unstore(&records, Vec::new());
        ring.evict(&Whose::Host);
        let (records, gone) = ring.batch();
        assert_eq!((records.len(), gone.len()), (2, 0));
        ring.evict(&Whose::Vm(vm(1)));
        assert_eq!(ring.batch(), (Vec::new(), vec![records[0].event.seq]));

        let mut later = Ring::new();
        let mut ahead = records;
        // The clock was set back meanwhile.
        ahead[1].event.seq += 10_000_000_000_000;
        later.load(ahead.clone());
        assert_eq!(later.last(), ahead[1].event.seq);
        assert_eq!(later.facts(vm(1)), Some(&facts("a")));
        force(&mut later, 1);
        assert_eq!(later.last(), ahead[1].event.seq + 1);
        assert_eq!(later.batch().0.len(), 1, "what is stored is not stored again");
        assert_eq!(later.forgotten_until, ahead[0].event.seq - 1);
    }
}
