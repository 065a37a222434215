//! The network that VMs in mode `nat` share: its addresses, and the process `nexus-net` that maintains it.
//!
//! ```text
//! nexusd ── nat: requests, one at a time ──┬── net.sock ── nexus-net ── bridge, TAPs, nftables, resolver
//!        <─ watch: refusals ───────────────┘                 │
//!                                       survives the daemon; if it ends, it is restarted and configured again
//! ```
//! The daemon describes the desired state and has no privileges to change the host's network itself. [`Nat`] knows which VMs should be
//! attached, so that a new `nexus-net` gets the same state as one that was killed. [`addresses`](Addresses) are pure. Nothing here knows
//! about the store, the guests or the meaning of a refusal.

mod addresses;
mod nat;
mod process;
mod search;

pub(crate) use addresses::{Addresses, choose, host_routes, parse_subnet};
pub(crate) use nat::{Nat, NatError};
pub(crate) use nexus_net_wire::{Denial, Dns, Event, Instance, Protocol, Vm};
pub(crate) use search::{SEARCH_MAX, host_search};
