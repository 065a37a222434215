//! What a VM may reach. Pure.
//!
//! 1. What `deny` names is refused, by its name or by its address.
//! 2. Where `allow` has entries, a name has to be named by one of them, or `*` be among them. Without entries every name may be asked for.
//! 3. An address that `allow` names alone, or in a CIDR that lies within one kind of private addresses, may be reached. Any other one has to
//!    be of a kind that the preset allows: so neither a name, allowed or not, nor 0.0.0.0/0 leads to a private address. One that was not
//!    found by a name has to be named, too, or `*` be there, where `allow` has entries.

use std::net::IpAddr;

use nexus_schema::network::{
    DenyReason, NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, RULES_MAX, Target,
};
use nexus_schema::tools::vm::NetworkParams;

use super::address::{Range, inner, range};

/// The shortest prefix of a network of IPv4 that lies within a block: 10.0.0.0/8 and 127.0.0.0/8 are blocks, 224.0.0.0/4 is not opened as one.
const BLOCK_V4: u8 = 8;
/// The longest allow list that a hint shows.
const HINT_MAX: usize = 8;

/// Whether a name may be asked for, before it is looked up.
pub(super) fn decide_name(policy: &NetworkPolicy, name: &str, port: u16) -> Result<(), DenyReason> {
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
pub(super) struct Place {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) range: Range,
    /// Whether it is one of the host's own.
    pub(super) is_own: bool,
}

/// Whether an address may be dialled; `by_name` says that it was found by a name that may be asked for.
pub(super) fn decide_address(policy: &NetworkPolicy, place: Place, by_name: bool) -> Result<(), DenyReason> {
    let Place { address, port, range, is_own } = place;
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
pub(super) fn allowing(policy: &NetworkPolicy, host: &str, port: u16, reason: DenyReason) -> Vec<String> {
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

/// The policy of a new VM: what is asked for, over the default mode.
pub(crate) fn starting(default: NetworkMode, asked: Option<&NetworkParams>) -> Result<NetworkPolicy, String> {
    let policy = NetworkPolicy { mode: default, ..NetworkPolicy::default() };
    match asked {
        Some(asked) => merge(&policy, asked),
        None => Ok(policy),
    }
}

/// A policy with what is asked for in its place. Whoever asks for a preset or a list and no mode means the proxy.
pub(crate) fn merge(policy: &NetworkPolicy, asked: &NetworkParams) -> Result<NetworkPolicy, String> {
    let NetworkParams { mode, preset, allow, deny } = asked;
    let has_rules = preset.is_some() || allow.is_some() || deny.is_some();
    if *mode == Some(NetworkMode::None) && has_rules {
        return Err("network.mode none stands alone: without preset, allow and deny".to_owned());
    }
    let mode = mode.unwrap_or(if has_rules { NetworkMode::Proxy } else { policy.mode });
    let merged = NetworkPolicy {
        mode,
        preset: preset.unwrap_or(policy.preset),
        allow: allow.as_ref().unwrap_or(&policy.allow).clone(),
        deny: deny.as_ref().unwrap_or(&policy.deny).clone(),
    };
    for (what, rules) in [("allow", &merged.allow), ("deny", &merged.deny)] {
        if rules.len() > RULES_MAX {
            return Err(format!("network.{what} has {} entries, more than {RULES_MAX}", rules.len()));
        }
    }
    if let Some(rule) = merged.deny.iter().find(|rule| rule.to_string() == "*") {
        return Err(format!(
            "network.deny has `{rule}`, which allows nothing: give network.mode none, or name in network.allow what is allowed"
        ));
    }
    Ok(merged)
}

#[cfg(test)]
mod tests;
