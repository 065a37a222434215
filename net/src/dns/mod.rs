//! The resolver on the gateway's addresses: VMs' names, and the host's upstream within what each VM's policy allows.
//!
//! ```text
//! VM ─ query ─ who asks (by address; the guard vouches for it)
//!      NAME.nexus.internal      answered from the VMs, where a group has both
//!      else: may the name be asked for?    no: REFUSED, and why as an extended error
//!            upstream, and each address of the answer decided
//!            where names are listed: the addresses are pinned for the VM, then it is answered
//! ```
//! [`answer`] decides and asks, [`server`] speaks DNS, [`upstream`] finds the servers to ask.

mod answer;
mod server;
pub(crate) mod upstream;

use std::net::IpAddr;

use nexus_net_wire::Dns;

pub(crate) use server::serve;

/// Where the resolver listens, and whom it asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) gateways: Vec<IpAddr>,
    pub(crate) dns: Dns,
}
