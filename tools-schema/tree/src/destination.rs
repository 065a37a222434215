//! The directories of a destination: opened or made one name at a time, and never through a link.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::Errno;

use crate::error::TreeError;
use crate::source::DIRECTORY;

/// Flags for an existing directory, which may only allow passing through.
const PASSAGE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The attributes of a new file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    pub(crate) mode: u32,
    pub(crate) owner: Option<(u32, u32)>,
    /// Seconds and nanoseconds; `None` keeps the creation time.
    pub(crate) mtime: Option<(i64, u32)>,
}

impl Facts {
    pub(crate) fn times(&self) -> Option<Timestamps> {
        let (seconds, nanoseconds) = self.mtime?;
        Some(Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
        })
    }
}

/// A directory on the way to the current one.
struct Step {
    name: Vec<u8>,
    directory: OwnedFd,
    /// The attributes to set when it is left, if it was made here.
    made: Option<Facts>,
}

/// A destination, and the way from it to the current directory.
pub(crate) struct Destination {
    root: OwnedFd,
    /// The attributes to set on the root at the end, if it was made for this.
    root_made: Option<Facts>,
    steps: Vec<Step>,
    /// The owner of directories without an entry of their own.
    owner: Option<(u32, u32)>,
}

impl Destination {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self { root, root_made: None, steps: Vec::new(), owner: None }
    }

    /// Sets the owner of directories without an entry of their own.
    pub(crate) fn give_to(&mut self, owner: Option<(u32, u32)>) {
        self.owner = owner;
    }

    /// Returns the root's attributes.
    pub(crate) fn stat(&self) -> Result<Stat, Errno> {
        rustix::fs::fstat(&self.root)
    }

    /// Sets the attributes that the root gets at the end.
    pub(crate) fn describe_root(&mut self, facts: Facts) {
        self.root_made = Some(facts);
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Returns the current directory.
    pub(crate) fn here(&self) -> BorrowedFd<'_> {
        self.steps.last().map_or(self.root.as_fd(), |step| step.directory.as_fd())
    }

    /// Goes to a directory, and creates missing ones on the way.
    pub(crate) fn go(&mut self, names: &[&[u8]]) -> Result<(), TreeError> {
        let common = self.steps.iter().zip(names).take_while(|(step, name)| step.name == **name).count();
        while self.steps.len() > common {
            self.leave()?;
        }
        for at in common..names.len() {
            let name = OsStr::from_bytes(names[at]);
            match rustix::fs::openat(self.here(), name, PASSAGE, Mode::empty()) {
                Ok(directory) => {
                    self.steps.push(Step { name: names[at].to_vec(), directory, made: None });
                }
                Err(Errno::NOENT) => {
                    let facts = Facts { mode: 0o755, owner: self.owner, mtime: None };
                    self.make(&names[..=at], facts)?;
                }
                Err(error) => return Err(in_the_way(&names[..=at], error)),
            }
        }
        Ok(())
    }

    /// Creates the last of `names` in the current directory, and goes there; returns true if it is new.
    pub(crate) fn make(&mut self, names: &[&[u8]], facts: Facts) -> Result<bool, TreeError> {
        let Some(last) = names.last() else { return Ok(false) };
        let name = OsStr::from_bytes(last);
        let fail = |error: Errno| TreeError::file("create the directory", &names.join(&b'/'), error);
        let is_new = match rustix::fs::mkdirat(self.here(), name, Mode::from_raw_mode(0o700)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(fail(error)),
        };
        let flags = if is_new { DIRECTORY } else { PASSAGE };
        let opened = rustix::fs::openat(self.here(), name, flags, Mode::empty());
        let directory = opened.map_err(|error| in_the_way(names, error))?;
        self.steps.push(Step { name: last.to_vec(), directory, made: is_new.then_some(facts) });
        Ok(is_new)
    }

    /// Leaves all directories; each new one then gets its mode, owner and time.
    pub(crate) fn finish(&mut self) -> Result<(), TreeError> {
        while !self.steps.is_empty() {
            self.leave()?;
        }
        match self.root_made.take() {
            Some(facts) => settle(&self.root, &facts).map_err(|e| TreeError::file("finish", b".", e)),
            None => Ok(()),
        }
    }

    fn leave(&mut self) -> Result<(), TreeError> {
        let Some(step) = self.steps.pop() else { return Ok(()) };
        match step.made {
            Some(facts) => {
                settle(&step.directory, &facts).map_err(|error| TreeError::file("finish", &step.name, error))
            }
            None => Ok(()),
        }
    }
}

/// Sets the owner, mode and time of an open file.
pub(crate) fn settle(file: impl AsFd, facts: &Facts) -> Result<(), Errno> {
    if let Some((uid, gid)) = facts.owner {
        forgive(rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))))?;
    }
    // After the owner, because changing the owner clears setuid bits.
    rustix::fs::fchmod(&file, Mode::from_raw_mode(facts.mode))?;
    match facts.times() {
        Some(times) => rustix::fs::futimens(&file, &times),
        None => Ok(()),
    }
}

/// Sets the owner and time of something that cannot be opened as a file.
pub(crate) fn settle_name(directory: BorrowedFd<'_>, name: &OsStr, facts: &Facts) -> Result<(), Errno> {
    if let Some((uid, gid)) = facts.owner {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        forgive(rustix::fs::chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW))?;
    }
    match facts.times() {
        Some(times) => rustix::fs::utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW),
        None => Ok(()),
    }
}

/// Ignores a failure to change the owner, because only root can do that. tar does the same.
fn forgive(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(()),
        other => other,
    }
}

fn in_the_way(names: &[&[u8]], error: Errno) -> TreeError {
    let path = names.join(&b'/');
    match error {
        Errno::LOOP | Errno::NOTDIR => TreeError::refused(&path, "a link or a file is in the way"),
        error => TreeError::file("open the directory", &path, error),
    }
}
