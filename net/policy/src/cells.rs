//! Converts a policy into ranges of addresses and ports for the kernel's sets, since the kernel cannot ask about each connection.
//!
//! Nothing is decided here: the addresses and ports are split wherever an entry, a kind of address or an address of the host starts or ends,
//! and [`decide_address`] decides once for each piece.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_schema::network::{DenyReason, NetworkPolicy, NetworkRule, RuleProtocol, Target};

use crate::address::{NAT64, cuts_v4, cuts_v6};
use crate::{Place, decide_address, decide_name, inner, range};

/// The ports of DNS, plain and over TLS: a name in an allow list opens them only if its entry names the port.
const RESOLVER_PORTS: [u16; 2] = [53, 853];

/// IPv6 ranges with embedded IPv4 addresses that are not converted into ranges: compatible, translated and mapped addresses, Teredo, 6to4.
/// They are always refused. [`NAT64`] is converted.
const CLOSED_V6: [(Ipv6Addr, Ipv6Addr); 4] = [
    (Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0xffff, 0xffff)),
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0xffff, 0xffff, 0xffff)),
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), last_of(0x2001, 0)),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), last_of(0x2002, 0xffff)),
];

const fn last_of(first: u16, second: u16) -> Ipv6Addr {
    Ipv6Addr::new(first, second, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff)
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Returns the family of an address.
    pub const fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn last(self) -> u128 {
        match self {
            Self::V4 => u32::MAX.into(),
            Self::V6 => u128::MAX,
        }
    }

    fn address(self, bits: u128) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from(u32::try_from(bits).unwrap_or(u32::MAX)).into(),
            Self::V6 => Ipv6Addr::from(bits).into(),
        }
    }
}

/// Ranges of ports, as first and last port.
type Ports = Vec<(u16, u16)>;

/// The facts about the host that a decision depends on besides the policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The host's own addresses.
    pub own: BTreeSet<IpAddr>,
    /// Ranges that no policy opens, as first and last address: those of the VMs, and of the uplink of a network of its own.
    pub closed: Vec<(IpAddr, IpAddr)>,
}

impl Surroundings {
    /// Returns an address with what is known about it.
    pub fn place(&self, address: IpAddr, port: u16) -> Place {
        let is_own = self.own.contains(&address) || self.own.contains(&inner(address));
        let is_of_vms = self.closes(address) || self.closes(inner(address));
        Place { address, port, range: range(address), is_own, is_of_vms }
    }

    fn closes(&self, address: IpAddr) -> bool {
        self.closed.iter().any(|(first, last)| {
            first.is_ipv4() == address.is_ipv4() && *first <= address && address <= *last
        })
    }
}

/// The protocols that something is allowed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocols {
    /// All of them.
    All,
    /// This one only.
    Only(RuleProtocol),
}

impl Protocols {
    /// Returns the parts that a policy treats alike: all protocols together if no entry is for one only. Otherwise each that an entry can name,
    /// and the others are closed.
    pub fn of(policy: &NetworkPolicy) -> Vec<Self> {
        match policy.names_protocols() {
            true => RuleProtocol::ALL.map(Self::Only).to_vec(),
            false => vec![Self::All],
        }
    }

    /// Returns the protocol, if it is only one.
    pub const fn only(self) -> Option<RuleProtocol> {
        match self {
            Self::All => None,
            Self::Only(protocol) => Some(protocol),
        }
    }
}

/// Addresses and ports that are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell {
    /// The first and the last address.
    pub addresses: (IpAddr, IpAddr),
    /// The first and the last port. Port 0 stands for protocols without ports.
    pub ports: (u16, u16),
    /// The protocols.
    pub protocols: Protocols,
}

/// Returns whether an address is in a range that cannot be converted, and so is always refused.
pub fn is_closed(address: IpAddr) -> bool {
    let IpAddr::V6(v6) = address else { return false };
    CLOSED_V6.iter().any(|(first, last)| (first..=last).contains(&&v6))
}

/// Returns whether names decide what may be reached: there is an allow list, and it does not have `*` without a port.
pub fn has_name_list(policy: &NetworkPolicy) -> bool {
    let policy = &*policy.effective();
    let is_all = |rule: &NetworkRule| {
        *rule.target() == Target::Any && rule.ports().is_none() && rule.protocol().is_none()
    };
    !policy.allow.is_empty() && !policy.allow.iter().any(is_all)
}

/// Returns everything that may be reached by its address alone. The cells of one protocol do not overlap.
pub fn allowed_cells(policy: &NetworkPolicy, around: &Surroundings, family: Family) -> Vec<Cell> {
    let parts = Protocols::of(policy).into_iter();
    parts.flat_map(|part| cells_over(&policy.over(part.only()), around, family, part)).collect()
}

/// The same by a policy that is for these protocols.
fn cells_over(
    policy: &NetworkPolicy,
    around: &Surroundings,
    family: Family,
    protocols: Protocols,
) -> Vec<Cell> {
    let policy = &*policy.effective();
    let mut cells: Vec<(u128, u128, Ports)> = Vec::new();
    let starts: Vec<u128> = address_starts(policy, around, family).into_iter().collect();
    for (at, first) in starts.iter().enumerate() {
        let last = starts.get(at + 1).map_or(family.last(), |next| next - 1);
        let address = family.address(*first);
        if is_closed(address) {
            continue;
        }
        let ports = allowed_ports(&about(policy, address), around, address);
        match cells.last_mut() {
            _ if ports.is_empty() => {}
            Some((_, end, same)) if *end == first.wrapping_sub(1) && *same == ports => *end = last,
            _ => cells.push((*first, last, ports)),
        }
    }
    let all = cells.into_iter().flat_map(|(first, last, ports)| {
        let addresses = (family.address(first), family.address(last));
        ports.into_iter().map(move |ports| Cell { addresses, ports, protocols })
    });
    all.collect()
}

/// Returns what opens for an address that was found by a name. The error is the reason of the refusal for port 443.
pub fn pin_cells(
    policy: &NetworkPolicy,
    around: &Surroundings,
    name: &str,
    address: IpAddr,
) -> Result<Vec<Cell>, DenyReason> {
    let (mut cells, mut refused, mut is_found) = (Vec::new(), None, false);
    for protocols in Protocols::of(policy) {
        match pin_ports(&policy.over(protocols.only()), around, name, address) {
            Ok(ports) => {
                is_found = true;
                let addresses = (address, address);
                cells.extend(ports.into_iter().map(|ports| Cell { addresses, ports, protocols }));
            }
            Err(reason) => refused = refused.or(Some(reason)),
        }
    }
    refused.filter(|_| !is_found).map_or(Ok(cells), Err)
}

/// Returns the ports at which an address may be reached after it was found by a name, by a policy without protocols. Two ranges that one policy gives are the same or do not
/// overlap. The error is the reason of the refusal for port 443.
pub fn pin_ports(
    policy: &NetworkPolicy,
    around: &Surroundings,
    name: &str,
    address: IpAddr,
) -> Result<Vec<(u16, u16)>, DenyReason> {
    let policy = &*policy.effective();
    let decide = |port| {
        if is_closed(address) {
            return Err(DenyReason::Reserved);
        }
        decide_name(policy, name, port)?;
        decide_address(policy, around.place(address, port), true)?;
        let is_meant = |rule: &NetworkRule| rule.ports().is_some() && rule.names(name, port);
        if RESOLVER_PORTS.contains(&port) && has_name_list(policy) && !policy.allow.iter().any(is_meant) {
            return Err(DenyReason::Resolver);
        }
        Ok(())
    };
    let mut starts = port_starts(policy.allow.iter().chain(&policy.deny));
    if has_name_list(policy) {
        starts.extend(RESOLVER_PORTS.iter().flat_map(|port| [*port, port + 1]));
    }
    let allowed: Vec<_> = segments(&starts).filter(|(first, _)| decide(*first).is_ok()).collect();
    if allowed.is_empty() { decide(443).map(|()| allowed) } else { Ok(allowed) }
}

/// Returns the policy with only the entries that concern an address. For this address it decides as the whole policy does.
fn about(policy: &NetworkPolicy, address: IpAddr) -> NetworkPolicy {
    let bare = inner(address);
    let says = |rule: &&NetworkRule| {
        let port = rule.ports().map_or(0, |(first, _)| first);
        rule.is_any(port) || rule.covers(address, port) || rule.covers(bare, port)
    };
    let mut allow: Vec<NetworkRule> = policy.allow.iter().filter(says).cloned().collect();
    if allow.is_empty() {
        // An empty list would allow everything.
        allow.extend(policy.allow.first().cloned());
    }
    NetworkPolicy {
        allow,
        deny: policy.deny.iter().filter(says).cloned().collect(),
        groups: Vec::new(),
        packages: Vec::new(),
        ..*policy
    }
}

fn allowed_ports(policy: &NetworkPolicy, around: &Surroundings, address: IpAddr) -> Ports {
    let mut allowed = Ports::new();
    let starts = port_starts(policy.allow.iter().chain(&policy.deny));
    for (first, last) in segments(&starts) {
        if decide_address(policy, around.place(address, first), false).is_err() {
            continue;
        }
        match allowed.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
            _ => allowed.push((first, last)),
        }
    }
    allowed
}

/// Returns the first ports of the ranges within which all entries treat all ports alike.
fn port_starts<'a>(rules: impl Iterator<Item = &'a NetworkRule>) -> BTreeSet<u16> {
    let mut starts = BTreeSet::from([0]);
    for (first, last) in rules.filter_map(NetworkRule::ports) {
        starts.insert(first);
        starts.extend(last.checked_add(1));
    }
    starts
}

fn segments(starts: &BTreeSet<u16>) -> impl Iterator<Item = (u16, u16)> {
    let ends = starts.iter().skip(1).map(|next| next - 1).chain([u16::MAX]);
    starts.iter().copied().zip(ends)
}

/// Returns the first addresses of the ranges within which all addresses are treated alike.
fn address_starts(policy: &NetworkPolicy, around: &Surroundings, family: Family) -> BTreeSet<u128> {
    let mut starts = BTreeSet::from([0]);
    let mut cut = |first: IpAddr, last: IpAddr| {
        let inside_nat64 = |v4: Ipv4Addr| u128::from(NAT64) | u128::from(u32::from(v4));
        let (first, last) = match (family, first, last) {
            (Family::V4, IpAddr::V4(first), IpAddr::V4(last)) => {
                (u32::from(first).into(), u32::from(last).into())
            }
            (Family::V6, IpAddr::V4(first), IpAddr::V4(last)) => (inside_nat64(first), inside_nat64(last)),
            (Family::V6, IpAddr::V6(first), IpAddr::V6(last)) => (u128::from(first), u128::from(last)),
            _ => return,
        };
        starts.insert(first);
        if last < family.last() {
            starts.insert(last + 1);
        }
    };
    for (first, last) in cuts_v4() {
        cut(first.into(), last.into());
    }
    for (first, last) in cuts_v6().chain(CLOSED_V6) {
        cut(first.into(), last.into());
    }
    for address in &around.own {
        cut(*address, *address);
    }
    for (first, last) in &around.closed {
        cut(*first, *last);
    }
    for rule in policy.allow.iter().chain(&policy.deny) {
        match *rule.target() {
            Target::Net(IpAddr::V4(net), prefix) => {
                let rest = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
                cut(net.into(), IpAddr::V4((u32::from(net) | rest).into()));
            }
            Target::Net(IpAddr::V6(net), prefix) => {
                let rest = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
                cut(net.into(), IpAddr::V6((u128::from(net) | rest).into()));
            }
            Target::Any | Target::Name(_) | Target::Below(_) => {}
        }
    }
    starts
}

#[cfg(test)]
mod tests;
