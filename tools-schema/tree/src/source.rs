//! The source of a tree.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use nexus_schema::stream::TreePart;

use crate::error::TreeError;
use crate::part::hash;
use crate::report::Watch;

/// Flags for a directory that is only passed through.
pub(crate) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Flags for a regular file that is read; if it is something else, the open does not wait.
pub(crate) const FILE: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// A tree or a file to be read.
#[derive(Debug)]
pub struct Source {
    pub(crate) kind: Kind,
    /// The path that callers know.
    pub(crate) path: Vec<u8>,
}

#[derive(Debug)]
pub(crate) enum Kind {
    /// A directory with everything in it.
    Directory(OwnedFd),
    /// A file, link or the like in a directory.
    Other { parent: OwnedFd, name: Vec<u8> },
}

impl Source {
    /// Opens a path. Links on the way are followed. A link at the end is the source itself, unless `follow` is set or the path
    /// ends with a slash or a dot.
    pub fn open(path: &Path, follow: bool) -> Result<Self, TreeError> {
        let bytes = path.as_os_str().as_bytes();
        let fail = |error: Errno| TreeError::file("read", bytes, error);
        let resolved;
        let mut place = path;
        if follow || bytes.ends_with(b"/") || bytes.ends_with(b"/.") || path.file_name().is_none() {
            resolved = std::fs::canonicalize(path).map_err(|error| TreeError::file("read", bytes, error))?;
            place = &resolved;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Some(name) = place.file_name() else {
            let directory = rustix::fs::open(place, flags, Mode::empty()).map_err(fail)?;
            return Ok(Self { kind: Kind::Directory(directory), path: bytes.to_vec() });
        };
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let walk = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(parent, walk, Mode::empty()).map_err(fail)?;
        Self::at(parent, name, bytes)
    }

    /// Opens a name in a directory; a link is the source itself. `shown` is the path that callers know.
    pub fn at(parent: OwnedFd, name: &OsStr, shown: &[u8]) -> Result<Self, TreeError> {
        let fail = |error: Errno| TreeError::file("read", shown, error);
        let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                Kind::Directory(rustix::fs::openat(&parent, name, DIRECTORY, Mode::empty()).map_err(fail)?)
            }
            _ => Kind::Other { parent, name: name.as_bytes().to_vec() },
        };
        Ok(Self { kind, path: shown.to_vec() })
    }

    /// Creates the source with everything in an open directory.
    pub fn of_directory(directory: OwnedFd, shown: &[u8]) -> Self {
        Self { kind: Kind::Directory(directory), path: shown.to_vec() }
    }

    /// Returns whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    /// Returns the directory, if it is one.
    pub fn directory(&self) -> Option<&OwnedFd> {
        match &self.kind {
            Kind::Directory(directory) => Some(directory),
            Kind::Other { .. } => None,
        }
    }

    /// How many bytes of a part the file starts with: all of them if their hash is the same, else none. None of a directory, either.
    pub fn same_part(&self, part: &TreePart, watch: &mut dyn Watch) -> Result<u64, TreeError> {
        let Kind::Other { parent, name } = &self.kind else { return Ok(0) };
        let fail = |error: Errno| TreeError::file("read", &self.path, error);
        let file = rustix::fs::openat(parent, OsStr::from_bytes(name), FILE, Mode::empty()).map_err(fail)?;
        let stat = rustix::fs::fstat(&file).map_err(fail)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || part.bytes > stat.st_size.unsigned_abs() {
            return Ok(0);
        }
        let own = hash(&file.into(), part.bytes, &self.path, watch)?;
        Ok(if own == part.sha256 { part.bytes } else { 0 })
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.stat().is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    }

    pub(crate) fn stat(&self) -> Result<Stat, TreeError> {
        let stat = match &self.kind {
            Kind::Directory(directory) => rustix::fs::fstat(directory),
            Kind::Other { parent, name } => {
                rustix::fs::statat(parent, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW)
            }
        };
        stat.map_err(|error| TreeError::file("read", &self.path, error))
    }
}
