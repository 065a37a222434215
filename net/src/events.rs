//! Events from the kernel: refused packets, and changes by other programs.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nexus_net_wire::Denial;
use nexus_schema::network::DenyReason;
use nexus_schema::time::Timestamp;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::conntrack::Flow;
use crate::netlink::messages;
use crate::nflog::{Kind, Log, Packet};
use crate::nft::socket::readable;
use crate::nft::{MARK_INDEX, MARK_TAG};
use crate::refusal::{protocol, reason};
use crate::view::{Shared, View};

/// Time after a change during which further changes are collected.
const SETTLE: Duration = Duration::from_millis(50);
/// Interval between two full checks without an event.
const LOOK_ANYWAY: Duration = Duration::from_secs(60);
/// Pause after an error of a socket.
const PAUSE: Duration = Duration::from_secs(1);
const READ: usize = 64 << 10;

/// Netlink groups of changes: interfaces and addresses (`RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV6_IFADDR`), and nf_tables.
const ROUTE_GROUPS: u32 = 0x1 | 0x10 | 0x100;
const NFTABLES_GROUPS: u32 = 1 << 6;
/// Messages that can concern this process: new or removed interfaces and addresses (`RTM_*`).
const ROUTE_CHANGES: [u16; 4] = [16, 17, 20, 21];
/// New chains and rules, and removed tables, chains, rules, sets and elements (`NFT_MSG_*`, with their subsystem).
const NFTABLES_CHANGES: [u16; 7] = [0xa02, 0xa03, 0xa05, 0xa06, 0xa08, 0xa0b, 0xa0e];

/// Reports refused packets, as long as the process runs.
pub(crate) async fn tell_refusals(mut log: Log, shared: Arc<Shared>) {
    loop {
        match log.packets().await {
            Ok(packets) => {
                let view = shared.view();
                for packet in packets {
                    if let Some(denial) = denial(&view, &shared, &packet) {
                        shared.denials.note(denial);
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the firewall's log");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn denial(view: &View, shared: &Shared, packet: &Packet) -> Option<Denial> {
    let is_marked = packet.mark & !MARK_INDEX == MARK_TAG;
    let index = if is_marked { packet.mark & MARK_INDEX } else { packet.index };
    let wired = view.by_index(index)?;
    let at = Timestamp::from(SystemTime::now());
    let vm = wired.vm.id;
    let Some(headers) = packet.headers else {
        let reason = DenyReason::Spoofed;
        let protocol = protocol(255);
        return (packet.kind == Kind::Spoofed).then_some(Denial {
            vm,
            at,
            protocol,
            address: None,
            port: None,
            name: None,
            mac: packet.mac,
            reason,
        });
    };
    let flow = Flow { protocol: headers.protocol, address: headers.destination, port: headers.port };
    if packet.kind == Kind::Spoofed {
        let (address, mac, reason) = (Some(headers.source), packet.mac, DenyReason::Spoofed);
        return Some(Denial {
            vm,
            at,
            protocol: protocol(flow.protocol),
            address,
            port: None,
            name: None,
            mac,
            reason,
        });
    }
    Some(Denial {
        vm,
        at,
        protocol: protocol(flow.protocol),
        address: Some(flow.address),
        port: (flow.port != 0).then_some(flow.port),
        name: shared.pins().name(vm, flow.address).map(str::to_owned),
        mac: None,
        reason: match packet.kind {
            Kind::Full => DenyReason::TooManyConnections,
            Kind::Refused | Kind::Spoofed => reason(&wired.vm.policy, &view.around, &view.gateways(), flow),
        },
    })
}

/// Sends a message each time that another program may have changed this process's network or the host's addresses. `outside` was opened in the
/// host's network namespace, if this one is another.
pub(crate) async fn watch_changes(changed: mpsc::Sender<()>, mut outside: Option<Changes>) {
    let sockets = (
        Changes::of_routes(),
        Changes::open(SockProtocol::NetlinkNetFilter, NFTABLES_GROUPS, &NFTABLES_CHANGES),
    );
    let (mut routes, mut tables) = match sockets {
        (Ok(routes), Ok(tables)) => (routes, tables),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "cannot watch for changes by other programs; they are noticed with a delay");
            loop {
                tokio::time::sleep(LOOK_ANYWAY).await;
                if changed.send(()).await.is_err() {
                    return;
                }
            }
        }
    };
    loop {
        tokio::select! {
            () = routes.wait() => tokio::time::sleep(SETTLE).await,
            () = tables.wait() => tokio::time::sleep(SETTLE).await,
            () = wait(&mut outside) => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(LOOK_ANYWAY) => {}
        }
        if changed.send(()).await.is_err() {
            return;
        }
    }
}

async fn wait(changes: &mut Option<Changes>) {
    match changes {
        Some(changes) => changes.wait().await,
        None => std::future::pending().await,
    }
}

/// A socket that receives the kernel's notifications of changes in the network namespace in which it was opened.
pub(crate) struct Changes {
    fd: AsyncFd<OwnedFd>,
    kinds: &'static [u16],
    read: Vec<u8>,
}

impl Changes {
    /// Opens one for interfaces and addresses.
    pub(crate) fn of_routes() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute, ROUTE_GROUPS, &ROUTE_CHANGES)
    }

    fn open(protocol: SockProtocol, groups: u32, kinds: &'static [u16]) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self { fd: readable(fd)?, kinds, read: vec![0; READ] })
    }

    /// Waits for a change. A read error counts as a change, since a notification may be lost.
    async fn wait(&mut self) {
        loop {
            let Ok(mut ready) = self.fd.readable().await else {
                tokio::time::sleep(PAUSE).await;
                return;
            };
            let received = ready.try_io(|fd| {
                recv(fd.as_raw_fd(), &mut self.read, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
            });
            match received {
                Ok(Ok(length)) => {
                    if messages(&self.read[..length]).any(|message| self.kinds.contains(&message.kind)) {
                        return;
                    }
                }
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
    }
}
