//! The proxy in the guest: programs ask it for connections to other machines, and the host makes them.
//!
//! ```text
//! program ── 127.0.0.1:3128 ── http: CONNECT, or a request for a whole address ─┐
//!                           ── socks: SOCKS5 with names                        ─┴─ host ── host's vsock port 1025
//! ```
//! It resolves nothing and decides nothing: the host does. It remembers what the host refused, so that the results of commands can say it;
//! in a VM with an interface, that is what the host tells of it.

mod host;
mod http;
mod refused;
mod serve;
mod socks;
mod trouble;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nexus_schema::link::{ProxyParams, RefusedParams};
use tokio::net::TcpListener;

pub(crate) use refused::Refused;
pub(crate) use trouble::{Counted, hear_of_refusals};

use crate::agent::{Agent, bring_up_loopback};
use crate::console::say;
use crate::os::reason;

/// Where it listens in a VM, if nothing else does.
const PORT: u16 = 3128;

/// The proxy of one agent.
#[derive(Debug, Default)]
pub(crate) struct Proxy {
    /// Whether programs are told of it.
    is_enabled: AtomicBool,
    /// Where it listens, since it was enabled first.
    port: OnceLock<u16>,
    /// Whether the VM has an interface, whose connections the host's firewall refuses.
    has_interface: AtomicBool,
    /// What the host refused.
    pub(crate) refused: Refused,
}

impl Proxy {
    /// Whether programs are told of it.
    pub(crate) fn is_enabled(&self) -> bool {
        self.is_enabled.load(Ordering::Acquire)
    }

    /// The VM has an interface, or it has none.
    pub(crate) fn set_interface(&self, is_there: bool) {
        self.has_interface.store(is_there, Ordering::Release);
    }

    /// What the kernel counted of its connections so far, if it has an interface.
    pub(crate) fn counted(&self) -> Option<Counted> {
        self.has_interface.load(Ordering::Acquire).then(Counted::now)
    }

    /// The host tells what it refused at the interface.
    pub(crate) fn hear(&self, params: RefusedParams) {
        params.connections.into_iter().for_each(|refusal| self.refused.heard(refusal));
    }

    /// What programs find in their environment.
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

/// Does what the host says of the network. What cannot be done is said in words.
pub(crate) async fn apply(agent: &Arc<Agent>, params: ProxyParams) -> Option<String> {
    let proxy = &agent.proxy;
    if params.enabled && proxy.port.get().is_none() {
        match listen(agent).await {
            Ok((listener, port)) => {
                // Whoever was faster listens; this one goes.
                if proxy.port.set(port).is_ok() {
                    tokio::spawn(serve::accept(agent.clone(), listener));
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
            // A proxy of the image's own has that port.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => TcpListener::bind(at(0)).await?,
            bound => bound?,
        }
    } else {
        // On a host there may be many.
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
