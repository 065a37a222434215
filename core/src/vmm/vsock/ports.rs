//! The Unix sockets in the VM's directory: the one that host programs connect to, and those for the guest's connections.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// A socket's name in a directory that is held open: a Unix socket's path has at most 107 bytes, and the directory's path may be longer.
#[derive(Debug)]
pub(super) struct SocketName {
    directory: OwnedFd,
    name: OsString,
}

impl SocketName {
    /// Opens the directory of `path`.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
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
    pub(super) fn bind(&self) -> io::Result<UnixListener> {
        self.remove()?;
        let listener = UnixListener::bind(self.path(&self.name))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Removes the socket's file, if there is one.
    pub(super) fn remove(&self) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Connects to the listener for the guest's connections to `port`. Does not wait: a full backlog is an error.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
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
