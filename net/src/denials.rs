//! Recent refusals, for `state` and for clients that watch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nexus_net_wire::{Denial, Event};
use nexus_schema::id::VmId;
use tokio::sync::broadcast;

/// Maximum number of remembered refusals of a VM, and their approximate size in bytes.
const DENIALS_MAX: usize = 50;
const BYTES_MAX: usize = 12 << 10;
/// Approximate size of a refusal as JSON without its name, in bytes.
const PLAIN_LENGTH: usize = 220;
/// Approximate maximum size of the refusals of all VMs in one answer, in bytes: an answer is one line.
const ANSWER_MAX: usize = 1 << 20;
/// Maximum number of events that wait for slow watchers.
const EVENTS_MAX: usize = 1024;
/// Maximum number of refused names of a VM that are reported each second, and the burst: the same as for packets. All are counted.
const NAMES_RATE: f64 = 20.0;
const NAMES_BURST: f64 = 60.0;

/// Returns the size of the refusals that each of this number of VMs may have in one answer, in bytes.
pub(crate) fn room(vms: usize) -> usize {
    (ANSWER_MAX / vms.max(1)).min(BYTES_MAX)
}

fn length(denial: &Denial) -> usize {
    PLAIN_LENGTH + denial.name.as_ref().map_or(0, String::len)
}

/// The last refusals, and the number of refused names. Each VM has its own limits: a flood from one VM does not drop those of others.
#[derive(Debug)]
pub(crate) struct Denials {
    of_vms: Mutex<BTreeMap<VmId, Noted>>,
    events: broadcast::Sender<Event>,
}

#[derive(Debug)]
struct Noted {
    last: VecDeque<Denial>,
    bytes: usize,
    names: u64,
    /// Number of names that may be reported now, and when it was computed.
    told: (f64, Instant),
}

impl Noted {
    fn new(now: Instant) -> Self {
        Self { last: VecDeque::new(), bytes: 0, names: 0, told: (NAMES_BURST, now) }
    }

    fn add(&mut self, denial: Denial) {
        self.bytes += length(&denial);
        self.last.push_front(denial);
        while self.last.len() > DENIALS_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.last.pop_back() else { break };
            self.bytes -= length(&oldest);
        }
    }

    /// Returns whether one more name may be reported.
    fn may_tell(&mut self, now: Instant) -> bool {
        let (left, since) = self.told;
        let left = (left + now.duration_since(since).as_secs_f64() * NAMES_RATE).min(NAMES_BURST);
        let may = left >= 1.0;
        self.told = (if may { left - 1.0 } else { left }, now);
        may
    }
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

    /// Records a refusal, and sends it to the watchers. If a VM has very many refused names, not every one is sent.
    pub(crate) fn note(&self, denial: Denial) {
        let now = Instant::now();
        let is_told = {
            let mut of_vms = self.of_vms();
            let noted = of_vms.entry(denial.vm).or_insert_with(|| Noted::new(now));
            noted.add(denial.clone());
            let is_name = denial.protocol == nexus_net_wire::Protocol::Dns;
            noted.names += u64::from(is_name);
            // The firewall limits the other refusals.
            !is_name || noted.may_tell(now)
        };
        if is_told {
            self.tell(Event::Denied(denial));
        }
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

    /// Returns the last refusals of a VM up to a size in bytes, newest first, and the number of refused names.
    pub(crate) fn of(&self, vm: VmId, room: usize) -> (Vec<Denial>, u64) {
        let of_vms = self.of_vms();
        let Some(noted) = of_vms.get(&vm) else { return Default::default() };
        let mut bytes = 0;
        let newest = noted.last.iter().take_while(|denial| {
            bytes += length(denial);
            bytes <= room
        });
        (newest.cloned().collect(), noted.names)
    }

    /// Forgets all VMs except these.
    pub(crate) fn retain(&self, vms: &BTreeSet<VmId>) {
        self.of_vms().retain(|vm, _| vms.contains(vm));
    }
}

#[cfg(test)]
mod tests {
    use nexus_net_wire::{Answer, Counters, LINE_MAX, Protocol, Reply, State, VmState, encode};
    use nexus_schema::network::DenyReason;
    use nexus_schema::time::Timestamp;

    use super::*;

    fn denial(vm: i64, protocol: Protocol, name: &str) -> Denial {
        Denial {
            vm: VmId::from_i64(vm).unwrap(),
            at: Timestamp::from_millis(0),
            protocol,
            address: Some("2001:db8:1234:5678:9abc:def0:1234:5678".parse().unwrap()),
            port: Some(65535),
            name: Some(name.to_owned()),
            mac: Some("02:4e:00:00:00:02".parse().unwrap()),
            reason: DenyReason::TooManyConnections,
        }
    }

    #[test]
    fn a_flood_of_one_vm_crowds_no_other_one_out() {
        let denials = Denials::default();
        let mut events = denials.watch();
        denials.note(denial(2, Protocol::Tcp, "quiet.example"));
        for number in 0..2000 {
            denials.note(denial(1, Protocol::Dns, &format!("{number}.example")));
        }
        denials.note(denial(2, Protocol::Dns, "quiet.example"));
        let (mut loud, mut quiet) = (0, 0);
        while let Ok(event) = events.try_recv() {
            let Event::Denied(denial) = event else { panic!("{event:?}") };
            *(if denial.vm.as_i64() == 1 { &mut loud } else { &mut quiet }) += 1;
        }
        assert_eq!(quiet, 2);
        assert!((60..100).contains(&loud), "{loud} are told");
        let (last, names) = denials.of(VmId::from_i64(1).unwrap(), usize::MAX);
        assert_eq!((last.len(), names), (DENIALS_MAX, 2000), "all are counted");
        assert_eq!(denials.of(VmId::from_i64(2).unwrap(), usize::MAX).0.len(), 2);
    }

    #[test]
    fn the_state_of_as_many_vms_as_there_can_be_is_one_line() {
        const VMS: usize = 4093;
        let denials = Denials::default();
        let long = "a".repeat(253);
        for _ in 0..60 {
            denials.note(denial(1, Protocol::Dns, &long));
        }
        let room = room(VMS);
        let vm = VmId::from_i64(1).unwrap();
        assert!(denials.of(vm, super::room(1)).0.len() >= 20, "few VMs have all of theirs");
        let (denied, _) = denials.of(vm, room);
        let max = u64::MAX;
        let counters = Counters {
            sent_bytes: max,
            received_bytes: max,
            sent_packets: max,
            received_packets: max,
            open: max,
            allowed: max,
            denied: max,
            spoofed: max,
        };
        let one = VmState {
            id: vm,
            name: "n".repeat(63),
            tap: "nx4294967295".to_owned(),
            is_in_use: true,
            counters,
            denied,
        };
        let state = State {
            instance: None,
            bridge: None,
            dns_servers: Vec::new(),
            vms: vec![one; VMS],
            firewall: Vec::new(),
            warnings: Vec::new(),
        };
        let line = encode(&Reply::Answer { id: 1, answer: Answer::State(Box::new(state)) });
        assert!(line.len() < LINE_MAX, "{}", line.len());
    }
}
