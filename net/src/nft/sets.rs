//! Defines the sets of both tables. Pure.

use super::KeyPart::{Index, Mac, Mark, Port, Protocol, V4, V6};
use super::{KeyPart, Set};

const fn set(name: &'static str, key: &'static [KeyPart]) -> Set {
    Set {
        name,
        key,
        is_interval: false,
        has_timeout: false,
        is_dynamic: false,
        has_counters: false,
        has_rates: false,
    }
}

/// Rate limits of each VM: of logged packets, new connections, and DNS queries over TCP.
pub(crate) const LIMIT: Set = Set { has_timeout: true, is_dynamic: true, ..set("limit", &[Mark]) };
pub(crate) const BEGIN: Set = Set { name: "begin", ..LIMIT };
pub(crate) const ASK: Set = Set { name: "ask", ..LIMIT };

/// Open connections of each VM, counted by the kernel: to other machines, and to its gateway.
pub(crate) const OPEN: Set = Set { is_dynamic: true, ..set("open", &[Mark]) };
pub(crate) const ASKED: Set = Set { name: "asked", ..OPEN };

/// Sets of the bridge table: the TAPs, their VMs' addresses, counters of spoofed frames, and rate limits.
pub(crate) const BRIDGE_SETS: [Set; 7] = [
    set("taps", &[Index]),
    set("own4", &[Index, Mac, V4]),
    set("own6", &[Index, Mac, V6]),
    Set { has_counters: true, ..set("spoofed", &[Index]) },
    LIMIT,
    Set { has_rates: true, ..set("slow_tx", &[Index]) },
    Set { has_rates: true, ..set("slow_rx", &[Index]) },
];

/// Sets of the inet table: the addresses that VMs may reach, pinned addresses of names, VMs of the same groups, whose connection is whose, and
/// counters.
pub(crate) const INET_SETS: [Set; 18] = [
    Set { is_interval: true, ..set("allow4", &[Mark, V4, Port]) },
    Set { is_interval: true, ..set("allow6", &[Mark, V6, Port]) },
    PIN4,
    PIN6,
    set("peer4", &[Mark, V4]),
    set("peer6", &[Mark, V6]),
    set("ported", &[Protocol]),
    // The sender, and whose connections it may be part of.
    set("flows", &[Mark, Mark]),
    // The addresses of each VM.
    set("mine4", &[Mark, V4]),
    set("mine6", &[Mark, V6]),
    // Interfaces to other machines.
    set("outer", &[Index]),
    Set { has_counters: true, ..set("allowed", &[Mark]) },
    Set { has_counters: true, ..set("refused", &[Mark]) },
    LIMIT,
    BEGIN,
    ASK,
    OPEN,
    ASKED,
];

/// The pinned addresses of names.
pub(crate) const PIN4: Set = Set { is_interval: true, has_timeout: true, ..set("pin4", &[Mark, V4, Port]) };
pub(crate) const PIN6: Set = Set { is_interval: true, has_timeout: true, ..set("pin6", &[Mark, V6, Port]) };
