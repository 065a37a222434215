//! The network that VMs in mode `nat` share: its addresses, and the process `nexus-net` that keeps it.
//!
//! ```text
//! nexusd ── nat: requests, one at a time ──┬── net.sock ── nexus-net ── bridge, TAPs, nftables, resolver
//!        <─ watch: what was refused ───────┘                 │
//!                                       survives the daemon; one that is gone is started again and told all anew
//! ```
//! The daemon says what is to be and has no right to change the host's network itself. [`Nat`] knows which VMs are to be attached, so
//! that a `nexus-net` that was killed is followed by one that has the same; [`addresses`](Addresses) are pure. Nothing here knows of the
//! store, of the guests or of what a refusal means.

mod addresses;
mod nat;
mod process;

pub(crate) use addresses::{Addresses, choose, host_routes, parse_subnet};
pub(crate) use nat::{Nat, NatError};
pub(crate) use nexus_net_wire::{Denial, Dns, Event, Instance, Protocol, Vm};
