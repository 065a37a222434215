//! What a VM may reach. Pure: one policy, whoever carries the connections.
//!
//! 1. What `deny` names is refused, by its name or by its address.
//! 2. Where `allow` has entries, a name has to be named by one of them, or `*` be among them. Without entries every name may be asked for.
//! 3. An address that `allow` names alone, or in a CIDR that lies within one kind of private addresses, may be reached. Any other one has to
//!    be of a kind that the preset allows: so neither a name, allowed or not, nor 0.0.0.0/0 leads to a private address. One that was not
//!    found by a name has to be named, too, or `*` be there, where `allow` has entries.

mod address;
mod cells;

use std::net::IpAddr;

use nexus_schema::network::{DenyReason, NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, Target};

pub use address::{Range, inner, range};
pub use cells::{Cell, Family, Surroundings, allowed_cells, has_name_list, is_closed, pin_ports};

/// The shortest prefix of a network of IPv4 that lies within a block: 10.0.0.0/8 and 127.0.0.0/8 are blocks, 224.0.0.0/4 is not opened as one.
const BLOCK_V4: u8 = 8;
/// The longest allow list that a hint shows.
const HINT_MAX: usize = 8;

/// Whether a name may be asked for, before it is looked up.
pub fn decide_name(policy: &NetworkPolicy, name: &str, port: u16) -> Result<(), DenyReason> {
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

/// An address, and what is known of it.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The address.
    pub address: IpAddr,
    /// The port; 0 for protocols without ports, which only entries without ports mean.
    pub port: u16,
    /// Its kind.
    pub range: Range,
    /// Whether it is one of the host's own.
    pub is_own: bool,
    /// Whether it is of the network that VMs share, which no policy opens: groups do.
    pub is_of_vms: bool,
}

/// Whether an address may be dialled; `by_name` says that it was found by a name that may be asked for.
pub fn decide_address(policy: &NetworkPolicy, place: Place, by_name: bool) -> Result<(), DenyReason> {
    let Place { address, port, range, is_own, is_of_vms } = place;
    if is_of_vms {
        return Err(DenyReason::OtherVm);
    }
    if policy.mode == NetworkMode::None {
        return Err(DenyReason::NoNetwork);
    }
    // In whatever clothes it comes.
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
        (Range::Public | Range::Private, NetworkPreset::Internet) if is_own => Some(DenyReason::Host),
        (Range::Private, NetworkPreset::Internet) => Some(DenyReason::Private),
        (Range::Public, _) | (Range::Private, NetworkPreset::Open) => None,
    };
    refused.map_or(Ok(()), Err)
}

/// Whether an entry that covers an address of a kind means it, and does not only have it among all others. The ends of a network of
/// IPv4 that is as small as the smallest block of these kinds are of its kind if all of it is; of IPv6 only networks of its own blocks count, and
/// none that has networks of IPv4 in it.
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

/// What the allow list would have to be for a connection that is refused; empty where no list helps, or it is too long to show.
pub fn allowing(policy: &NetworkPolicy, host: &str, port: u16, reason: DenyReason) -> Vec<String> {
    match reason {
        DenyReason::NoNetwork
        | DenyReason::Denied
        | DenyReason::OtherVm
        | DenyReason::Spoofed
        | DenyReason::Quic
        | DenyReason::Resolver => return Vec::new(),
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
