//! Which addresses are this host's own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use nexus_net_policy::inner;
use rustix::io::Errno;

/// Whether an address, or the one that it has in it, is one of this host's own. Nothing is sent.
pub(super) fn is_own(address: IpAddr) -> bool {
    [address.to_canonical(), inner(address)]
        .into_iter()
        .any(|address| is_source(address) || is_local(address))
}

/// Whether the kernel would send to it from the very address.
fn is_source(address: IpAddr) -> bool {
    let unspecified = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = match UdpSocket::bind((unspecified, 0)) {
        Ok(socket) => socket,
        // A host without this family has no such address; whatever else keeps it from being asked is no leave.
        Err(error) => return error.raw_os_error() != Some(Errno::AFNOSUPPORT.raw_os_error()),
    };
    // Where there is no way there, there is none for a connection either.
    let source = socket.connect((address, 9)).and_then(|()| socket.local_addr());
    source.is_ok_and(|source| source.ip() == address)
}

/// Whether something can listen at it. A second address of an interface is no source for itself, and is found so.
fn is_local(address: IpAddr) -> bool {
    // Of no machine; a host that lets programs listen anywhere lets them listen there, and says nothing by it.
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
        assert!(is_own("127.0.0.2".parse().unwrap()), "it is no source for itself");
        assert!(is_own("::ffff:127.0.0.1".parse().unwrap()));
        assert!(is_own("64:ff9b::7f00:1".parse().unwrap()));
        assert!(!is_own("192.0.2.77".parse().unwrap()));
    }
}
