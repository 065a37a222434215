//! Open connections of VMs. After a change of policy, those that it no longer allows are marked as cut.
//!
//! The firewall refuses packets of a marked connection, with a TCP reset. Deleting connections from the kernel's table would not work: the
//! next packet would create the entry again, and an allowed, masqueraded connection would break if its server sends the next packet.

use std::io;
use std::net::IpAddr;

use crate::netlink::{ACK, Attributes, DUMP, Message, Writer};
use crate::nft::socket::Netfilter;
use crate::nft::{MARK_CUT, MARK_INDEX, MARK_TAG};

/// Netlink subsystem, and its messages (`enum cntl_msg_types`).
const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
/// Attributes of a connection.
const ORIGINAL: u16 = 1;
const PROTOCOL_STATE: u16 = 4;
const STATE_OF_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// First TCP state in which a connection is over (`TCP_CONNTRACK_TIME_WAIT`).
const TCP_OVER: u8 = 7;
const MARK: u16 = 8;
const ZONE: u16 = 18;
const MARK_MASK: u16 = 21;
/// Attributes of a direction: addresses and protocol.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IP_V4_DESTINATION: u16 = 2;
const IP_V6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_DESTINATION_PORT: u16 = 3;

/// Destination of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) protocol: u8,
    pub(crate) address: IpAddr,
    /// 0 for protocols without ports.
    pub(crate) port: u16,
}

/// A connection in the kernel's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Connection {
    pub(crate) flow: Flow,
    pub(crate) is_cut: bool,
    /// Whether it is a TCP connection that has ended; the kernel keeps it for a while.
    pub(crate) is_over: bool,
    /// The mark of the VM that opened it.
    pub(crate) mark: u32,
    family: u8,
    /// The attribute that identifies it to the kernel.
    original: Vec<u8>,
    zone: Option<Vec<u8>>,
}

/// Returns the connections of the VMs of all instances.
pub(crate) fn all(netfilter: &mut Netfilter) -> io::Result<Vec<Connection>> {
    let mut request = Writer::new(GET, DUMP, 1, 0, 0);
    request.put_u32(MARK, MARK_TAG).put_u32(MARK_MASK, !(MARK_INDEX | MARK_CUT));
    let all = netfilter.dump(&request.finish(), read)?;
    // Older kernels ignore the filter.
    Ok(all.into_iter().filter(|connection| connection.mark & !MARK_INDEX == MARK_TAG).collect())
}

/// Cuts a connection, or allows a cut one again.
pub(crate) fn set_cut(netfilter: &mut Netfilter, connection: &Connection, is_cut: bool) -> io::Result<()> {
    let mut request = Writer::new(NEW, ACK, 1, connection.family, 0);
    request.put_nested(ORIGINAL, &connection.original);
    if let Some(zone) = &connection.zone {
        request.put(ZONE, zone);
    }
    let mark = if is_cut { MARK_CUT } else { 0 };
    request.put_u32(MARK, mark).put_u32(MARK_MASK, MARK_CUT);
    match netfilter.ask(&request.finish()) {
        // The connection ended meanwhile.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
        done => done,
    }
}

/// Deletes all connections of a removed VM, so that the next VM with its address does not get their packets.
pub(crate) fn forget(netfilter: &mut Netfilter, mark: u32) -> io::Result<()> {
    for family in [nix::libc::AF_INET, nix::libc::AF_INET6] {
        let family = u8::try_from(family).unwrap_or_default();
        let mut request = Writer::new(DELETE, ACK, 1, family, 0);
        request.put_u32(MARK, mark).put_u32(MARK_MASK, !MARK_CUT);
        match netfilter.ask(&request.finish()) {
            Err(error) if error.raw_os_error() != Some(nix::libc::ENOENT) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn read(message: Message<'_>) -> Option<Connection> {
    let attributes = message.attributes();
    let original = attributes.get(ORIGINAL)?;
    let tuple = Attributes(original);
    let ip = tuple.nested(TUPLE_IP)?;
    let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(IP_V4_DESTINATION)?).ok()?));
    let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(IP_V6_DESTINATION)?).ok()?));
    let protocol = tuple.nested(TUPLE_PROTOCOL)?;
    let port = || protocol.get(PROTOCOL_DESTINATION_PORT)?.try_into().ok().map(u16::from_be_bytes);
    let mark = attributes.u32(MARK)?;
    let (is_cut, mark) = (mark & MARK_CUT != 0, mark & !MARK_CUT);
    let tcp = attributes.nested(PROTOCOL_STATE).and_then(|state| state.nested(STATE_OF_TCP));
    let state = tcp.and_then(|tcp| tcp.get(TCP_STATE)?.first().copied());
    Some(Connection {
        flow: Flow {
            protocol: *protocol.get(PROTOCOL_NUMBER)?.first()?,
            address: v4().or_else(v6)?,
            port: port().unwrap_or_default(),
        },
        is_cut,
        is_over: state.is_some_and(|state| state >= TCP_OVER),
        mark,
        family: message.family(),
        original: original.to_vec(),
        zone: attributes.get(ZONE).map(<[u8]>::to_vec),
    })
}
