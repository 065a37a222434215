//! Finds the host's DNS servers.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use nexus_net_wire::Dns;

const PORT: u16 = 53;
/// The host's configuration, and the file with the servers that systemd-resolved asks.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const SYSTEMD_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// The addresses of systemd-resolved's stub server.
const STUBS: [&str; 2] = ["127.0.0.53", "127.0.0.54"];

/// Returns the servers to ask, in order. Those of the host are behind `relay` if this is not the host's network namespace: it comes first, and
/// only those of other machines follow.
pub(crate) fn servers(dns: &Dns, relay: Option<SocketAddr>) -> Vec<SocketAddr> {
    match dns {
        Dns::Servers(servers) => servers.clone(),
        Dns::FromHost => {
            let read = |path: &str| std::fs::read_to_string(Path::new(path)).unwrap_or_default();
            let of_host = of_host(&read(RESOLV_CONF), || read(SYSTEMD_RESOLVED));
            relayed(of_host, relay)
        }
    }
}

/// Returns the servers in a `resolv.conf`. systemd-resolved's stub server comes first, since it knows about links and domains. The servers that
/// it asks follow, in case it does not answer.
fn of_host(text: &str, behind_stub: impl Fn() -> String) -> Vec<SocketAddr> {
    let mut servers = nameservers(text);
    let is_stub = |server: &IpAddr| STUBS.iter().any(|stub| server.to_string() == *stub);
    if servers.iter().any(is_stub) {
        servers.extend(nameservers(&behind_stub()));
    }
    let mut seen = Vec::new();
    for server in servers {
        let server = SocketAddr::new(server, PORT);
        if !seen.contains(&server) {
            seen.push(server);
        }
    }
    seen
}

fn relayed(servers: Vec<SocketAddr>, relay: Option<SocketAddr>) -> Vec<SocketAddr> {
    let is_reachable = |server: &SocketAddr| relay.is_none() || !server.ip().is_loopback();
    relay.into_iter().chain(servers.into_iter().filter(is_reachable)).collect()
}

fn nameservers(text: &str) -> Vec<IpAddr> {
    let lines = text.lines().map(|line| line.split(['#', ';']).next().unwrap_or_default());
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        let address = words.next().filter(|_| is_server)?;
        // A scope (%eth0) is dropped: a socket address needs its number instead.
        address.split('%').next()?.parse().ok()
    };
    lines.filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, behind: &str) -> Vec<String> {
        of_host(text, || behind.to_owned()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn servers_are_those_of_the_host() {
        let plain = "# by hand\nsearch example\nnameserver 192.0.2.1 ; first\nnameserver 2001:db8::1\noptions edns0\n";
        assert_eq!(shown(plain, "nameserver 192.0.2.9"), ["192.0.2.1:53", "[2001:db8::1]:53"]);
        assert_eq!(
            shown("nameserver 127.0.0.53\n", "nameserver 192.0.2.9\nnameserver 192.0.2.9\n"),
            ["127.0.0.53:53", "192.0.2.9:53"]
        );
        assert!(shown("", "nameserver 192.0.2.9").is_empty());
        assert!(shown("nameserver\nnameserver x\nnameserv 192.0.2.1", "").is_empty());
    }

    #[test]
    fn given_servers_are_asked_and_no_others() {
        let servers: Vec<SocketAddr> = vec!["192.0.2.53:5353".parse().unwrap()];
        for relay in [None, Some(servers[0])] {
            assert_eq!(super::servers(&Dns::Servers(servers.clone()), relay), servers);
        }
    }

    #[test]
    fn servers_on_the_hosts_loopback_are_asked_through_the_relay() {
        let [relay, stub, other] =
            ["240.0.2.3:53", "127.0.0.53:53", "192.0.2.1:53"].map(|text| text.parse().unwrap());
        assert_eq!(relayed(vec![stub, other], Some(relay)), [relay, other]);
        assert_eq!(relayed(vec![stub, other], None), [stub, other]);
    }
}
