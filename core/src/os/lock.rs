//! Ensures one daemon per state directory: a file lock that the kernel releases when the process ends.

use std::io::{self, Seek, Write};
use std::path::Path;
use std::time::Duration;

use fs_err::File;
use rustix::fs::{FlockOperation, flock};

/// The lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    before: Option<u32>,
}

impl Lock {
    /// The process that held it before; it may have ended long ago.
    pub fn before(&self) -> Option<u32> {
        self.before
    }
}

/// How long the lock may outlive its daemon: a child of a killed process holds it until it executes its program.
const ORPHANED_MAX: Duration = Duration::from_secs(2);

/// Takes the lock; `None` if another process keeps holding it.
pub async fn take_in_time(path: &Path) -> io::Result<Option<Lock>> {
    let deadline = tokio::time::Instant::now() + ORPHANED_MAX;
    loop {
        let lock = take(path)?;
        if lock.is_some() || tokio::time::Instant::now() >= deadline {
            return Ok(lock);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Takes the lock; `None` if another process holds it. The file is close-on-exec, so that no program keeps it.
fn take(path: &Path) -> io::Result<Option<Lock>> {
    let mut file =
        fs_err::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let before = holder(path);
    // Written in place and with a fixed length, which works on a full disk too. If it fails, the lock is valid all the same.
    let written = file.rewind().and_then(|()| writeln!(file, "{:<10}", std::process::id()));
    if let Err(error) = written {
        tracing::warn!(%error, "cannot write the process id to the lock of the state directory");
    }
    Ok(Some(Lock { _file: file, before }))
}

/// The process that holds the lock, according to its own entry.
pub fn holder(path: &Path) -> Option<u32> {
    fs_err::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_that_is_given_back_soon_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = take_in_time(&path).await.unwrap().unwrap();
        assert!(take_in_time(&path).await.unwrap().is_none());
        let (second, ()) = tokio::join!(take_in_time(&path), async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(first);
        });
        assert_eq!(second.unwrap().unwrap().before(), Some(std::process::id()));
    }
}
