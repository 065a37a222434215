//! One daemon per state directory: a lock on a file, given back by the kernel when the process ends.

use std::io::{self, Write};
use std::path::Path;

use fs_err::File;
use rustix::fs::{FlockOperation, flock};

/// The lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    before: Option<u32>,
}

impl Lock {
    /// The process that had it before, which may be long gone.
    pub fn before(&self) -> Option<u32> {
        self.before
    }
}

/// Takes the lock, or `None` when another process has it. The file is close-on-exec, so that no child keeps it.
pub fn take(path: &Path) -> io::Result<Option<Lock>> {
    let mut file =
        fs_err::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let before = holder(path);
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(Some(Lock { _file: file, before }))
}

/// The process that holds the lock, as it wrote it down itself.
pub fn holder(path: &Path) -> Option<u32> {
    fs_err::read_to_string(path).ok()?.trim().parse().ok()
}
