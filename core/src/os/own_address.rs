//! Detects this host's own addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use nexus_net_policy::inner;
use rustix::io::Errno;

/// Returns whether an address, or the IPv4 address that is embedded in it, is one of this host's own. Sends nothing.
pub(crate) fn is_own(address: IpAddr) -> bool {
    let is_ours = |address| is_source(address) || is_local(address);
    let (canonical, inner) = (address.to_canonical(), inner(address));
    is_ours(canonical) || (inner != canonical && is_ours(inner))
}

/// Returns whether the kernel would use the address itself as the source of packets to it.
fn is_source(address: IpAddr) -> bool {
    let unspecified = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = match UdpSocket::bind((unspecified, 0)) {
        Ok(socket) => socket,
        // A host without this address family has no such address. After any other error the address counts as its own, to be safe.
        Err(error) => return error.raw_os_error() != Some(Errno::AFNOSUPPORT.raw_os_error()),
    };
    // An error means that there is no route, and so no connection is possible.
    let source = socket.connect((address, 9)).and_then(|()| socket.local_addr());
    source.is_ok_and(|source| source.ip() == address)
}

/// Returns whether a program can listen on it. This finds secondary addresses of an interface, which the kernel does not use as sources.
fn is_local(address: IpAddr) -> bool {
    // An address of no machine. If the host lets programs listen even on this one (non-local binds), a successful bind proves nothing.
    let nobodys = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(240, 0, 0, 1)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1)),
    };
    UdpSocket::bind((address, 0)).is_ok() && UdpSocket::bind((nobodys, 0)).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_this_hosts_own() {
        assert!(is_own(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        assert!(is_own("127.0.0.2".parse().unwrap()), "the kernel does not use it as its own source");
        assert!(is_own("::ffff:127.0.0.1".parse().unwrap()));
        assert!(is_own("64:ff9b::7f00:1".parse().unwrap()));
        assert!(!is_own("192.0.2.77".parse().unwrap()));
    }
}
