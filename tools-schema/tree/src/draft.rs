//! A file that is not in place yet. A large one has no name until then, so nothing is left if the unpacking process is killed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::attributes::{Attribute, settle_with};
use crate::destination::Facts;
use crate::part::Begun;

/// Files of at least this size have no name at first. For smaller ones that would take longer than writing them.
const NAMELESS_FROM: u64 = 1 << 20;
/// The directory in which open files can be addressed by their descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";

/// A new file.
#[derive(Debug)]
pub(crate) enum Draft {
    /// A new one.
    New {
        /// Its content.
        file: File,
        /// Whether it has a name already.
        is_named: bool,
    },
    /// One that stays if the copy is interrupted.
    Part(Begun),
}

impl Draft {
    /// Its content.
    pub(crate) fn file(&self) -> &File {
        match self {
            Self::New { file, .. } => file,
            Self::Part(part) => part.file(),
        }
    }

    /// Creates an empty file in a directory, of this future size. If it needs a name there, that is `temporary`.
    pub(crate) fn create(directory: BorrowedFd<'_>, temporary: &OsStr, size: u64) -> Result<Self, Errno> {
        let (flags, mode) = (OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        if size >= NAMELESS_FROM && rustix::fs::access(DESCRIPTORS, Access::EXISTS).is_ok() {
            match rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode) {
                Ok(file) => return Ok(Self::New { file: file.into(), is_named: false }),
                // The filesystem does not support unnamed files.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(directory, temporary, flags, mode)?;
        Ok(Self::New { file: file.into(), is_named: true })
    }

    /// Moves it into place, replacing an existing file. After a failure, `temporary` may be left.
    pub(crate) fn place(
        self,
        directory: BorrowedFd<'_>,
        temporary: &OsStr,
        name: &OsStr,
        facts: &Facts,
        attributes: &[&Attribute],
    ) -> Result<(), Errno> {
        let (file, is_named) = match self {
            Self::New { file, is_named } => (OwnedFd::from(file), is_named),
            Self::Part(part) => return part.place(name, facts, attributes),
        };
        settle_with(&file, facts, attributes)?;
        if !is_named {
            let own = format!("{DESCRIPTORS}/{}", file.as_raw_fd());
            let link = |to| rustix::fs::linkat(CWD, &*own, directory, to, AtFlags::SYMLINK_FOLLOW);
            match link(name) {
                Err(Errno::EXIST) => link(temporary)?,
                done => return done,
            }
        }
        rustix::fs::renameat(directory, temporary, directory, name)
    }
}
