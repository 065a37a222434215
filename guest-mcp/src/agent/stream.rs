//! One connection to or from the host, over vsock, a serial port or a Unix socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nexus_schema::link::HOST_PORT;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, VsockAddr};
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockStream};

use super::{Agent, Place};

/// The name of the socket that replaces the vsock device.
pub(crate) const SOCKET: &str = "v.sock";

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
    for port in (512..1024).rev() {
        bound = socket::bind(socket.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port));
        if bound != Err(nix::errno::Errno::EADDRINUSE) {
            break;
        }
    }
    bound?;
    Ok(socket)
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
