//! One daemon per state directory: a lock on a file, given back by the kernel when the process ends.

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
    /// The process that had it before, which may be long gone.
    pub fn before(&self) -> Option<u32> {
        self.before
    }
}

/// How long a lock may be held by nobody: the child of a killed process has it until it runs its program.
const ORPHANED_MAX: Duration = Duration::from_secs(2);

/// Takes the lock, or `None` when another process has it and keeps it.
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

/// Takes the lock, or `None` when another process has it. The file is close-on-exec, so that no program keeps it.
fn take(path: &Path) -> io::Result<Option<Lock>> {
    let mut file =
        fs_err::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let before = holder(path);
    // In place, and always as long: that works on a full disk too. Where it does not, the lock is as good without it.
    let written = file.rewind().and_then(|()| writeln!(file, "{:<10}", std::process::id()));
    if let Err(error) = written {
        tracing::warn!(%error, "the lock of the state directory does not say who holds it");
    }
    Ok(Some(Lock { _file: file, before }))
}

/// The process that holds the lock, as it wrote it down itself.
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
