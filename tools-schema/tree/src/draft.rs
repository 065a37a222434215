//! A file that is not in its place yet. A large one has no name until then: nothing is left of it if whoever unpacks is killed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::destination::{Facts, settle};

/// From which size on a file has no name at first. For small ones it takes longer than to write them.
const NAMELESS_FROM: u64 = 1 << 20;
/// Where open files have a name in any case.
const DESCRIPTORS: &str = "/proc/self/fd";

/// The file.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Its content.
    pub(crate) file: File,
    is_named: bool,
}

impl Draft {
    /// An empty one of this size to be, in a directory; called `temporary` there if it needs a name.
    pub(crate) fn create(directory: BorrowedFd<'_>, temporary: &OsStr, size: u64) -> Result<Self, Errno> {
        let (flags, mode) = (OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        if size >= NAMELESS_FROM && rustix::fs::access(DESCRIPTORS, Access::EXISTS).is_ok() {
            match rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode) {
                Ok(file) => return Ok(Self { file: file.into(), is_named: false }),
                // A filesystem that has no files without names.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(directory, temporary, flags, mode)?;
        Ok(Self { file: file.into(), is_named: true })
    }

    /// Puts it in its place, over a file that is there. After a failure `temporary` may be there.
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
