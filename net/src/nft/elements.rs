//! The elements of the sets: the VMs, and what each may reach. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use nexus_net_policy::{Cell, Surroundings, allowed_cells};
use nexus_net_wire::{Mac, Vm};

use super::sets::{BRIDGE_SETS, INET_SETS};
use super::{Contents, Element, Family, MARK_HOST, bits_of, mark};

/// Protocols whose headers have ports at the same place as TCP: TCP, UDP, DCCP, SCTP, UDP-Lite.
pub(crate) const PORTED: [u8; 5] = [6, 17, 33, 132, 136];

/// A VM with its TAP, and what its policy allows by address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wired {
    pub(crate) vm: Vm,
    pub(crate) tap: String,
    /// Index of the TAP.
    pub(crate) index: u32,
    /// What it may reach by address alone.
    pub(crate) cells: Vec<Cell>,
}

impl Wired {
    /// Computes what the VM's policy allows.
    pub(crate) fn new(vm: Vm, tap: String, index: u32, around: &Surroundings) -> Self {
        let families = [nexus_net_policy::Family::V4, nexus_net_policy::Family::V6];
        let cells = families.into_iter().flat_map(|family| allowed_cells(&vm.policy, around, family));
        Self { cells: cells.collect(), vm, tap, index }
    }

    /// Returns the mark of its packets.
    pub(crate) fn mark(&self) -> u32 {
        mark(self.index).unwrap_or_default()
    }

    /// Returns its addresses, without the link-local one.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        [Some(IpAddr::V4(self.vm.ipv4)), self.vm.ipv6.map(IpAddr::V6)].into_iter().flatten()
    }

    /// Returns whether both have a common group.
    pub(crate) fn may_talk_to(&self, other: &Self) -> bool {
        self.vm.id != other.vm.id && self.vm.groups.iter().any(|group| other.vm.groups.contains(group))
    }
}

/// Returns the link-local address that a network card with this MAC address assigns itself (RFC 4291, appendix A).
pub(crate) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let [a, b, c, d, e, f] = [a ^ 2, b, c, d, e, f].map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, a << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

/// Builds a key of several parts, each padded to registers of 4 bytes.
pub(crate) fn key(parts: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::new();
    for part in parts {
        key.extend_from_slice(part);
        key.resize(key.len().next_multiple_of(4), 0);
    }
    key
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Returns an element of the sets `allow4`, `allow6`, `pin4` and `pin6`: a mark, with the bits of the protocols, and a range of addresses and ports.
pub(crate) fn place(mark: u32, cell: &Cell) -> Element {
    let mark = mark ^ bits_of(cell.protocols);
    let end = |address: IpAddr, port: u16| key(&[&mark.to_ne_bytes(), &octets(address), &port.to_be_bytes()]);
    Element {
        key: end(cell.addresses.0, cell.ports.0),
        end: Some(end(cell.addresses.1, cell.ports.1)),
        rate: None,
    }
}

/// Returns the elements of all sets that are not filled by rules or by the resolver. `outer` are the interfaces to other machines; `drops_to_vms`
/// says whether packets to a VM above its limit are dropped, because they cannot be held back.
pub(crate) fn contents<'a>(
    vms: impl Iterator<Item = &'a Wired> + Clone,
    outer: &BTreeSet<u32>,
    drops_to_vms: bool,
) -> Contents {
    let mut contents = Contents::new();
    let planned = |set: &&super::Set| !set.has_timeout && !set.is_dynamic;
    for set in BRIDGE_SETS.iter().filter(planned) {
        contents.insert((Family::Bridge, set.name), BTreeSet::new());
    }
    for set in INET_SETS.iter().filter(planned) {
        contents.insert((Family::Inet, set.name), BTreeSet::new());
    }
    let mut add = |family, set, element| {
        contents.entry((family, set)).or_default().insert(element);
    };
    let point = |parts: &[&[u8]]| Element { key: key(parts), end: None, rate: None };
    for protocol in PORTED {
        add(Family::Inet, "ported", Element { key: vec![protocol], end: None, rate: None });
    }
    for index in outer {
        add(Family::Inet, "outer", point(&[&index.to_ne_bytes()]));
    }
    for wired in vms.clone() {
        let index = wired.index.to_ne_bytes();
        let mark = wired.mark();
        let mac = wired.vm.mac.0;
        add(Family::Bridge, "taps", point(&[&index]));
        add(Family::Bridge, "spoofed", point(&[&index]));
        add(Family::Bridge, "own4", point(&[&index, &mac, &wired.vm.ipv4.octets()]));
        if let Some(v6) = wired.vm.ipv6 {
            for address in [v6, link_local(wired.vm.mac)] {
                add(Family::Bridge, "own6", point(&[&index, &mac, &address.octets()]));
            }
        }
        let bandwidth = wired.vm.policy.bandwidth;
        let to_vm = bandwidth.rx.filter(|_| drops_to_vms);
        for (set, rate) in [("slow_tx", bandwidth.tx), ("slow_rx", to_vm)] {
            if let Some(rate) = rate {
                add(Family::Bridge, set, Element { rate: Some(rate.as_bytes()), ..point(&[&index]) });
            }
        }
        for of in [mark, MARK_HOST] {
            add(Family::Inet, "flows", point(&[&mark.to_ne_bytes(), &of.to_ne_bytes()]));
        }
        for address in wired.addresses() {
            let set = if address.is_ipv4() { "mine4" } else { "mine6" };
            add(Family::Inet, set, point(&[&mark.to_ne_bytes(), &octets(address)]));
        }
        add(Family::Inet, "allowed", point(&[&mark.to_ne_bytes()]));
        add(Family::Inet, "refused", point(&[&mark.to_ne_bytes()]));
        for cell in &wired.cells {
            let set = if cell.addresses.0.is_ipv4() { "allow4" } else { "allow6" };
            add(Family::Inet, set, place(mark, cell));
        }
        for other in vms.clone().filter(|other| wired.may_talk_to(other)) {
            add(Family::Inet, "flows", point(&[&mark.to_ne_bytes(), &other.mark().to_ne_bytes()]));
            for address in other.addresses() {
                let set = if address.is_ipv4() { "peer4" } else { "peer6" };
                add(Family::Inet, set, point(&[&mark.to_ne_bytes(), &octets(address)]));
            }
        }
    }
    contents
}
