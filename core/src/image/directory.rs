//! Reads a directory of the host into a tree, and its contents into the image.
//!
//! It never follows links, and stays on one filesystem. Files that the user may not read are skipped. Everything skipped is
//! noted.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, openat, readlinkat, seek, statat,
};
use rustix::io::Errno;

use super::ImageError;
use super::contents::{Contents, Stop};
use super::tree::{Attributes, Body, Tree};
use crate::ext4::{Content, Xattrs};
use crate::os::shown::printable;
use crate::progress::Progress;

/// The most notes that are kept.
const NOTES: usize = 100;

/// What was left out of an image, and why.
pub(crate) type Notes = Vec<String>;

/// Reads the directory `root`.
pub(crate) fn read(
    root: &Path,
    tree: &mut Tree,
    contents: &mut Contents,
    progress: &Progress,
) -> Result<Notes, ImageError> {
    let failed = |e: Errno| ImageError::source(root, e.into());
    let fd = openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let mut walk = Walk {
        root,
        tree,
        contents,
        progress,
        device: stat.st_dev,
        linked: HashMap::new(),
        notes: Vec::new(),
        unnoted: 0,
    };
    let attributes = walk.attributes(&stat, &fd, None)?;
    walk.tree.put_directory(b"/", attributes)?;
    walk.directory(fd, &mut Vec::new())?;
    if walk.unnoted > 0 {
        walk.notes.push(format!("and {} more", walk.unnoted));
    }
    Ok(walk.notes)
}

struct Walk<'a> {
    root: &'a Path,
    tree: &'a mut Tree,
    contents: &'a mut Contents,
    progress: &'a Progress,
    device: u64,
    /// The first path of each file with several hard links, by inode.
    linked: HashMap<u64, Vec<u8>>,
    notes: Notes,
    unnoted: u64,
}

impl Walk<'_> {
    fn directory(&mut self, fd: OwnedFd, path: &mut Vec<u8>) -> Result<(), ImageError> {
        let mut names: Vec<CString> = Vec::new();
        for entry in Dir::read_from(&fd).map_err(|e| self.failed(path, e))? {
            let entry = entry.map_err(|e| self.failed(path, e))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort();
        for name in names {
            self.progress.check()?;
            let length = path.len();
            path.push(b'/');
            path.extend_from_slice(name.to_bytes());
            self.entry(&fd, &name, path)?;
            path.truncate(length);
        }
        Ok(())
    }

    fn entry(&mut self, parent: &OwnedFd, name: &CString, path: &mut Vec<u8>) -> Result<(), ImageError> {
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(self.failed(path, error)),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let attributes = self.attributes(&stat, parent, Some(name))?;
        #[allow(clippy::collapsible_if, reason = "the lookup belongs to linked files only")]
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&stat.st_ino) {
                return self.tree.link(path, first);
            }
        }
        let body = match kind {
            FileType::Directory => return self.subdirectory(parent, name, path, &stat, attributes),
            FileType::RegularFile => match self.file(parent, name, path, &stat)? {
                Some(content) => Body::File(content),
                None => return Ok(()),
            },
            FileType::Symlink => {
                let target = readlinkat(parent, name, Vec::new()).map_err(|e| self.failed(path, e))?;
                Body::Symlink(target.into_bytes().into())
            }
            FileType::Fifo => Body::Fifo,
            FileType::Socket => Body::Socket,
            FileType::CharacterDevice | FileType::BlockDevice => Body::Device {
                block: kind == FileType::BlockDevice,
                major: rustix::fs::major(stat.st_rdev),
                minor: rustix::fs::minor(stat.st_rdev),
            },
            _ => {
                self.note(path, "has an unknown type");
                return Ok(());
            }
        };
        self.tree.put(path, attributes, body)?;
        if stat.st_nlink > 1 {
            self.linked.insert(stat.st_ino, path.clone());
        }
        Ok(())
    }

    fn subdirectory(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        path: &mut Vec<u8>,
        stat: &Stat,
        attributes: Attributes,
    ) -> Result<(), ImageError> {
        self.tree.put_directory(path, attributes)?;
        if stat.st_dev != self.device {
            self.note(path, "is another filesystem; it is an empty directory in the image");
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(parent, name, flags, Mode::empty()) {
            Ok(fd) => self.directory(fd, path),
            Err(Errno::ACCESS | Errno::PERM) => {
                self.note(path, "may not be read; it is an empty directory in the image");
                Ok(())
            }
            Err(error) => Err(self.failed(path, error)),
        }
    }

    /// Reads a file's content and keeps its holes. `None` if it may not be read.
    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        path: &[u8],
        stat: &Stat,
    ) -> Result<Option<Content>, ImageError> {
        // Does not block forever, in case it has become a FIFO meanwhile.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match openat(parent, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ACCESS | Errno::PERM) => {
                self.note(path, "may not be read");
                return Ok(None);
            }
            Err(error) => return Err(self.failed(path, error)),
        };
        let now = rustix::fs::fstat(&fd).map_err(|e| self.failed(path, e))?;
        if now.st_ino != stat.st_ino || FileType::from_raw_mode(now.st_mode) != FileType::RegularFile {
            return Err(self.failed(path, Errno::STALE));
        }
        let size = now.st_size.cast_unsigned();
        match self.contents.take(SkipHoles { fd, at: 0, data: 0..0, size }, size) {
            Ok(content) => Ok(Some(content)),
            Err(Stop::Read(error)) => Err(ImageError::source(&self.shown(path), error)),
            Err(Stop::Short) => Err(self.failed(path, Errno::STALE)),
            Err(Stop::Other(error)) => Err(error),
        }
    }

    /// The attributes of `name` in the directory `fd`, or of `fd` itself.
    fn attributes(
        &self,
        stat: &Stat,
        fd: impl AsFd,
        name: Option<&CString>,
    ) -> Result<Attributes, ImageError> {
        // A name below an open directory: free of races, and links are not followed.
        let mut path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()).into_bytes();
        match name {
            Some(name) => {
                path.push(b'/');
                path.extend_from_slice(name.to_bytes());
            }
            None => path.extend_from_slice(b"/."),
        }
        Ok(Attributes {
            mode: u16::try_from(stat.st_mode & 0o7777).unwrap_or(0),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs: xattrs(&path).map_err(|e| self.failed(&path, e))?,
        })
    }

    fn note(&mut self, path: &[u8], what: &str) {
        if self.notes.len() < NOTES {
            self.notes.push(format!("{} {what}", printable(path)));
        } else {
            self.unnoted += 1;
        }
    }

    fn shown(&self, path: &[u8]) -> std::path::PathBuf {
        let inside = path.strip_prefix(b"/").unwrap_or(path);
        self.root.join(std::ffi::OsStr::from_bytes(inside))
    }

    fn failed(&self, path: &[u8], error: Errno) -> ImageError {
        ImageError::source(&self.shown(path), error.into())
    }
}

/// The extended attributes of a path, whose last component is not followed. Unreadable ones are skipped.
fn xattrs(path: &[u8]) -> Result<Xattrs, Errno> {
    let mut found = std::collections::BTreeMap::new();
    let mut names = vec![0_u8; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(Errno::NOTSUP | Errno::NOENT | Errno::ACCESS | Errno::PERM) => return Ok(found.into()),
        Err(error) => return Err(error),
    };
    for name in names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0_u8; 64 << 10];
        match rustix::fs::lgetxattr(path, name, &mut value) {
            Ok(length) => {
                value.truncate(length);
                found.insert(name.to_vec(), value);
            }
            Err(Errno::NODATA | Errno::ACCESS | Errno::PERM | Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found.into())
}

/// Reads a file without touching its holes.
struct SkipHoles {
    fd: OwnedFd,
    at: u64,
    data: std::ops::Range<u64>,
    size: u64,
}

impl io::Read for SkipHoles {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.size || buffer.is_empty() {
            return Ok(0);
        }
        if self.at >= self.data.end {
            let start = match seek(&self.fd, SeekFrom::Data(self.at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => self.size,
                Err(_) => self.at,
            };
            let end = seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(self.size).max(start);
            self.data = start..if end == start { self.size } else { end };
        }
        let room = buffer.len() as u64;
        let read = if self.at < self.data.start {
            let zeros = usize::try_from(room.min(self.data.start - self.at)).unwrap_or(buffer.len());
            buffer[..zeros].fill(0);
            zeros
        } else {
            let want = usize::try_from(room.min(self.data.end - self.at)).unwrap_or(buffer.len());
            rustix::io::pread(&self.fd, &mut buffer[..want], self.at)?
        };
        self.at += read as u64;
        Ok(read)
    }
}
