//! The resolver on the gateway's addresses: it answers VMs' names itself, and forwards other names that the VM's policy allows to the host's
//! servers.
//!
//! ```text
//! VM ─ query ─ the VM is known by its address, which the guard has checked
//!      NAME.nexus.internal      answered from the list of VMs, if both have a common group
//!      else: is the name allowed?    no: REFUSED, with the reason as an extended error
//!            ask upstream, and check each address of the answer
//!            with an allow list of names: pin the addresses for the VM, then answer
//! ```
//! [`answer`] decides and asks, [`server`] implements DNS, [`upstream`] finds the servers to ask.

mod answer;
mod server;
pub(crate) mod upstream;

use std::net::{IpAddr, SocketAddr};

use nexus_net_wire::Dns;

pub(crate) use server::serve;

/// The addresses that the resolver listens on, and the servers that it asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) gateways: Vec<IpAddr>,
    pub(crate) dns: Dns,
    /// A server that asks those of the host, if they cannot all be reached from here.
    pub(crate) relay: Option<SocketAddr>,
}
