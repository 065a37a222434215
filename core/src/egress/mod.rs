//! Connections of guests to other machines. The host makes them, if the VM's policy allows them.
//!
//! ```text
//! program ── 127.0.0.1:3128 in the guest ── agent ── host's vsock port 1025 ── nexusd ── the other machine
//!                                                     opening, answer, frames    │
//!                                                       policy: checks the name, then each address, before connecting
//! ```
//! Refusals at a VM's own interface are recorded here, too. `nexus-net-policy` decides, without any IO. [`Egress`] holds one VM's policy and
//! counters; it lives as long as the daemon.
//! [`EgressServer`] serves the guest of one boot, and ends its connections when it is dropped. Guests are hostile: the length of an
//! opening, the number of connections and concurrent lookups, and the buffered bytes are limited, and nothing is
//! looked up or dialled before the policy has allowed it.

mod bucket;
mod connection;
mod counted;
mod dial;
mod log;
mod policy;
mod server;
mod state;
mod upstream;

pub(crate) use log::read as read_log;
pub(crate) use policy::{merge, starting};
pub(crate) use server::EgressServer;
pub(crate) use state::{Egress, Egresses};
pub(crate) use upstream::Upstream;
