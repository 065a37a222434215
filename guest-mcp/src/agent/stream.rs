//! One connection to or from the host, over vsock, a serial port or a Unix socket.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use nexus_schema::link::HOST_PORT;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, VsockAddr};
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockStream};

use super::{Agent, Place};

/// The name of the socket that replaces the vsock device.
pub(crate) const SOCKET: &str = "v.sock";
/// Ports that only root can bind.
const PRIVILEGED: Range<u32> = 512..1024;
/// Counts the ports that were tried.
static TRIED: AtomicU32 = AtomicU32::new(0);

/// A connection over any kind of socket.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// Connects to the host's hello port.
pub(super) async fn dial_host(agent: &Agent) -> io::Result<Box<dyn Duplex>> {
    if let Some(serial) = agent.serial() {
        let socket = std::os::unix::net::UnixStream::from(serial.dial(HOST_PORT)?);
        return Ok(Box::new(UnixStream::from_std(socket)?));
    }
    match &agent.place {
        Place::Vm { .. } => {
            let connected = tokio::task::spawn_blocking(connect_from_privileged_port).await;
            let socket = connected.map_err(io::Error::other)??;
            Ok(Box::new(VsockStream::from(socket)))
        }
        Place::Process { directory } => {
            let place = ShortPath::of(directory)?;
            Ok(Box::new(UnixStream::connect(place.join(&format!("{SOCKET}_{HOST_PORT}"))).await?))
        }
    }
}

/// Connects from a port that only root can bind. This is how the host tells the agent from other processes in the guest.
fn connect_from_privileged_port() -> io::Result<OwnedFd> {
    let socket = privileged_socket(SockFlag::SOCK_CLOEXEC)?;
    socket::connect(socket.as_raw_fd(), &VsockAddr::new(VMADDR_CID_HOST, HOST_PORT))?;
    Ok(socket)
}

/// Creates a vsock socket on a port that only root can bind.
pub(crate) fn privileged_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    let socket = socket::socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    let mut bound = Err(nix::errno::Errno::EADDRINUSE);
    for port in privileged_ports(&TRIED) {
        bound = socket::bind(socket.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port));
        if bound != Err(nix::errno::Errno::EADDRINUSE) {
            break;
        }
    }
    bound?;
    Ok(socket)
}

/// Returns all privileged ports, beginning after the one that was tried last.
///
/// If both sides close a connection at once, the kernel frees its port while a reset from the host may still be on its way. That reset would end
/// the next connection from the same port before the host has answered.
fn privileged_ports(tried: &AtomicU32) -> impl Iterator<Item = u32> {
    // The number of ports divides 2^32, so the order stays the same when the counter overflows.
    PRIVILEGED.map(|_| {
        PRIVILEGED.end - 1 - tried.fetch_add(1, Ordering::Relaxed) % (PRIVILEGED.end - PRIVILEGED.start)
    })
}

/// A directory addressed by its file descriptor, because the path of a Unix socket can have at most 107 bytes.
pub(crate) struct ShortPath {
    directory: OwnedFd,
}

impl ShortPath {
    /// Opens the directory.
    pub(crate) fn of(directory: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::open(directory, flags, Mode::empty())? })
    }

    /// Returns a short path to a name in it; valid as long as this value lives.
    pub(crate) fn join(&self, name: &str) -> String {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_port_is_used_again_only_after_all_others() {
        // Close to the overflow of the counter.
        let tried = AtomicU32::new(u32::MAX - 600);
        let taken: Vec<u32> =
            (0..2 * PRIVILEGED.len()).filter_map(|_| privileged_ports(&tried).next()).collect();
        let (first, second) = taken.split_at(PRIVILEGED.len());
        assert_eq!(first, second);
        assert_eq!(first.iter().copied().collect::<BTreeSet<_>>(), PRIVILEGED.collect());
    }

    #[test]
    fn each_port_is_tried_once() {
        let tried = AtomicU32::new(7);
        let all: BTreeSet<u32> = privileged_ports(&tried).collect();
        assert_eq!(all, PRIVILEGED.collect());
        assert_eq!(privileged_ports(&tried).count(), PRIVILEGED.len());
    }
}
