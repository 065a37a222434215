//! The firewall: two tables per instance. `bridge` checks the sender, and `inet` the destination.
//!
//! ```text
//! TAP ─ bridge prerouting ─ guard: own MAC and addresses only ─ mark = 0x4e000000 | ifindex of the TAP
//!                             │
//!         inet input ─────────┼───────── inet forward ── out: masquerade
//!         to_host             │          from_vm, to_vm; others only if the host forwarded before
//!           gateway: DNS, ping│            to the bridge again: peer, by groups
//!                             decide: allow (addresses), pin (answers of the resolver), else refuse
//!                             begin: limits of the rate and the number of connections
//! ```
//! Entries of a policy that are for one protocol only are elements whose mark has bits of that protocol ([`bits_of`]), which are looked up besides.
//! A connection has the mark of the VM that opened it, and only packets of that VM and its peers pass as part of it.
//! The rules are the same for all VMs; what differs is in sets, by mark. So a new VM only adds elements, and its policy is a set of ranges that
//! [`nexus_net_policy::allowed_cells`] computes. [`rules`] defines the tables, and [`elements`] the elements of their sets. [`plan`] compares
//! both with the kernel's state; [`encode`] (libnftnl) and [`socket`] (libmnl) apply the changes.

pub(crate) mod elements;
pub(crate) mod encode;
pub(crate) mod expr;
pub(crate) mod plan;
pub(crate) mod read;
pub(crate) mod rules;
pub(crate) mod sets;
pub(crate) mod socket;

use std::collections::{BTreeMap, BTreeSet};

use nexus_net_policy::Protocols;
use nexus_schema::network::RuleProtocol;

pub(crate) use expr::Expr;

/// Prefix of the marks of VMs' packets and connections.
pub(crate) const MARK_TAG: u32 = 0x4e00_0000;
/// Bit mask of the interface index in a mark.
pub(crate) const MARK_INDEX: u32 = 0x00ff_ffff;
/// Bit in the mark of a connection that is no longer allowed.
pub(crate) const MARK_CUT: u32 = 0x8000_0000;

/// Mark of connections that the host opens to VMs: that of no interface.
pub(crate) const MARK_HOST: u32 = MARK_TAG;
/// Prefix of the names of all instances' bridges.
pub(crate) const BRIDGE_PREFIX: &str = "nxb";

/// Returns the mark of packets from a TAP; `None` if the interface index does not fit.
pub(crate) const fn mark(index: u32) -> Option<u32> {
    if index == 0 || index > MARK_INDEX { None } else { Some(MARK_TAG | index) }
}

/// Returns the bits by which a key's mark differs from that of the VM, where an element is for one protocol only.
pub(crate) const fn bits_of(protocols: Protocols) -> u32 {
    match protocols {
        Protocols::All => 0,
        Protocols::Only(RuleProtocol::Tcp) => 0x0100_0000,
        Protocols::Only(RuleProtocol::Udp) => 0x0200_0000,
        Protocols::Only(RuleProtocol::Icmp) => 0x0300_0000,
    }
}

/// The families of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    Inet,
    Bridge,
    /// Only of other programs' tables.
    Ip,
    Ip6,
}

impl Family {
    /// `NFPROTO_INET`, `NFPROTO_BRIDGE`, `NFPROTO_IPV4` and `NFPROTO_IPV6`.
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Bridge => 7,
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }

    /// Its name for `nft`.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        }
    }
}

/// A complete table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) family: Family,
    pub(crate) name: String,
    pub(crate) sets: Vec<Set>,
    pub(crate) chains: Vec<Chain>,
}

/// The definition of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Set {
    pub(crate) name: &'static str,
    /// The types of a key's parts.
    pub(crate) key: &'static [KeyPart],
    /// Whether its elements are ranges.
    pub(crate) is_interval: bool,
    /// Whether its elements expire. Only the resolver and rules add elements to such sets.
    pub(crate) has_timeout: bool,
    /// Whether rules add elements; then nothing else does.
    pub(crate) is_dynamic: bool,
    /// Whether each element counts the packets that match it.
    pub(crate) has_counters: bool,
    /// Whether each element has its own rate, and matches only packets that exceed it.
    pub(crate) has_rates: bool,
}

/// A part of a set's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyPart {
    Mark,
    Index,
    Mac,
    V4,
    V6,
    Port,
    Protocol,
}

impl KeyPart {
    /// Returns the number of nft's type, which only `nft list` uses.
    pub(crate) const fn kind(self) -> u32 {
        match self {
            Self::V4 => 7,
            Self::V6 => 8,
            Self::Mac => 9,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::Mark => 19,
            Self::Index => 20,
        }
    }

    /// Returns whether the kernel stores it in the host's byte order.
    pub(crate) const fn is_in_host_order(self) -> bool {
        matches!(self, Self::Mark | Self::Index)
    }

    /// Returns its length, in bytes.
    pub(crate) const fn length(self) -> usize {
        match self {
            Self::Protocol => 1,
            Self::Port => 2,
            Self::V4 | Self::Mark | Self::Index => 4,
            Self::Mac => 6,
            Self::V6 => 16,
        }
    }
}

impl Set {
    /// Returns the length of a key, in bytes. Each part of a key with several parts is padded to registers.
    pub(crate) fn key_length(&self) -> usize {
        if let [part] = self.key {
            return part.length();
        }
        self.key.iter().map(|part| part.length().next_multiple_of(4)).sum()
    }
}

/// An element's key, and in sets of ranges the key of the range's end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    pub(crate) end: Option<Vec<u8>>,
    /// Bytes per second, in sets with rates.
    pub(crate) rate: Option<u64>,
}

/// A complete chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: &'static str,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Vec<Expr>>,
}

/// A hook that sends packets to a chain. All of these chains accept packets that no rule decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    pub(crate) at: HookAt,
    pub(crate) priority: i32,
    pub(crate) is_nat: bool,
}

/// The places of hooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookAt {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// The desired elements of the planned sets, by table and set.
pub(crate) type Contents = BTreeMap<(Family, &'static str), BTreeSet<Element>>;

/// Returns a rule's comment: its position, and a digest of its expressions. A rule that another program added or changed has a different one.
pub(crate) fn tag(chain: &str, at: usize, rule: &[Expr]) -> String {
    // FNV-1a: no cryptographic hash is needed, since a program that can write rules can write comments as well.
    let text = format!("{chain} {at} {rule:?}");
    let digest = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{chain} {at} {digest:016x}")
}
