//! The proxy in the guest: programs request connections to other machines, and the host makes them.
//!
//! ```text
//! program ── 127.0.0.1:3128 ── http: CONNECT, or a request with an absolute URL ─┐
//!                           ── socks: SOCKS5 with names                         ─┴─ host ── host's port 1025
//! ```
//! While programs make connections, one to the host is kept for the next of them (`spare`).
//!
//! It resolves no names and makes no decisions: the host does. It remembers what the host refused, so that the results of commands can show it. In a
//! VM with an interface, the host reports what its firewall refused.

mod host;
mod http;
mod refused;
mod serve;
mod socks;
mod spare;
mod trouble;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nexus_schema::link::{ProxyParams, RefusedParams};
use tokio::net::TcpListener;

pub(crate) use refused::Refused;
use spare::Spare;
pub(crate) use trouble::{Counted, hear_of_refusals};

use crate::agent::{Agent, bring_up_loopback};
use crate::console::say;
use crate::os::reason;

/// The port that it listens on in a VM, unless that is taken.
const PORT: u16 = 3128;

/// The proxy of one agent.
#[derive(Debug, Default)]
pub(crate) struct Proxy {
    /// Whether commands get the proxy variables.
    is_enabled: AtomicBool,
    /// The port that it listens on, once it was enabled.
    port: OnceLock<u16>,
    /// Whether the VM has an interface, whose connections the host's firewall may refuse.
    has_interface: AtomicBool,
    /// The connections that the host refused.
    pub(crate) refused: Refused,
    /// A connection for the next program.
    spare: Spare,
}

impl Proxy {
    /// Returns whether commands get the proxy variables.
    pub(crate) fn is_enabled(&self) -> bool {
        self.is_enabled.load(Ordering::Acquire)
    }

    /// Sets whether the VM has an interface.
    pub(crate) fn set_interface(&self, is_there: bool) {
        self.has_interface.store(is_there, Ordering::Release);
    }

    /// Returns the kernel's counters of connections so far, if the VM has an interface.
    pub(crate) fn counted(&self) -> Option<Counted> {
        self.has_interface.load(Ordering::Acquire).then(Counted::now)
    }

    /// Records what the host's firewall refused at the interface.
    pub(crate) fn hear(&self, params: RefusedParams) {
        params.connections.into_iter().for_each(|refusal| self.refused.heard(refusal));
    }

    /// Returns the environment variables for programs.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let port = self.port.get().filter(|_| self.is_enabled());
        port.map(|port| environment(*port)).unwrap_or_default()
    }
}

fn environment(port: u16) -> BTreeMap<String, String> {
    let http = format!("http://127.0.0.1:{port}");
    let socks = format!("socks5h://127.0.0.1:{port}");
    let but = "localhost,127.0.0.1,::1,*.nexus.internal".to_owned();
    let mut variables = BTreeMap::from([("NODE_USE_ENV_PROXY".to_owned(), "1".to_owned())]);
    for (name, value) in
        [("http_proxy", &http), ("https_proxy", &http), ("all_proxy", &socks), ("no_proxy", &but)]
    {
        variables.insert(name.to_uppercase(), value.clone());
        variables.insert(name.to_owned(), value.clone());
    }
    variables
}

/// Applies the host's proxy settings; returns any failure as a message.
pub(crate) async fn apply(agent: &Arc<Agent>, params: ProxyParams) -> Option<String> {
    let proxy = &agent.proxy;
    if params.enabled && proxy.port.get().is_none() {
        match listen(agent).await {
            Ok((listener, port)) => {
                // If another call was faster, its listener stays and this one is closed.
                if proxy.port.set(port).is_ok() {
                    tokio::spawn(serve::accept(agent.clone(), listener));
                    tokio::spawn(spare::keep(agent.clone()));
                }
            }
            Err(error) => {
                say(format_args!("the proxy cannot listen: {error}"));
                return Some(format!("start the proxy on 127.0.0.1: {}", reason(&error)));
            }
        }
    }
    proxy.is_enabled.store(params.enabled, Ordering::Release);
    None
}

async fn listen(agent: &Agent) -> io::Result<(TcpListener, u16)> {
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = if agent.is_in_vm() {
        if let Err(error) = bring_up_loopback() {
            say(format_args!("bring up the loopback interface: {error}"));
        }
        match TcpListener::bind(at(PORT)).await {
            // The image has its own proxy on that port.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => TcpListener::bind(at(0)).await?,
            bound => bound?,
        }
    } else {
        // On a host there may be several agents.
        TcpListener::bind(at(0)).await?
    };
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_find_it_whatever_case_they_look_for() {
        let variables = environment(3128);
        for (name, value) in [
            ("http_proxy", "http://127.0.0.1:3128"),
            ("HTTPS_PROXY", "http://127.0.0.1:3128"),
            ("all_proxy", "socks5h://127.0.0.1:3128"),
            ("NO_PROXY", "localhost,127.0.0.1,::1,*.nexus.internal"),
            ("NODE_USE_ENV_PROXY", "1"),
        ] {
            assert_eq!(variables[name], value);
        }
        assert_eq!(variables.len(), 9);
        assert_eq!(Proxy::default().environment(), BTreeMap::new());
    }
}
