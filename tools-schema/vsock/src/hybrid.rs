//! The host's front: the Unix sockets in a VM's directory, the one that host programs connect to, and those for the guest's connections.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nexus_schema::link::{EGRESS_PORT, HOST_PORT};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::connection::Cids;
use crate::device::{Front, Traits};
use crate::packet::HOST_CID;

/// Maximum number of connections by the guest: those to other machines, and a few for hello.
pub(crate) const FAR_CONNECTIONS_MAX: usize = nexus_schema::egress::CONNECTIONS_MAX + 16;
/// Guest ports below this can be bound only by root.
const PRIVILEGED_PORTS: u32 = 1024;

/// Returns the properties of a vsock device for the guest with this context id: one transport for everything.
#[must_use]
pub fn traits(guest: u64, say: fn(fmt::Arguments<'_>)) -> Traits {
    Traits {
        cids: Cids { near: HOST_CID, far: guest },
        far_max: FAR_CONNECTIONS_MAX,
        lanes: 1,
        lane_of: |_| 0,
        say,
    }
}

/// The hybrid sockets of a VM: host programs say `CONNECT` on the one, and the guest's connections to port N arrive at the other, whose name
/// ends in `_N`.
#[derive(Debug)]
pub struct Hybrid {
    socket: SocketName,
    listener: UnixListener,
    trusts_all: bool,
}

impl Hybrid {
    /// Listens at `path`. `trusts_all`: whatever connects from the guest is its agent. Otherwise, that is proved by a port that only root can
    /// bind.
    ///
    /// # Errors
    /// When the directory is missing or the name too long.
    pub fn new(path: &Path, trusts_all: bool) -> io::Result<Self> {
        let socket = SocketName::new(path)?;
        let listener = socket.bind()?;
        Ok(Self { socket, listener, trusts_all })
    }

    /// Removes the socket's file.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        self.socket.remove()
    }
}

impl Front for Hybrid {
    fn connect(&mut self, port: u32, far: u32) -> io::Result<UnixStream> {
        if !self.trusts_all && matches!(port, HOST_PORT | EGRESS_PORT) && far >= PRIVILEGED_PORTS {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.socket.connect(port)
    }

    fn listener(&self) -> Option<&UnixListener> {
        Some(&self.listener)
    }
}

/// A socket's name in a directory that is held open: a Unix socket's path has at most 107 bytes, and the directory's path may be longer.
#[derive(Debug)]
pub struct SocketName {
    directory: OwnedFd,
    name: OsString,
}

impl SocketName {
    /// Opens the directory of `path`.
    pub fn new(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::open(parent, flags, Mode::empty())?, name })
    }

    fn path(&self, name: &OsStr) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd())).join(name)
    }

    /// Listens at this name, after removing what an earlier process may have left there. The listener is non-blocking.
    pub fn bind(&self) -> io::Result<UnixListener> {
        self.remove()?;
        let listener = UnixListener::bind(self.path(&self.name))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Removes the socket's file, if there is one.
    pub fn remove(&self) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Connects to the listener for the guest's connections to `port`. Does not wait: a full backlog is an error.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut name = self.name.clone();
        name.push(format!("_{port}"));
        let address = SocketAddrUnix::new(self.path(&name))?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_directory_is_no_obstacle_and_a_full_backlog_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d".repeat(150));
        std::fs::create_dir(&directory).unwrap();
        let socket = SocketName::new(&directory.join("v.sock")).unwrap();
        let _own = socket.bind().unwrap();
        assert_eq!(socket.connect(1024).unwrap_err().kind(), io::ErrorKind::NotFound);

        let hello = SocketName::new(&directory.join("v.sock_1024")).unwrap().bind().unwrap();
        rustix::net::listen(&hello, 1).unwrap();
        let mut open = vec![];
        let error = loop {
            match socket.connect(1024) {
                Ok(stream) => open.push(stream),
                Err(error) => break error,
            }
            assert!(open.len() < 100);
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(hello);
        assert_eq!(socket.connect(1024).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);

        socket.bind().unwrap();
        socket.remove().unwrap();
        socket.remove().unwrap();
        assert!(!directory.join("v.sock").exists());
    }
}
