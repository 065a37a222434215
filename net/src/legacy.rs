//! Chains of the old `iptables-legacy` and `ip6tables-legacy`, which nf_tables does not show: the kernel has a table `filter` per family, which is
//! read and replaced as a whole. This module is pure; [`socket`] talks to the kernel, and [`apply()`] uses both.
//!
//! The layouts are those of linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h and linux/netfilter/x_tables.h for 64 bits. What
//! rules match is copied and not understood.

mod apply;
mod socket;

use nexus_schema::tools::network::FirewallHook;

pub(crate) use apply::{Applied, apply, clean, is_held, look};

/// Number of hooks in a table (`NF_INET_NUMHOOKS`).
const HOOKS: usize = 5;
/// Length of a table's name, in bytes (`XT_TABLE_MAXNAMELEN`).
const NAME: usize = 32;
/// Length of `struct ipt_getinfo`, of the head of `struct ipt_get_entries`, and of the head of `struct ipt_replace`, in bytes.
const INFO: usize = 84;
const LIST_HEAD: usize = 40;
const REPLACE_HEAD: usize = 96;
/// Place of the number of counters in `struct ipt_replace`. The pointer to them follows it.
const REPLACE_COUNTERS: usize = 84;
/// Length of `struct xt_counters`, in bytes: packets and bytes.
const COUNTERS: usize = 16;
/// Length of `struct xt_entry_match` and of `struct xt_entry_target`, in bytes: length, name, revision.
const PART: usize = 32;
/// Lengths of the parts of our rules, in bytes: a match of ports, and a verdict.
const PORTS: usize = PART + 16;
const VERDICT: usize = PART + 8;
/// Verdicts, as a table has them: `-NF_DROP - 1`, `-NF_ACCEPT - 1`. Jumps are places of rules instead, which are not negative.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
/// `IP6T_F_PROTO`: the rule is for one protocol.
const HAS_PROTOCOL: u8 = 1;
/// Numbers of protocols in IP headers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// The port of DNS.
const DNS: u16 = 53;

/// The family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    V4,
    V6,
}

impl Kind {
    const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the length of addresses and masks, after which the names of interfaces follow.
    const fn addresses(self) -> usize {
        match self {
            Self::V4 => 16,
            Self::V6 => 64,
        }
    }

    /// Returns the length of what an entry says of packets: `struct ipt_ip`, `struct ip6t_ip6`.
    const fn packet(self) -> usize {
        match self {
            Self::V4 => 84,
            Self::V6 => 136,
        }
    }

    /// Returns the place of an entry's sizes: where its target is, and where it ends.
    const fn sizes(self) -> usize {
        self.packet() + 4
    }

    /// Returns the place of an entry's counters.
    const fn counters(self) -> usize {
        match self {
            Self::V4 => 96,
            Self::V6 => 152,
        }
    }

    /// Returns the length of `struct ipt_entry` or `struct ip6t_entry`.
    const fn head(self) -> usize {
        self.counters() + COUNTERS
    }
}

/// Returns the number of a hook in tables: `NF_INET_LOCAL_IN`, `NF_INET_FORWARD`.
const fn number(hook: FirewallHook) -> usize {
    match hook {
        FirewallHook::Input => 1,
        FirewallHook::Forward => 2,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(usize::from(u16::from_ne_bytes(bytes)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A rule of a table, a policy, or the start of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    bytes: Vec<u8>,
    /// Its index and its place when it was read; `None` if it is new.
    read: Option<(usize, u32)>,
}

impl Entry {
    /// Returns whether it was read at this place.
    fn was_at(&self, place: u32) -> bool {
        self.read.is_some_and(|(_, read)| read == place)
    }

    /// Returns its target, with the target's head.
    fn target(&self, kind: Kind) -> &[u8] {
        let at = u16_at(&self.bytes, kind.sizes());
        at.and_then(|at| self.bytes.get(at..)).unwrap_or_default()
    }

    /// Returns the name of its target; empty for verdicts and jumps.
    fn target_name(&self, kind: Kind) -> &[u8] {
        let name = self.target(kind).get(2..PART - 1).unwrap_or_default();
        name.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Returns its verdict, or the place that it jumps to.
    fn verdict(&self, kind: Kind) -> Option<i32> {
        let value = u32_at(self.target(kind), PART).filter(|_| self.target_name(kind).is_empty());
        value.map(u32::cast_signed)
    }

    /// Returns whether it drops or rejects all packets.
    fn drops_all(&self, kind: Kind) -> bool {
        let is_for_all = self.bytes.iter().take(kind.packet()).all(|byte| *byte == 0)
            && u16_at(&self.bytes, kind.sizes()) == Some(kind.head());
        let drops =
            self.verdict(kind) == Some(DROP) || [&b"REJECT"[..], b"DROP"].contains(&self.target_name(kind));
        is_for_all && drops
    }

    /// Returns whether it is this rule, whatever it has counted.
    fn is(&self, kind: Kind, rule: &[u8]) -> bool {
        let mut bytes = self.bytes.clone();
        let (sizes, counters) = (kind.sizes(), kind.counters());
        // What the kernel fills in: `nfcache`, and `comefrom` with what is behind it.
        for own in [kind.packet()..sizes, sizes + 4..counters + COUNTERS] {
            if let Some(own) = bytes.get_mut(own) {
                own.fill(0);
            }
        }
        bytes == rule
    }
}

/// A family's table `filter`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    kind: Kind,
    /// The hooks that have chains, as bits.
    hooks: u32,
    /// The chain of each hook: the indices of its first rule and of its policy.
    chains: [Option<(usize, usize)>; HOOKS],
    entries: Vec<Entry>,
}

impl Table {
    /// Reads what the kernel says: `struct ipt_getinfo`, and the entries. `None` if this is not understood.
    fn read(kind: Kind, info: &[u8], listed: &[u8]) -> Option<Self> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < listed.len() {
            let length = u16_at(listed, at + kind.sizes() + 2).filter(|length| *length >= kind.head())?;
            let bytes = listed.get(at..at + length)?.to_vec();
            entries.push(Entry { bytes, read: Some((entries.len(), u32::try_from(at).ok()?)) });
            at += length;
        }
        let hooks = u32_at(info, NAME)?;
        let index = |at| {
            let place = u32_at(info, at)?;
            entries.iter().position(|entry| entry.was_at(place))
        };
        let mut chains = [None; HOOKS];
        for (hook, chain) in chains.iter_mut().enumerate() {
            if hooks & 1 << hook != 0 {
                let first = NAME + 4 + 4 * hook;
                *chain = Some((index(first)?, index(first + 4 * HOOKS)?));
            }
        }
        Some(Self { kind, hooks, chains, entries })
    }

    /// Returns the rules of a hook's chain, without the policy.
    fn rules(&self, hook: FirewallHook) -> &[Entry] {
        let chain = self.chains[number(hook)];
        chain.and_then(|(first, policy)| self.entries.get(first..policy)).unwrap_or_default()
    }

    /// Returns whether a hook's chain has this rule.
    fn has(&self, hook: FirewallHook, rule: &[u8]) -> bool {
        self.rules(hook).iter().any(|entry| entry.is(self.kind, rule))
    }

    /// Returns whether a hook's chain drops packets that none of its rules accepts.
    fn drops(&self, hook: FirewallHook) -> bool {
        let policy = self.chains[number(hook)].and_then(|(_, policy)| self.entries.get(policy));
        policy.is_some_and(|policy| policy.verdict(self.kind) == Some(DROP))
            || self.rules(hook).last().is_some_and(|rule| rule.drops_all(self.kind))
    }

    /// Returns whether there is a chain, besides those of hooks, whose name starts like this.
    fn has_chain(&self, start: &str) -> bool {
        let is_it = |entry: &Entry| {
            let name = entry.target(self.kind).get(PART..).unwrap_or_default();
            entry.target_name(self.kind) == b"ERROR" && name.starts_with(start.as_bytes())
        };
        self.entries.iter().any(is_it)
    }

    /// Inserts the rules that are missing at the head of a hook's chain; returns their number.
    fn insert(&mut self, hook: FirewallHook, wanted: &[Vec<u8>]) -> usize {
        let Some((first, _)) = self.chains[number(hook)] else { return 0 };
        let missing: Vec<_> = wanted.iter().filter(|rule| !self.has(hook, rule)).cloned().collect();
        let count = missing.len();
        let new = missing.into_iter().map(|bytes| Entry { bytes, read: None });
        self.entries.splice(first..first, new);
        for (at, chain) in self.chains.iter_mut().enumerate() {
            if let Some((start, policy)) = chain {
                *policy += if *policy >= first { count } else { 0 };
                *start += if *start >= first && at != number(hook) { count } else { 0 };
            }
        }
        count
    }

    /// Removes rules from a hook's chain; returns their number.
    fn remove(&mut self, hook: FirewallHook, unwanted: &[Vec<u8>]) -> usize {
        let kind = self.kind;
        let mut removed = 0;
        while let Some((first, _)) = self.chains[number(hook)] {
            let is_one = |entry: &Entry| unwanted.iter().any(|rule| entry.is(kind, rule));
            let Some(at) = self.rules(hook).iter().position(is_one) else { break };
            let index = first + at;
            self.entries.remove(index);
            for (start, policy) in self.chains.iter_mut().flatten() {
                *policy -= usize::from(*policy > index);
                *start -= usize::from(*start > index);
            }
            removed += 1;
        }
        removed
    }

    /// Returns it as `struct ipt_replace`, without a pointer to counters. `None` if a rule jumps to a place that is not there.
    fn replacement(&self) -> Option<Vec<u8>> {
        let mut places = Vec::with_capacity(self.entries.len());
        let mut size = 0;
        for entry in &self.entries {
            places.push(u32::try_from(size).ok()?);
            size += entry.bytes.len();
        }
        let mut bytes = vec![0; REPLACE_HEAD];
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        put(NAME, self.hooks);
        put(NAME + 4, u32::try_from(self.entries.len()).ok()?);
        put(NAME + 8, u32::try_from(size).ok()?);
        for (hook, chain) in self.chains.iter().enumerate() {
            if let Some((first, policy)) = *chain {
                put(NAME + 12 + 4 * hook, *places.get(first)?);
                put(NAME + 12 + 4 * (HOOKS + hook), *places.get(policy)?);
            }
        }
        bytes[..FILTER.len()].copy_from_slice(FILTER);
        for entry in &self.entries {
            let start = bytes.len();
            bytes.extend_from_slice(&entry.bytes);
            if let Some(jump) = entry.verdict(self.kind).and_then(|verdict| u32::try_from(verdict).ok()) {
                let to = self.entries.iter().position(|entry| entry.was_at(jump))?;
                let at = start + u16_at(&entry.bytes, self.kind.sizes())? + PART;
                bytes[at..at + 4].copy_from_slice(&places[to].to_ne_bytes());
            }
        }
        Some(bytes)
    }

    /// Returns the index at which each entry was read. New ones have none.
    fn read_as(&self) -> impl ExactSizeIterator<Item = Option<usize>> {
        self.entries.iter().map(|entry| entry.read.map(|(index, _)| index))
    }
}

/// Name of the table.
const FILTER: &[u8] = b"filter";

/// Which packets a rule accepts.
#[derive(Debug, Clone, Copy)]
struct Accepted {
    /// Whether they come from the bridge; otherwise they go to it.
    is_from: bool,
    protocol: Option<u8>,
    port: Option<u16>,
}

/// Returns a rule that accepts packets from or to a bridge. The bridge's name has at most 15 bytes.
fn rule(kind: Kind, bridge: &str, accepted: Accepted) -> Vec<u8> {
    let Accepted { is_from, protocol, port } = accepted;
    let target = kind.head() + if port.is_some() { PORTS } else { 0 };
    let mut bytes = vec![0; target + VERDICT];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let size = |size: usize| u16::try_from(size).unwrap_or_default().to_ne_bytes();
    let interfaces = kind.addresses();
    let name = interfaces + if is_from { 0 } else { 16 };
    put(name, bridge.as_bytes());
    // The NUL after it counts, too: other names may start the same.
    put(name + 32, &vec![0xff; bridge.len() + 1]);
    if let Some(protocol) = protocol {
        put(interfaces + 64, &u16::from(protocol).to_ne_bytes());
        if kind == Kind::V6 {
            put(interfaces + 67, &[HAS_PROTOCOL]);
        }
    }
    put(kind.sizes(), &size(target));
    put(kind.sizes() + 2, &size(target + VERDICT));
    if let Some(port) = port {
        put(kind.head(), &size(PORTS));
        put(kind.head() + 2, if protocol == Some(TCP) { b"tcp" } else { b"udp" });
        // From any port, to this one: `struct xt_tcp` and `struct xt_udp` start alike.
        for (at, end) in [0, u16::MAX, port, port].into_iter().enumerate() {
            put(kind.head() + PART + 2 * at, &end.to_ne_bytes());
        }
    }
    put(target, &size(VERDICT));
    put(target + PART, &ACCEPT.to_ne_bytes());
    bytes
}

/// Returns the rules that accept packets of VMs in a hook's chain: the same as [`crate::nft::rules::openings`].
fn openings(kind: Kind, hook: FirewallHook, bridge: &str) -> Vec<Vec<u8>> {
    let accepted = |is_from, protocol, port| rule(kind, bridge, Accepted { is_from, protocol, port });
    match hook {
        FirewallHook::Forward => vec![accepted(true, None, None), accepted(false, None, None)],
        FirewallHook::Input => {
            let icmp = if kind == Kind::V4 { ICMP } else { ICMPV6 };
            let ask = |protocol| accepted(true, Some(protocol), Some(DNS));
            vec![ask(UDP), ask(TCP), accepted(true, Some(icmp), None)]
        }
    }
}

#[cfg(test)]
mod tests;
