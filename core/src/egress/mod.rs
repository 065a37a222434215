//! Connections that guests make to other machines: by the host, within what each VM's policy allows.
//!
//! ```text
//! program ── 127.0.0.1:3128 in the guest ── agent ── host's vsock port 1025 ── nexusd ── the other machine
//!                                                     opening, answer, frames    │
//!                                                       policy: name, then each address; only then is anything dialled
//! ```
//! What is refused at a VM's own interface is noted here, too. `nexus-net-policy` decides, without any IO; [`Egress`] is one VM's policy and
//! what was counted of it, which lasts as long as the daemon;
//! [`EgressServer`] serves the guest of one boot, and ends its connections when it is dropped. Guests are hostile: the length of an
//! opening, the number of connections and of names that are looked up at once, and the bytes that wait are bounded, and nothing is
//! looked up or dialled before the policy has allowed it.

mod connection;
mod counted;
mod dial;
mod log;
mod own;
mod policy;
mod server;
mod state;

pub(crate) use log::read as read_log;
pub(crate) use policy::{merge, starting};
pub(crate) use server::EgressServer;
pub(crate) use state::{Egress, Egresses};
