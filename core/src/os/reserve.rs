//! A file that only reserves space. On a full disk it is deleted, so that the daemon can start and delete other things.

use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;
use rustix::fs::FallocateFlags;

use super::disk::free_bytes;

/// Its size in bytes. Smaller than what a guest that is paused for lack of space needs to continue.
const SIZE: u64 = 8 << 20;
/// The disk counts as full below this many free bytes.
const FULL: u64 = 4 << 20;
/// The file is made again above this many free bytes.
const ENOUGH: u64 = 128 << 20;

/// The reserve of one state directory. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// The reserve at a path; does nothing yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Frees the space if the disk is full; returns whether it was full. Blocks for milliseconds.
    pub(crate) fn give_up_if_full(&self) -> bool {
        let is_full =
            self.directory().is_some_and(|directory| free_bytes(directory).is_ok_and(|free| free < FULL));
        if !is_full {
            return false;
        }
        // On some filesystems a full disk allows truncating a file, but not removing it.
        let emptied = fs::OpenOptions::new().write(true).open(&self.path).and_then(|file| file.set_len(0));
        match emptied.and_then(|()| fs::remove_file(&self.path)) {
            Ok(()) => tracing::warn!("the disk of the state directory is full: deleted the reserve file"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, "cannot delete the reserve file on a full disk"),
        }
        true
    }

    /// Makes it if it is missing and there is enough space. Blocks for milliseconds.
    pub(crate) fn keep(&self) {
        let has_room = || {
            let free = self.directory().and_then(|directory| free_bytes(directory).ok());
            free.is_some_and(|free| free >= ENOUGH)
        };
        if self.path.exists() || !has_room() {
            return;
        }
        if let Err(error) = self.make() {
            tracing::debug!(%error, "cannot create the reserve file for a full disk");
            fs::remove_file(&self.path).ok();
        }
    }

    fn make(&self) -> io::Result<()> {
        let file = fs::File::create(&self.path)?;
        Ok(rustix::fs::fallocate(file.file(), FallocateFlags::empty(), 0, SIZE)?)
    }

    fn directory(&self) -> Option<&Path> {
        self.path.parent()
    }
}
