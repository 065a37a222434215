//! Unix sockets in directories with long paths.
//!
//! The address of a Unix socket holds 107 bytes, and the path of a state directory may be longer. So no socket is addressed by
//! its full path: the directory is opened, and the socket is reached through `/proc/self/fd/N/name`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Gid, Uid};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 512;
/// The delay after a listener fails, for example because file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Binds the socket `name` in `directory` and listens. Only this user may connect (mode 0600 from the start).
///
/// An existing socket of that name is replaced, because the caller owns the directory. Anything else of that name is left
/// alone, and the call fails with [`io::ErrorKind::AddrInUse`].
pub fn bind_in(directory: &Path, name: &str) -> io::Result<UnixListener> {
    let opened = Opened::new(directory, name)?;
    match opened.bind() {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && opened.is_socket()? => {
            rustix::fs::unlinkat(&opened.directory, name, AtFlags::empty())?;
            opened.bind()
        }
        other => other,
    }
}

/// Has members of a group connect to the socket `name` in `directory` (mode 0660). They reach it, but cannot list the directory (mode 0710).
pub fn share_with_group(directory: &Path, name: &str, gid: u32) -> io::Result<()> {
    let opened = Opened::new(directory, name)?;
    let gid = Some(Gid::from_raw(gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    // The group first: else members of the old one could connect for a moment.
    rustix::fs::chownat(&opened.directory, name, None, gid, flags)?;
    rustix::fs::chmodat(
        &opened.directory,
        name,
        Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP,
        AtFlags::empty(),
    )?;
    rustix::fs::chownat(&opened.directory, "", None, gid, AtFlags::EMPTY_PATH)?;
    rustix::fs::chmod(format!("/proc/self/fd/{}", opened.directory.as_raw_fd()), Mode::RWXU | Mode::XGRP)?;
    Ok(())
}

/// Connects to the socket `name` in `directory`; waits while its backlog is full.
pub fn connect_in(directory: &Path, name: &str) -> io::Result<UnixStream> {
    let opened = Opened::new(directory, name)?;
    UnixStream::connect(opened.path())
}

/// The same as [`bind_in`], for use inside a tokio runtime.
pub fn bind_in_tokio(directory: &Path, name: &str) -> io::Result<tokio::net::UnixListener> {
    let listener = bind_in(directory, name)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

/// The same as [`connect_in`], for use inside a tokio runtime; a full backlog fails with [`io::ErrorKind::WouldBlock`].
pub async fn connect_in_tokio(directory: &Path, name: &str) -> io::Result<tokio::net::UnixStream> {
    let opened = Opened::new(directory, name)?;
    tokio::net::UnixStream::connect(opened.path()).await
}

/// Serves each client that connects, at most `most` at once. Never returns by itself; dropping it ends all clients. Further
/// clients wait to be accepted, and the kernel limits how many can.
pub async fn serve_each<S: Future<Output = ()> + Send + 'static>(
    listener: tokio::net::UnixListener,
    most: usize,
    serve: impl Fn(tokio::net::UnixStream) -> S,
) {
    let room = Arc::new(Semaphore::new(most));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let served = serve(stream);
                connections.spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A socket's name, with its directory opened.
struct Opened<'a> {
    directory: OwnedFd,
    name: &'a str,
}

impl<'a> Opened<'a> {
    fn new(directory: &Path, name: &'a str) -> io::Result<Self> {
        if name.is_empty() || name.contains('/') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("`{name}` is not a valid socket name"),
            ));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        Ok(Self { directory, name })
    }

    /// A short path that is valid as long as `self` exists.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{}", self.directory.as_raw_fd(), self.name).into()
    }

    /// A socket that root binds in another user's directory, such as a VM's shim's, is given to that user.
    fn give_to_owner(&self) -> io::Result<()> {
        let owner = rustix::fs::fstat(&self.directory)?;
        if rustix::process::geteuid().is_root() && owner.st_uid != 0 {
            let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&self.directory, self.name, Some(uid), Some(gid), flags)?;
        }
        Ok(())
    }

    fn is_socket(&self) -> io::Result<bool> {
        let stat = rustix::fs::statat(&self.directory, self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Socket)
    }

    fn bind(&self) -> io::Result<UnixListener> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // At bind, the file gets the mode of the socket, so there is no moment when others could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(self.path())?)?;
        self.give_to_owner()?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket.into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn long_directory() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let long = temp.path().join("d".repeat(150));
        fs_err::create_dir(&long).unwrap();
        (temp, long)
    }

    #[test]
    fn works_below_a_long_path() {
        let (_temp, directory) = long_directory();
        let listener = bind_in(&directory, "v.sock_1024").unwrap();
        let mut client = connect_in(&directory, "v.sock_1024").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"ping").unwrap();
        let mut got = [0; 4];
        server.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ping");
        let mode = fs_err::metadata(directory.join("v.sock_1024")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let gid = rustix::process::getegid().as_raw();
        share_with_group(&directory, "v.sock_1024", gid).unwrap();
        let mode = |path: &Path| fs_err::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory.join("v.sock_1024")), mode(&directory)), (0o660, 0o710));
    }

    #[tokio::test]
    async fn works_in_a_runtime() {
        let (_temp, directory) = long_directory();
        let listener = bind_in_tokio(&directory, "s").unwrap();
        let (client, server) = tokio::join!(connect_in_tokio(&directory, "s"), listener.accept());
        client.unwrap();
        server.unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else() {
        let (_temp, directory) = long_directory();
        drop(bind_in(&directory, "s").unwrap());
        assert_eq!(connect_in(&directory, "s").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let _listener = bind_in(&directory, "s").unwrap();
        connect_in(&directory, "s").unwrap();

        fs_err::write(directory.join("file"), "kept").unwrap();
        assert_eq!(bind_in(&directory, "file").unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs_err::read_to_string(directory.join("file")).unwrap(), "kept");
        assert_eq!(bind_in(&directory, "a/b").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
