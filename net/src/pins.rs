//! Pins: the addresses that the resolver returned to each VM, and how long each is open. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nexus_net_policy::{Cell, Surroundings, has_name_list, pin_cells, pin_ports};
use nexus_schema::id::VmId;
use nexus_schema::network::NetworkPolicy;

/// Maximum number of remembered addresses of a VM; those that expire first are dropped.
const ADDRESSES_MAX: usize = 4096;
/// Maximum number of remembered names of one address.
const NAMES_MAX: usize = 8;
/// Time by which a pin outlives its answer's TTL: programs connect some time after the lookup, and often use short-lived answers for longer.
const SLACK: Duration = Duration::from_secs(30);
const SHORTEST: Duration = Duration::from_secs(60);
/// Maximum TTL of an answer; the resolver limits the TTLs of its answers to it.
pub(crate) const LONGEST: Duration = Duration::from_secs(3600);
/// Time for which names are remembered after their pins expired: their connections may still be open.
const MEMORY: Duration = Duration::from_secs(24 * 3600);

/// The known names of all VMs.
#[derive(Debug, Default)]
pub(crate) struct Pins(BTreeMap<VmId, BTreeMap<IpAddr, Known>>);

/// The known names of one address.
#[derive(Debug, Clone)]
struct Known {
    /// The names that resolved to it, newest first.
    names: Vec<String>,
    until: Instant,
}

impl Known {
    fn noted(&self, name: &str, now: Instant, ttl: Duration) -> Noted {
        match self.names.iter().any(|other| other == name) {
            true if self.until >= now + ttl && self.until > now => Noted::Covered,
            _ if self.until > now => Noted::Longer,
            _ => Noted::New,
        }
    }
}

/// An address and ports that are open for some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) cell: Cell,
    pub(crate) name: String,
    pub(crate) remaining: Duration,
}

/// What an answer changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Noted {
    /// The address was not open, or not by this name.
    New,
    /// It was open, but for a shorter time than this answer needs.
    Longer,
    /// It was open for long enough.
    Covered,
}

/// Returns how long an answer with this TTL opens its addresses.
pub(crate) fn lifetime(ttl: Duration) -> Duration {
    ttl.clamp(SHORTEST, LONGEST) + SLACK
}

impl Pins {
    /// Records that a name resolved to an address for a VM. The answer is valid for `ttl`, and the address is open for `lifetime` (see [`lifetime`]).
    pub(crate) fn note(
        &mut self,
        vm: VmId,
        (name, address): (&str, IpAddr),
        now: Instant,
        (ttl, lifetime): (Duration, Duration),
    ) -> Noted {
        let of_vm = self.0.entry(vm).or_default();
        let known = of_vm.entry(address).or_insert_with(|| Known { names: Vec::new(), until: now });
        let noted = known.noted(name, now, ttl);
        if noted != Noted::Covered {
            known.until = known.until.max(now + lifetime);
        }
        known.names.retain(|other| other != name);
        known.names.insert(0, name.to_owned());
        known.names.truncate(NAMES_MAX);
        if of_vm.len() > ADDRESSES_MAX {
            of_vm.retain(|_, known| known.until + MEMORY > now);
        }
        while of_vm.len() > ADDRESSES_MAX {
            let Some(first) = of_vm.iter().min_by_key(|(_, known)| known.until).map(|(address, _)| *address)
            else {
                break;
            };
            of_vm.remove(&first);
        }
        noted
    }

    /// Returns what [`Self::note`] would return, without recording anything.
    pub(crate) fn known(
        &self,
        vm: VmId,
        (name, address): (&str, IpAddr),
        now: Instant,
        ttl: Duration,
    ) -> Noted {
        let known = self.0.get(&vm).and_then(|of_vm| of_vm.get(&address));
        known.map_or(Noted::New, |known| known.noted(name, now, ttl))
    }

    /// Returns the pins of a VM, for the names that its policy allows.
    pub(crate) fn open(
        &self,
        vm: VmId,
        policy: &NetworkPolicy,
        around: &Surroundings,
        now: Instant,
    ) -> Vec<Pin> {
        let mut pins: BTreeMap<Cell, Pin> = BTreeMap::new();
        if !has_name_list(policy) {
            return Vec::new();
        }
        for (address, known) in self.0.get(&vm).into_iter().flatten().filter(|(_, known)| known.until > now) {
            for name in &known.names {
                for cell in pin_cells(policy, around, name, *address).unwrap_or_default() {
                    let remaining = known.until - now;
                    pins.entry(cell).or_insert_with(|| Pin { cell, name: name.clone(), remaining });
                }
            }
        }
        pins.into_values().collect()
    }

    /// Returns whether a policy without protocols allows a port for any remembered name of an address, even if the pin has expired.
    pub(crate) fn is_allowed(
        &self,
        vm: VmId,
        policy: &NetworkPolicy,
        around: &Surroundings,
        (address, port): (IpAddr, u16),
    ) -> bool {
        let has = |ports: &[(u16, u16)]| ports.iter().any(|(first, last)| (*first..=*last).contains(&port));
        let is_open = |name: &String| pin_ports(policy, around, name, address).is_ok_and(|ports| has(&ports));
        let known = self.0.get(&vm).and_then(|of_vm| of_vm.get(&address));
        has_name_list(policy) && known.is_some_and(|known| known.names.iter().any(is_open))
    }

    /// Returns the name with which a VM last found an address.
    pub(crate) fn name(&self, vm: VmId, address: IpAddr) -> Option<&str> {
        self.0.get(&vm)?.get(&address)?.names.first().map(String::as_str)
    }

    /// Forgets all VMs except these.
    pub(crate) fn retain(&mut self, vms: &BTreeSet<VmId>) {
        self.0.retain(|vm, _| vms.contains(vm));
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::network::{NetworkMode, NetworkPreset};

    use super::*;

    #[test]
    fn names_open_their_ports_for_some_time_and_are_remembered_longer() {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let policy = |allow: &[&str]| NetworkPolicy {
            mode: NetworkMode::Proxy,
            preset: NetworkPreset::Internet,
            allow: rules(allow),
            deny: Vec::new(),
            ..NetworkPolicy::default()
        };
        let listed = policy(&["a.example:443", "*.b.example:80"]);
        let (vm, other) = (VmId::from_i64(1).unwrap(), VmId::from_i64(2).unwrap());
        let (around, now) = (Surroundings::default(), Instant::now());
        let address: IpAddr = "8.8.8.8".parse().unwrap();
        let mut pins = Pins::default();
        let secs = Duration::from_secs;
        assert_eq!(pins.note(vm, ("a.example", address), now, (secs(4), secs(10))), Noted::New);
        assert_eq!(pins.note(vm, ("x.b.example", address), now, (secs(4), secs(5))), Noted::Longer);
        assert_eq!(pins.note(vm, ("a.example", address), now, (secs(4), secs(20))), Noted::Covered);
        assert_eq!(pins.note(vm, ("x.b.example", address), now, (secs(4), secs(5))), Noted::Covered);
        let ports = |pins: Vec<Pin>| pins.iter().map(|pin| pin.cell.ports).collect::<Vec<_>>();
        assert_eq!(ports(pins.open(vm, &listed, &around, now)), [(80, 80), (443, 443)]);
        assert_eq!(ports(pins.open(vm, &policy(&["a.example"]), &around, now)).first(), Some(&(0, 52)));
        assert!(pins.open(vm, &policy(&["*"]), &around, now).is_empty(), "all is open without pins");
        assert!(pins.open(other, &listed, &around, now).is_empty());
        let later = now + Duration::from_secs(11);
        assert!(pins.open(vm, &listed, &around, later).is_empty());
        assert!(pins.is_allowed(vm, &listed, &around, (address, 443)));
        assert!(!pins.is_allowed(vm, &listed, &around, (address, 22)));
        assert!(!pins.is_allowed(vm, &policy(&["c.example"]), &around, (address, 443)));
        assert_eq!(pins.name(vm, address), Some("x.b.example"));
        pins.retain(&BTreeSet::from([other]));
        assert_eq!(pins.name(vm, address), None);
    }

    #[test]
    fn a_vm_that_looks_up_very_many_addresses_keeps_the_longest_lived() {
        let (vm, now) = (VmId::from_i64(1).unwrap(), Instant::now());
        let mut pins = Pins::default();
        for number in 0..=ADDRESSES_MAX as u32 {
            let lifetime = Duration::from_secs(if number == 0 { 1 } else { 100 });
            let address = IpAddr::from((number + 1).to_be_bytes());
            pins.note(vm, ("a.example", address), now, (lifetime, lifetime));
        }
        assert_eq!(pins.0[&vm].len(), ADDRESSES_MAX);
        assert_eq!(pins.name(vm, IpAddr::from(1_u32.to_be_bytes())), None);
        assert_eq!(lifetime(Duration::ZERO), SHORTEST + SLACK);
        assert_eq!(lifetime(Duration::from_secs(1 << 30)), LONGEST + SLACK);
    }
}
