//! The few messages of rtnetlink(7) that configure an interface: list links, bring them up, add addresses and routes.

use std::io;
use std::net::IpAddr;

use rustix::fd::OwnedFd;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(super) const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
/// No duplicate address detection: the address is usable at once.
const IFA_F_NODAD: u8 = 0x02;
const RT_TABLE_MAIN: u8 = 254;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// The length of a message's header, in bytes.
const HEADER: usize = 16;
/// The length of `struct ifinfomsg`, in bytes.
const LINK: usize = 16;
/// The length of `struct ifaddrmsg`, in bytes.
const ADDRESS: usize = 8;
/// The buffer size for the kernel's answers, in bytes: the largest that it sends.
const ANSWER_MAX: usize = 32 << 10;

/// An interface, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) address: Vec<u8>,
}

/// A message under construction.
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes }
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        // Attributes are only a few bytes long here.
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

/// A netlink socket.
pub(super) struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket })
    }

    fn send(&self, message: Message) -> io::Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &message.finish(), SendFlags::empty(), &kernel)?;
        Ok(())
    }

    fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.resize(ANSWER_MAX, 0);
        let (length, _) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
        buffer.truncate(length);
        Ok(())
    }

    /// Sends a request and waits for its acknowledgement, which the kernel sends at once.
    pub(super) fn request(&self, mut message: Message) -> io::Result<()> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | u16::from_ne_bytes([message.bytes[6], message.bytes[7]]);
        message.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.send(message)?;
        let mut answer = Vec::new();
        self.receive(&mut answer)?;
        match messages(&answer).next() {
            Some((NLMSG_ERROR, body)) => error_of(body),
            _ => Err(malformed()),
        }
    }

    /// Returns all interfaces.
    pub(super) fn links(&self) -> io::Result<Vec<Link>> {
        self.send(Message::new(RTM_GETLINK, NLM_F_DUMP, &[0; LINK]))?;
        let (mut links, mut answer) = (Vec::new(), Vec::new());
        loop {
            self.receive(&mut answer)?;
            for (kind, body) in messages(&answer) {
                match kind {
                    RTM_NEWLINK => links.extend(link(body)),
                    NLMSG_DONE => return Ok(links),
                    NLMSG_ERROR => error_of(body)?,
                    _ => {}
                }
            }
        }
    }

    pub(super) fn set_up(&self, index: u32, mtu: Option<u32>) -> io::Result<()> {
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

    /// Gives an interface another hardware address. It may not be up.
    pub(super) fn set_hardware_address(&self, index: u32, address: &[u8]) -> io::Result<()> {
        // struct ifinfomsg, without a change of flags
        let mut fixed = vec![AF_UNSPEC, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&[0; 8]);
        self.request(Message::new(RTM_NEWLINK, 0, &fixed).attribute(IFLA_ADDRESS, address))
    }

    /// Sets how much of a TCP connection over IPv4 passes through an interface in one piece, in bytes. Kernels before Linux 6.3 ignore it.
    pub(super) fn set_largest_piece(&self, index: u32, bytes: u32) -> io::Result<()> {
        // struct ifinfomsg, without a change of flags
        let mut fixed = vec![AF_UNSPEC, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&[0; 8]);
        let message = Message::new(RTM_NEWLINK, 0, &fixed);
        self.request(message.attribute(IFLA_GSO_IPV4_MAX_SIZE, &bytes.to_ne_bytes()))
    }

    pub(super) fn set_down(&self, index: u32) -> io::Result<()> {
        let mut fixed = vec![AF_UNSPEC, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&0_u32.to_ne_bytes());
        fixed.extend_from_slice(&IFF_UP.to_ne_bytes());
        self.request(Message::new(RTM_NEWLINK, 0, &fixed))
    }

    /// Removes all addresses of an interface, and so the routes through it.
    pub(super) fn remove_addresses(&self, index: u32) -> io::Result<()> {
        self.send(Message::new(RTM_GETADDR, NLM_F_DUMP, &[0; ADDRESS]))?;
        let (mut found, mut answer, mut is_done) = (Vec::new(), Vec::new(), false);
        while !is_done {
            self.receive(&mut answer)?;
            for (kind, body) in messages(&answer) {
                match kind {
                    RTM_NEWADDR if u32_at(body, 4) == Some(index) => found.push(body.to_vec()),
                    NLMSG_DONE => is_done = true,
                    NLMSG_ERROR => error_of(body)?,
                    _ => {}
                }
            }
        }
        for body in found {
            let (Some(fixed), Some(rest)) = (body.get(..ADDRESS), body.get(ADDRESS..)) else { continue };
            let local = [IFA_LOCAL, IFA_ADDRESS].into_iter().find_map(|wanted| {
                attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, value)| value.to_vec())
            });
            let Some(local) = local else { continue };
            match self.request(Message::new(RTM_DELADDR, 0, fixed).attribute(IFA_LOCAL, &local)) {
                // It went with another one.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    pub(super) fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg
        let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
        let mut fixed = vec![family(address), prefix, flags, RT_SCOPE_UNIVERSE];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(IFA_LOCAL, &octets(address))
            .attribute(IFA_ADDRESS, &octets(address));
        self.request(message)
    }

    /// Adds a route that says that an address is on the interface itself, whatever its network is.
    pub(super) fn add_host_route(&self, index: u32, to: IpAddr) -> io::Result<()> {
        let prefix = if to.is_ipv4() { 32 } else { 128 };
        let message = route(to, prefix, RT_SCOPE_LINK)
            .attribute(RTA_DST, &octets(to))
            .attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }

    pub(super) fn add_default_route(&self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let message = route(gateway, 0, RT_SCOPE_UNIVERSE)
            .attribute(RTA_GATEWAY, &octets(gateway))
            .attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }
}

fn route(of: IpAddr, prefix: u8, scope: u8) -> Message {
    // struct rtmsg
    let mut fixed = vec![family(of), prefix, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST];
    fixed.extend_from_slice(&0_u32.to_ne_bytes());
    Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
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

fn malformed() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidData)
}

/// Returns the outcome of an acknowledgement.
fn error_of(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(malformed()),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// Returns the messages of an answer: kind and body.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let (kind, body) = (u16_at(rest, 4)?, rest.get(HEADER..length)?);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Returns the attributes of a message: kind and value.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let (kind, value) = (u16_at(rest, 2)?, rest.get(4..length)?);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn link(body: &[u8]) -> Option<Link> {
    let mut link = Link { index: u32_at(body, 4)?, name: String::new(), address: Vec::new() };
    for (kind, value) in attributes(body.get(LINK..)?) {
        match kind {
            IFLA_IFNAME => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            IFLA_ADDRESS => link.address = value.to_vec(),
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_the_length_is_set() {
        let bytes = Message::new(RTM_NEWLINK, 0, &[0; 16]).attribute(IFLA_MTU, &[1, 2, 3]).finish();
        assert_eq!(bytes.len(), 16 + 16 + 8);
        assert_eq!(bytes[0..4], 40_u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 7_u16.to_ne_bytes());
        let (kind, body) = messages(&bytes).next().unwrap();
        assert_eq!(kind, RTM_NEWLINK);
        assert_eq!(attributes(&body[LINK..]).collect::<Vec<_>>(), [(IFLA_MTU, &[1, 2, 3][..])]);
    }

    #[test]
    fn what_is_cut_off_is_not_read_past_its_end() {
        let whole = Message::new(RTM_NEWLINK, 0, &[0; 16]).attribute(IFLA_IFNAME, b"eth0\0").finish();
        assert_eq!(messages(&whole).filter_map(|(_, body)| link(body)).next().unwrap().name, "eth0");
        for length in 0..whole.len() {
            assert!(messages(&whole[..length]).next().is_none(), "{length}");
        }
        assert!(error_of(&[]).is_err());
        assert_eq!(error_of(&(-17_i32).to_ne_bytes()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
