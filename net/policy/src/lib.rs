//! Decides what a VM may reach. Pure: the proxy and the firewall use the same decisions.
//!
//! 1. Names and addresses in `deny` are refused.
//! 2. If `allow` has entries, a name must match one of them, or `*` must be among them. Without entries every name may be looked up.
//! 3. An address may be reached if `allow` has the address itself, or a CIDR around it that lies within one kind of private addresses. Any
//!    other address must be of a kind that the preset allows: so neither a name nor 0.0.0.0/0 opens a private address. If `allow` has entries
//!    and the address was not found by a name, an entry must also cover it, or `*` must be among them.
//!
//! The preset `packages` is an allow list: each function here decides by [`NetworkPolicy::effective`].
//!
//! [`decide_name`] and [`decide_address`] do not know protocols: where entries are for one protocol only, they are asked with
//! [`NetworkPolicy::over`]. What is computed for the kernel ([`allowed_cells`], [`pin_cells`]) says for which protocols it is.

mod address;
mod cells;

use std::net::IpAddr;

use nexus_schema::network::{DenyReason, NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, Target};

pub use address::{Range, inner, range};
pub use cells::{
    Cell, Family, Protocols, Surroundings, allowed_cells, has_name_list, is_closed, pin_cells, pin_ports,
};

/// Shortest IPv4 prefix that can open a range that is not public: 10.0.0.0/8 and 127.0.0.0/8 can be opened as a whole, 224.0.0.0/4 cannot.
const BLOCK_V4: u8 = 8;
/// Maximum number of entries of an allow list that a hint shows.
const HINT_MAX: usize = 8;

/// Decides whether a name may be looked up.
pub fn decide_name(policy: &NetworkPolicy, name: &str, port: u16) -> Result<(), DenyReason> {
    let policy = &*policy.effective();
    if policy.mode == NetworkMode::None {
        return Err(DenyReason::NoNetwork);
    }
    if policy.deny.iter().any(|rule| rule.is_any(port) || rule.names(name, port)) {
        return Err(DenyReason::Denied);
    }
    let allow = &policy.allow;
    if allow.is_empty() || allow.iter().any(|rule| rule.is_any(port) || rule.names(name, port)) {
        Ok(())
    } else {
        Err(DenyReason::NameNotAllowed)
    }
}

/// An address, and what is known about it.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The address.
    pub address: IpAddr,
    /// The port; 0 for protocols without ports, which only entries without ports match.
    pub port: u16,
    /// Its kind.
    pub range: Range,
    /// Whether it is one of the host's own.
    pub is_own: bool,
    /// Whether it is in the network that VMs share, which only groups open, not policies.
    pub is_of_vms: bool,
}

/// Decides whether an address may be dialled; `by_name` says that it was found by an allowed name.
pub fn decide_address(policy: &NetworkPolicy, place: Place, by_name: bool) -> Result<(), DenyReason> {
    let Place { address, port, range, is_own, is_of_vms } = place;
    if is_of_vms {
        return Err(DenyReason::OtherVm);
    }
    let policy = &*policy.effective();
    if policy.mode == NetworkMode::None {
        return Err(DenyReason::NoNetwork);
    }
    // Also checks an embedded IPv4 address.
    let bare = inner(address);
    let is_denied =
        |rule: &NetworkRule| rule.is_any(port) || rule.covers(address, port) || rule.covers(bare, port);
    if policy.deny.iter().any(is_denied) {
        return Err(DenyReason::Denied);
    }
    let allow = &policy.allow;
    let covering = || allow.iter().filter(|rule| rule.covers(address, port));
    if covering().any(|rule| opens(rule, range)) {
        return Ok(());
    }
    let is_named = by_name || allow.is_empty() || allow.iter().any(|rule| rule.is_any(port));
    if !is_named && covering().next().is_none() {
        return Err(DenyReason::AddressNotAllowed);
    }
    let refused = match (range, policy.preset) {
        (Range::Loopback, _) => Some(DenyReason::Host),
        (Range::Metadata, _) => Some(DenyReason::Metadata),
        (Range::LinkLocal, _) => Some(DenyReason::LinkLocal),
        (Range::Multicast, _) => Some(DenyReason::Multicast),
        (Range::Reserved, _) => Some(DenyReason::Reserved),
        (Range::Public | Range::Private, NetworkPreset::Internet | NetworkPreset::Packages) if is_own => {
            Some(DenyReason::Host)
        }
        (Range::Private, NetworkPreset::Internet | NetworkPreset::Packages) => Some(DenyReason::Private),
        (Range::Public, _) | (Range::Private, NetworkPreset::Open) => None,
    };
    refused.map_or(Ok(()), Err)
}

/// Returns whether an entry that covers an address of a kind opens this kind: it must be a single address, or a network that is entirely of
/// this kind, other than public ones. An IPv4 network with at least [`BLOCK_V4`] bits is of a kind if both of its ends are. Of IPv6 only
/// networks within fc00::/7 and fe80::/10 count.
fn opens(rule: &NetworkRule, kind: Range) -> bool {
    let (first, last, is_whole) = match *rule.target() {
        Target::Net(IpAddr::V4(net), prefix) => {
            let rest = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            (IpAddr::V4(net), IpAddr::V4((u32::from(net) | rest).into()), prefix == 32)
        }
        Target::Net(IpAddr::V6(net), prefix) => {
            let rest = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
            (IpAddr::V6(net), IpAddr::V6((u128::from(net) | rest).into()), prefix == 128)
        }
        Target::Any | Target::Name(_) | Target::Below(_) => return false,
    };
    let is_within = match rule.target() {
        Target::Net(IpAddr::V4(_), prefix) => *prefix >= BLOCK_V4,
        Target::Net(IpAddr::V6(net), prefix) => match net.segments() {
            [0xfc00..=0xfdff, ..] => *prefix >= 7,
            [0xfe80..=0xfebf, ..] => *prefix >= 10,
            _ => false,
        },
        Target::Any | Target::Name(_) | Target::Below(_) => false,
    };
    is_whole || (is_within && kind != Range::Public && range(first) == kind && range(last) == kind)
}

/// Returns the allow list that would permit a refused connection; empty if no list would, or if it is too long to show.
pub fn allowing(policy: &NetworkPolicy, host: &str, port: u16, reason: DenyReason) -> Vec<String> {
    match reason {
        DenyReason::NoNetwork
        | DenyReason::Denied
        | DenyReason::OtherVm
        | DenyReason::Spoofed
        | DenyReason::Quic
        | DenyReason::Resolver
        | DenyReason::TooManyConnections => return Vec::new(),
        DenyReason::NameNotAllowed
        | DenyReason::AddressNotAllowed
        | DenyReason::Host
        | DenyReason::Private
        | DenyReason::LinkLocal
        | DenyReason::Metadata
        | DenyReason::Multicast
        | DenyReason::Reserved => {}
    }
    let Some(more) = NetworkRule::exact(host, port) else { return Vec::new() };
    if policy.allow.len() >= HINT_MAX {
        return Vec::new();
    }
    let all = policy.allow.is_empty().then(|| "*".to_owned());
    let allow = policy.allow.iter().chain([&more]).map(ToString::to_string);
    all.into_iter().chain(allow).collect()
}

#[cfg(test)]
mod tests;
