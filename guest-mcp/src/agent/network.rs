//! Network interfaces over netlink (rtnetlink(7)): found by their MAC address, given an address, a route and brought up.

use std::io;
use std::net::IpAddr;

use nexus_schema::link::Interface;
use rustix::fd::OwnedFd;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

// linux/netlink.h and linux/rtnetlink.h
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// Gives one interface what the host wants it to have.
pub(super) fn bring_up(interface: &Interface) -> io::Result<()> {
    let refuse = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    let index = index_of_mac(&interface.mac)?;
    let (address, prefix) = parse_address(&interface.address)
        .ok_or_else(|| refuse(format!("`{}` is not an address with a prefix length", interface.address)))?;
    let mut netlink = Netlink::open()?;
    netlink.set_up(index, interface.mtu)?;
    netlink.add_address(index, address, prefix)?;
    match interface.gateway {
        Some(gateway) => netlink.add_default_route(index, gateway),
        None => Ok(()),
    }
}

/// Brings up the interface `lo`.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    Netlink::open()?.set_up(1, None)
}

fn index_of_mac(mac: &str) -> io::Result<u32> {
    for entry in std::fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        let Ok(address) = std::fs::read_to_string(path.join("address")) else { continue };
        if address.trim().eq_ignore_ascii_case(mac) {
            let index = std::fs::read_to_string(path.join("ifindex"))?;
            return index.trim().parse().map_err(io::Error::other);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "no interface has this address"))
}

fn parse_address(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let prefix = prefix.parse().ok()?;
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A message under construction.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes }
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        // Attributes here are at most 16 bytes long.
        let length = 4 + value.len() as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket })
    }

    /// Sends a request and waits for its acknowledgement, which the kernel gives at once.
    fn request(&mut self, message: Message) -> io::Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &message.finish(), SendFlags::empty(), &kernel)?;
        let mut answer = [0; 4096];
        let (length, _) = rustix::net::recv(&self.socket, &mut answer, RecvFlags::empty())?;
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let answer = answer.get(..length).ok_or_else(malformed)?;
        let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
        let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
        match (kind, code) {
            (Some(NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
            _ => Err(malformed()),
        }
    }

    fn set_up(&mut self, index: u32, mtu: Option<u32>) -> io::Result<()> {
        // struct ifinfomsg
        let mut fixed = vec![AF_UNSPEC, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&IFF_UP.to_ne_bytes());
        fixed.extend_from_slice(&IFF_UP.to_ne_bytes());
        let mut message = Message::new(RTM_NEWLINK, 0, &fixed);
        if let Some(mtu) = mtu {
            message = message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.request(message)
    }

    fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg
        let mut fixed = vec![family(address), prefix, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(IFA_LOCAL, &octets(address))
            .attribute(IFA_ADDRESS, &octets(address));
        self.request(message)
    }

    fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        // struct rtmsg: to everywhere, scope universe
        let mut fixed = vec![family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST];
        fixed.extend_from_slice(&0_u32.to_ne_bytes());
        let message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(RTA_GATEWAY, &octets(gateway))
            .attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_prefix_length() {
        assert_eq!(parse_address("10.90.0.2/24"), Some((IpAddr::from([10, 90, 0, 2]), 24)));
        assert!(parse_address("fd00::2/64").is_some());
        for bad in ["10.0.0.1", "10.0.0.1/33", "x/24", "fd00::1/129", ""] {
            assert_eq!(parse_address(bad), None, "{bad}");
        }
    }

    #[test]
    fn attributes_are_padded_and_the_length_is_set() {
        let bytes = Message::new(RTM_NEWLINK, 0, &[0; 16]).attribute(IFLA_MTU, &[1, 2, 3]).finish();
        assert_eq!(bytes.len(), 16 + 16 + 8);
        assert_eq!(bytes[0..4], 40_u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 7_u16.to_ne_bytes());
    }
}
