//! A file that is not in place yet. A large one has no name until then, so nothing is left if the unpacking process is killed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::destination::{Facts, settle};

/// Files of at least this size have no name at first. For smaller ones that would take longer than writing them.
const NAMELESS_FROM: u64 = 1 << 20;
/// The directory in which open files can be addressed by their descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";

/// A new file.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Its content.
    pub(crate) file: File,
    is_named: bool,
}

impl Draft {
    /// Creates an empty file in a directory, of this future size. If it needs a name there, that is `temporary`.
    pub(crate) fn create(directory: BorrowedFd<'_>, temporary: &OsStr, size: u64) -> Result<Self, Errno> {
        let (flags, mode) = (OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        if size >= NAMELESS_FROM && rustix::fs::access(DESCRIPTORS, Access::EXISTS).is_ok() {
            match rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode) {
                Ok(file) => return Ok(Self { file: file.into(), is_named: false }),
                // The filesystem does not support unnamed files.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(directory, temporary, flags, mode)?;
        Ok(Self { file: file.into(), is_named: true })
    }

    /// Moves it into place, replacing an existing file. After a failure, `temporary` may be left.
    pub(crate) fn place(
        self,
        directory: BorrowedFd<'_>,
        temporary: &OsStr,
        name: &OsStr,
        facts: &Facts,
    ) -> Result<(), Errno> {
        let file = OwnedFd::from(self.file);
        settle(&file, facts)?;
        if !self.is_named {
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
