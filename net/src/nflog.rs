//! Receives the start of each refused packet, which the kernel's rules log.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nexus_net_wire::Mac;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use tokio::io::unix::AsyncFd;

use crate::netlink::{ACK, Attributes, ERROR, Writer, messages};
use crate::nft::elements::PORTED;
use crate::nft::rules::LOG_SPOOFED;
use crate::nft::socket::readable;

/// Netlink subsystem, its messages (`enum nfulnl_msg_types`) and commands.
const SUBSYSTEM: u16 = 4 << 8;
const CONFIGURE: u16 = SUBSYSTEM | 1;
const PACKET: u16 = SUBSYSTEM;
const COMMAND: u16 = 1;
const COMMAND_BIND: u8 = 1;
const MODE: u16 = 2;
const MODE_PACKET: u8 = 2;
const QUEUE_THRESHOLD: u16 = 5;
/// Attributes of packets (`enum nfulnl_attr_type`).
const HEADER: u16 = 1;
const IN_DEVICE: u16 = 4;
const IN_PORT: u16 = 6;
const PACKET_MARK: u16 = 2;
const PAYLOAD: u16 = 9;
const PREFIX: u16 = 10;
const LINK_HEADER: u16 = 16;
/// First group number that is tried, and number of tries.
const GROUP_FIRST: u16 = 0x4e00;
const GROUPS: u16 = 256;
/// Size of the socket's buffer, in bytes.
const BUFFER: usize = 1 << 20;
const READ: usize = 64 << 10;

/// A refused packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    /// Whether it was refused because its source address is not the VM's.
    pub(crate) is_spoofed: bool,
    /// Its mark; 0 if it has none.
    pub(crate) mark: u32,
    /// The interface that it came from: the TAP if it is spoofed, otherwise the bridge.
    pub(crate) index: u32,
    pub(crate) mac: Option<Mac>,
    /// Its headers; none if it is not IP.
    pub(crate) headers: Option<Headers>,
}

/// The headers of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Headers {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    /// 0 for protocols without ports.
    pub(crate) port: u16,
}

/// The socket of one group.
#[derive(Debug)]
pub(crate) struct Log {
    fd: AsyncFd<OwnedFd>,
    group: u16,
    read: Vec<u8>,
}

impl Log {
    /// Binds a group that is free in this network namespace. An instance gets the same group each time if possible.
    pub(crate) fn bind(instance: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkNetFilter;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        if setsockopt(&fd, sockopt::RcvBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&fd, sockopt::RcvBuf, &BUFFER);
        }
        let start = u16::try_from(instance % u32::from(GROUPS)).unwrap_or_default();
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for step in 0..GROUPS {
            let group = GROUP_FIRST + (start + step) % GROUPS;
            let mut command = Writer::new(CONFIGURE, ACK, 1, 0, group);
            command.put(COMMAND, &[COMMAND_BIND]);
            match ask(&fd, &command.finish()) {
                Ok(()) => {
                    let mut mode = Writer::new(CONFIGURE, ACK, 2, 0, group);
                    // struct nfulnl_msg_config_mode: how much is copied (all that the rule gives), the mode, padding.
                    mode.put(MODE, &[0, 0, 0xff, 0xff, MODE_PACKET, 0]);
                    // Each packet is sent at once, so that a refusal is known immediately.
                    mode.put_u32(QUEUE_THRESHOLD, 1);
                    ask(&fd, &mode.finish())?;
                    let fd = readable(fd)?;
                    return Ok(Self { fd, group, read: vec![0; READ] });
                }
                // Another process has this group, or binding is not permitted at all.
                Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EBUSY | nix::libc::EPERM)) => {
                    last = error;
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Returns the group's number.
    pub(crate) const fn group(&self) -> u16 {
        self.group
    }

    /// Waits for packets. Earlier ones may have been lost.
    pub(crate) async fn packets(&mut self) -> io::Result<Vec<Packet>> {
        loop {
            let mut ready = self.fd.readable().await?;
            let received = ready.try_io(|fd| {
                recv(fd.as_raw_fd(), &mut self.read, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
            });
            match received {
                Ok(Ok(length)) => {
                    let packets = messages(&self.read[..length]).filter(|message| message.kind == PACKET);
                    return Ok(packets.map(|message| read_packet(message.attributes())).collect());
                }
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
    }
}

/// Sends a request and waits for the acknowledgement; packets that arrive before it are dropped.
fn ask(fd: &OwnedFd, request: &[u8]) -> io::Result<()> {
    send(fd.as_raw_fd(), request, MsgFlags::empty())?;
    let mut read = vec![0; READ];
    loop {
        // Netlink answers before `send` returns.
        let length = recv(fd.as_raw_fd(), &mut read, MsgFlags::MSG_DONTWAIT)?;
        match messages(&read[..length]).find(|message| message.kind == ERROR).map(|message| message.error()) {
            Some(Some(0) | None) => return Ok(()),
            Some(Some(code)) => return Err(io::Error::from_raw_os_error(code)),
            None => {}
        }
    }
}

fn read_packet(attributes: Attributes<'_>) -> Packet {
    let protocol =
        attributes.get(HEADER).and_then(|header| Some(u16::from_be_bytes(header.get(..2)?.try_into().ok()?)));
    let payload = attributes.get(PAYLOAD).unwrap_or_default();
    let mac = attributes.get(LINK_HEADER).and_then(|header| header.get(6..12)?.try_into().ok().map(Mac));
    Packet {
        is_spoofed: attributes.text(PREFIX).as_deref() == Some(LOG_SPOOFED),
        mark: attributes.u32(PACKET_MARK).unwrap_or_default(),
        // On a bridge the device is the bridge; the port is in another attribute.
        index: attributes.u32(IN_PORT).or_else(|| attributes.u32(IN_DEVICE)).unwrap_or_default(),
        mac,
        headers: read_headers(protocol.unwrap_or_default(), payload),
    }
}

/// Reads the headers of a packet in this type of Ethernet frame. ARP counts as IPv4 with protocol number 0.
fn read_headers(ether: u16, bytes: &[u8]) -> Option<Headers> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
    let (source, destination, protocol, transport) = match ether {
        0x0800 => (v4(12)?, v4(16)?, *bytes.get(9)?, usize::from(*bytes.first()? & 0xf) * 4),
        0x86dd => (v6(8)?, v6(24)?, *bytes.get(6)?, 40),
        0x0806 => (v4(14)?, v4(24)?, 0, usize::MAX - 8),
        _ => return None,
    };
    let port = bytes.get(transport + 2..transport + 4).filter(|_| PORTED.contains(&protocol));
    let port = port.and_then(|port| Some(u16::from_be_bytes(port.try_into().ok()?)));
    Some(Headers { source, destination, protocol, port: port.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn headers_are_read() {
        let mut packet = vec![0; 24];
        packet[0] = 0x45;
        packet[9] = 6;
        packet[12..16].copy_from_slice(&[10, 77, 0, 2]);
        packet[16..20].copy_from_slice(&[8, 8, 8, 8]);
        packet[22..24].copy_from_slice(&443_u16.to_be_bytes());
        let read = read_headers(0x0800, &packet).unwrap();
        assert_eq!((read.destination.to_string().as_str(), read.protocol, read.port), ("8.8.8.8", 6, 443));
        packet[9] = 1;
        assert_eq!(read_headers(0x0800, &packet).unwrap().port, 0);
        assert_eq!(read_headers(0x88cc, &packet), None);
        assert_eq!(read_headers(0x86dd, &packet), None);
    }

    proptest! {
        #[test]
        fn any_packet_is_read_without_a_panic(ether in prop_oneof![Just(0x0800), Just(0x86dd), Just(0x0806), any::<u16>()], bytes: Vec<u8>) {
            let _ = read_headers(ether, &bytes);
        }
    }
}
