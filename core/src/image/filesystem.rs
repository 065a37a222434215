//! Reads the filesystem of a machine into a tree. What is that machine's own is left out: machines of the image make their own.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::Path;

use fs_err as fs;

use super::ImageError;
use super::contents::Stop;
use super::source::Staged;
use super::tree::{Attributes, Body, refuse};
use crate::ext4::{Filesystem, Inode, Kind, ReadError};
use crate::progress::Progress;

/// The number of the root directory (`EXT4_ROOT_INO`).
const ROOT_INODE: u32 = 2;

/// Directories that stay, without what is in them: what was in memory, what a check found, what the agent keeps for itself, connections with
/// their passwords, and leases of addresses.
const EMPTIED: [&[u8]; 10] = [
    b"etc/NetworkManager/system-connections",
    b"lost+found",
    b"run",
    b"tmp",
    b"var/lib/NetworkManager",
    b"var/lib/dhcp",
    b"var/lib/dhcpcd",
    b"var/lib/dhcpcd5",
    b"var/lib/iwd",
    b"var/lib/nexus/trees",
];
/// Files that tell machines apart, or that nobody else may know.
const LEFT_OUT: [&[u8]; 8] = [
    b"etc/hostid",
    b"etc/iscsi/initiatorname.iscsi",
    b"etc/nvme/hostid",
    b"etc/nvme/hostnqn",
    b"var/lib/dbus/machine-id",
    b"var/lib/systemd/credential.secret",
    b"var/lib/systemd/random-seed",
    b"var/lib/urandom/random-seed",
];
/// Where host keys of SSH are, with the beginning and the ends of their names.
const HOST_KEYS: [(&[u8], &[&[u8]]); 2] =
    [(b"etc/ssh/ssh_host_", &[b"_key", b"_key.pub"]), (b"etc/dropbear/", &[b"_host_key"])];
/// An empty file of this name is filled at the first boot.
const MACHINE_ID: &[u8] = b"etc/machine-id";

/// What becomes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Emptied,
    LeftOut,
}

/// What becomes of what is at a path, which has no leading slash.
fn fate(path: &[u8], kind: Kind) -> Fate {
    let below = |place: &[u8]| path.strip_prefix(place).is_some_and(|rest| rest.starts_with(b"/"));
    if EMPTIED.into_iter().any(below) {
        return Fate::LeftOut;
    }
    let is_host_key = HOST_KEYS.into_iter().any(|(begin, ends)| {
        path.strip_prefix(begin)
            .is_some_and(|name| !name.contains(&b'/') && ends.iter().any(|end| name.ends_with(end)))
    });
    match kind {
        Kind::File if path == MACHINE_ID => Fate::Emptied,
        Kind::File if is_host_key || LEFT_OUT.contains(&path) => Fate::LeftOut,
        _ => Fate::Kept,
    }
}

/// Reads the filesystem in a file to which nobody writes. Blocks.
pub(super) fn read(path: &Path, staged: &mut Staged, progress: &Progress) -> Result<(), ImageError> {
    let goes_on = || progress.check().is_ok();
    let filesystem = Filesystem::open_while(opened(path)?, &goes_on);
    progress.check()?;
    let filesystem = filesystem.map_err(|e| unreadable(path, e))?;
    let root = filesystem.inode(ROOT_INODE).map_err(|e| unreadable(path, e))?;
    let attributes = attributes(&filesystem, &root).map_err(|e| unreadable(path, e))?;
    staged.tree.put_directory(b"/", attributes)?;
    let mut reader = Reader { path, filesystem: &filesystem, staged, linked: HashMap::new() };
    let mut failure = None;
    let walked = filesystem.walk_while(&goes_on, &mut |entry| {
        let done = match progress.check() {
            Ok(()) => reader.entry(entry.path, entry.inode),
            Err(cancelled) => Err(cancelled.into()),
        };
        progress.advance(reader.staged.contents.bytes(), None);
        match done {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    });
    progress.check()?;
    match failure {
        Some(error) => Err(error),
        None => walked.map_err(|e| unreadable(path, e)),
    }
}

struct Reader<'a> {
    path: &'a Path,
    filesystem: &'a Filesystem,
    staged: &'a mut Staged,
    /// The first path of each file with several names, by inode.
    linked: HashMap<u32, Vec<u8>>,
}

impl Reader<'_> {
    fn entry(&mut self, path: &[u8], inode: &Inode) -> Result<(), ImageError> {
        let kind = inode.kind();
        let fate = fate(path, kind);
        if fate == Fate::LeftOut {
            return Ok(());
        }
        let is_linked = kind != Kind::Directory && inode.links > 1;
        if is_linked && let Some(first) = self.linked.get(&inode.number) {
            return self.staged.tree.link(path, first);
        }
        let attributes = attributes(self.filesystem, inode).map_err(|e| unreadable(self.path, e))?;
        let body = match kind {
            Kind::Directory => return self.staged.tree.put_directory(path, attributes),
            Kind::File => self.file(inode, fate)?,
            Kind::Symlink => {
                let target = self.filesystem.link_target(inode);
                Body::Symlink(target.map_err(|e| unreadable(self.path, e))?.into())
            }
            Kind::CharDevice | Kind::BlockDevice => {
                let number = inode.device.ok_or_else(|| refuse(path, "it is a device without a number"));
                let (major, minor) = number?;
                Body::Device { block: kind == Kind::BlockDevice, major, minor }
            }
            Kind::Fifo => Body::Fifo,
            Kind::Socket => Body::Socket,
            Kind::Other => return Err(refuse(path, "its type is unknown")),
        };
        self.staged.tree.put(path, attributes, body)?;
        if is_linked {
            self.linked.insert(inode.number, path.to_vec());
        }
        Ok(())
    }

    fn file(&mut self, inode: &Inode, fate: Fate) -> Result<Body, ImageError> {
        if fate == Fate::Emptied {
            return Ok(Body::File(self.staged.contents.keep(b"")?));
        }
        let source = FileReader::new(self.filesystem, inode);
        match self.staged.contents.take(source, inode.size) {
            Ok(content) => Ok(Body::File(content)),
            Err(Stop::Read(error)) => Err(ImageError::source(self.path, error)),
            Err(Stop::Short) => {
                Err(ImageError::source(self.path, io::Error::from(io::ErrorKind::UnexpectedEof)))
            }
            Err(Stop::Other(error)) => Err(error),
        }
    }
}

/// Opens the filesystem in a file to which nobody writes.
pub(super) fn open(path: &Path) -> Result<Filesystem, ImageError> {
    Filesystem::open(opened(path)?).map_err(|e| unreadable(path, e))
}

fn opened(path: &Path) -> Result<std::fs::File, ImageError> {
    Ok(fs::File::open(path).map_err(|e| ImageError::source(path, e))?.into_file())
}

pub(super) fn unreadable(path: &Path, error: ReadError) -> ImageError {
    ImageError::Unreadable { path: path.to_owned(), source: Box::new(error) }
}

fn attributes(filesystem: &Filesystem, inode: &Inode) -> Result<Attributes, ReadError> {
    let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = filesystem.xattrs(inode)?.into_iter().collect();
    let (mtime, mtime_ns) = inode.mtime;
    Ok(Attributes {
        mode: inode.mode & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        mtime,
        mtime_ns,
        xattrs: xattrs.into(),
    })
}

/// The content of a file, from its beginning.
pub(super) struct FileReader<'a> {
    filesystem: &'a Filesystem,
    inode: &'a Inode,
    at: u64,
}

impl<'a> FileReader<'a> {
    pub(super) fn new(filesystem: &'a Filesystem, inode: &'a Inode) -> Self {
        Self { filesystem, inode, at: 0 }
    }
}

impl Read for FileReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.filesystem.read(self.inode, self.at, buffer).map_err(io::Error::other)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tells_machines_apart_is_left_out() {
        for (path, kind, expected) in [
            (&b"etc/machine-id"[..], Kind::File, Fate::Emptied),
            (b"etc/machine-id", Kind::Symlink, Fate::Kept),
            (b"var/lib/dbus/machine-id", Kind::File, Fate::LeftOut),
            (b"var/lib/dbus/machine-id", Kind::Symlink, Fate::Kept),
            (b"etc/ssh/ssh_host_ed25519_key", Kind::File, Fate::LeftOut),
            (b"etc/ssh/ssh_host_rsa_key.pub", Kind::File, Fate::LeftOut),
            (b"etc/ssh/ssh_host_keys.d", Kind::Directory, Fate::Kept),
            (b"etc/ssh/sshd_config", Kind::File, Fate::Kept),
            (b"etc/dropbear/dropbear_ed25519_host_key", Kind::File, Fate::LeftOut),
            (b"etc/dropbear/authorized_keys", Kind::File, Fate::Kept),
            (b"etc/NetworkManager/system-connections", Kind::Directory, Fate::Kept),
            (b"etc/NetworkManager/system-connections/home.nmconnection", Kind::File, Fate::LeftOut),
            (b"etc/NetworkManager/NetworkManager.conf", Kind::File, Fate::Kept),
            (b"var/lib/NetworkManager/secret_key", Kind::File, Fate::LeftOut),
            (b"var/lib/dhcp/dhclient.eth0.leases", Kind::File, Fate::LeftOut),
            (b"var/lib/dhcpd/dhcpd.leases", Kind::File, Fate::Kept),
            (b"var/lib/systemd/random-seed", Kind::File, Fate::LeftOut),
            (b"etc/hostid", Kind::File, Fate::LeftOut),
            (b"etc/nvme/hostnqn", Kind::File, Fate::LeftOut),
            (b"run", Kind::Directory, Fate::Kept),
            (b"run/nexus/token", Kind::File, Fate::LeftOut),
            (b"runner/job", Kind::File, Fate::Kept),
            (b"tmp/build", Kind::Directory, Fate::LeftOut),
            (b"var/log/dpkg.log", Kind::File, Fate::Kept),
        ] {
            assert_eq!(fate(path, kind), expected, "{}", String::from_utf8_lossy(path));
        }
    }
}
