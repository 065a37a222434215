//! Drives: writable copy-on-write clones of images, and empty disks.
//!
//! A drive is a directory with one sparse file, [`DISK`]. It is made under a temporary name beside its place and
//! renamed once it is whole, so that a crash leaves either the drive or something that [`Drives::sweep`] removes. It is on
//! the disk then; or, a copy, marked until it is (see [`pending`]). Three backends do the copying; [`Drives::probe`] tries
//! them out where the drives are and takes the first that works: btrfs snapshots, reflinks (btrfs, XFS), copies of what is
//! not a hole (everywhere).
//!
//! Nothing here knows the store.

mod btrfs;
mod copy;
mod error;
mod locks;
mod pending;
mod reflink;
mod stage;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err as fs;
use nexus_schema::ByteSize;

pub use btrfs::Btrfs;
pub use copy::Copy;
pub(crate) use copy::copy_file;
pub use error::DriveError;
pub(crate) use locks::{Locked, Locks};
pub(crate) use pending::Origin;
pub use reflink::Reflink;

use crate::ext4;
use crate::os::disk::allocated_bytes;
use crate::os::failpoint;
use crate::progress::Progress;
use stage::Filled;

/// The disk's name in a drive's directory.
pub const DISK: &str = "disk.ext4";

/// What stays free for everybody else when a drive is made, in bytes.
const KEEP_FREE: u64 = 64 << 20;

/// A way to copy drives. Everything blocks.
pub trait Backend: fmt::Debug + Send + Sync {
    /// What it is called: `btrfs`, `reflink` or `copy`.
    fn name(&self) -> &'static str;

    /// Makes the drive `drive` (a directory that is not there yet) from the file `image`; its disk is `size` long.
    fn clone_image(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError>;

    /// Makes the drive `drive` with an empty disk.
    fn create_empty(&self, drive: &Path, size: ByteSize) -> Result<PathBuf, DriveError> {
        stage::create(drive, Filled::Synced, stage::make_directory, |stage| stage::empty_disk(stage, size))
    }

    /// Makes a drive's disk longer; the filesystem in it stays as it is.
    fn grow(&self, drive: &Path, size: ByteSize) -> Result<(), DriveError> {
        stage::lengthen(&drive.join(DISK), size)
    }

    /// Removes a drive; one that is not there is no error.
    fn delete(&self, drive: &Path) -> Result<(), DriveError> {
        stage::delete(drive)
    }

    /// What a drive takes on the disk, in bytes; what it shares with its image counts too.
    fn allocated_bytes(&self, drive: &Path) -> Result<u64, DriveError> {
        let disk = drive.join(DISK);
        allocated_bytes(&disk).map_err(|e| DriveError::io(&disk, e))
    }
}

/// The backend that is best for drives in `directory`, found by trying.
pub fn probe(directory: &Path) -> Result<Box<dyn Backend>, DriveError> {
    match try_out(directory) {
        // A full disk lets nothing be tried: what the filesystem can do is known well enough.
        Err(DriveError::DiskFull { .. }) => Ok(match stage::filesystem(directory)? {
            stage::BTRFS => Box::new(Btrfs),
            stage::XFS => Box::new(Reflink),
            _ => Box::new(Copy),
        }),
        tried => tried,
    }
}

fn try_out(directory: &Path) -> Result<Box<dyn Backend>, DriveError> {
    if btrfs::works(directory)? {
        return Ok(Box::new(Btrfs));
    }
    if reflink::works(directory)? {
        return Ok(Box::new(Reflink));
    }
    Ok(Box::new(Copy))
}

/// All drives of a directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Drives {
    directory: PathBuf,
    backend: Arc<dyn Backend>,
}

impl Drives {
    /// The drives in `directory`, which is made if it is missing, by the best backend there.
    pub fn probe(directory: &Path) -> Result<Self, DriveError> {
        fs::create_dir_all(directory).map_err(|e| DriveError::io(directory, e))?;
        let backend = Arc::from(probe(directory)?);
        tracing::debug!(?backend, directory = %directory.display(), "drive backend chosen");
        Ok(Self { directory: directory.to_owned(), backend })
    }

    /// The drives in `directory` by a given backend.
    pub fn with(directory: &Path, backend: impl Backend + 'static) -> Self {
        Self { directory: directory.to_owned(), backend: Arc::new(backend) }
    }

    /// What the backend is called.
    pub fn backend(&self) -> &'static str {
        self.backend.name()
    }

    /// Removes what a crash left half-made. Only for the start, when nothing is being made.
    pub fn sweep(&self) -> Result<(), DriveError> {
        stage::sweep(&self.directory)
    }

    /// Makes a drive from an image (or from another drive's disk that nobody writes to) and grows its filesystem to
    /// `size`, so that the guest finds all of it at once.
    pub async fn clone_image(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        let disk = self.copy(image, drive, size, progress).await?;
        match ext4::grow(&disk, progress).await {
            Ok(()) => {
                self.settle_later(drive);
                Ok(disk)
            }
            Err(error) => {
                self.delete(drive).await?;
                Err(error.into())
            }
        }
    }

    async fn copy(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        let backend = self.backend.clone();
        let (from, to, watched) = (image.to_owned(), drive.to_owned(), progress.clone());
        blocking(move || {
            pending::check(stage::parent_of(&from)?)?;
            backend.clone_image(&from, &to, size, &watched)
        })
        .await
    }

    /// Puts a drive on the disk that was told of before. Before anything changes it: nothing may run on it, or write to it, that
    /// would be lost with it.
    pub async fn settle(&self, drive: &Path) -> Result<(), DriveError> {
        let drive = drive.to_owned();
        blocking(move || pending::settle(&drive)).await
    }

    /// The same, and nobody waits for it. What fails says so when the drive is used.
    fn settle_later(&self, drive: &Path) {
        let drive = drive.to_owned();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = pending::settle(&drive) {
                tracing::warn!(drive = %drive.display(), %error, "a copied drive is not on the disk");
            }
        });
    }

    /// For the start: puts on the disk what an earlier daemon did not wait for, and gives what is lost because the host went down.
    pub(crate) fn settle_all(&self) -> Result<Vec<(PathBuf, Origin)>, DriveError> {
        let (lost, here): (Vec<_>, Vec<_>) =
            pending::marked(&self.directory)?.into_iter().partition(|(_, lost)| lost.is_some());
        for (drive, _) in here {
            self.settle_later(&drive);
        }
        Ok(lost.into_iter().filter_map(|(drive, origin)| Some((drive, origin?))).collect())
    }

    /// Makes a lost drive again.
    pub(crate) async fn clone_again(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<(), DriveError> {
        let fresh = stage::temporary(&self.directory);
        let made = async {
            let disk = self.copy(image, &fresh, size, progress).await?;
            ext4::grow(&disk, progress).await?;
            self.settle(&fresh).await
        };
        if let Err(error) = made.await {
            self.delete(&fresh).await?;
            return Err(error);
        }
        let drive = drive.to_owned();
        blocking(move || stage::replace(&drive, &fresh)).await
    }

    /// What is wrong with a drive, if anything is known to be.
    pub async fn problem(&self, drive: &Path) -> Option<String> {
        let drive = drive.to_owned();
        let error = blocking(move || pending::check(&drive)).await.err()?;
        Some(match error.hint() {
            Some(hint) => format!("{error}; {hint}"),
            None => error.to_string(),
        })
    }

    /// Makes a drive with an empty disk.
    pub async fn create_empty(&self, drive: &Path, size: ByteSize) -> Result<PathBuf, DriveError> {
        let (backend, drive) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.create_empty(&drive, size)).await
    }

    /// Makes a drive's disk larger, and the filesystem in it if no guest has written to it: else the next guest that mounts it
    /// does that. Not while a VM has it.
    pub async fn grow(&self, drive: &Path, size: ByteSize, progress: &Progress) -> Result<(), DriveError> {
        self.settle(drive).await?;
        let (backend, path) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.grow(&path, size)).await?;
        failpoint::reach("drive-lengthened");
        Ok(ext4::grow(&drive.join(DISK), progress).await?)
    }

    /// Gives the filesystem on a drive that no running VM has a name of its own. An error if there is none.
    pub async fn label(&self, drive: &Path, label: &str, progress: &Progress) -> Result<(), DriveError> {
        self.settle(drive).await?;
        Ok(ext4::label(&drive.join(DISK), label, progress).await?)
    }

    /// Makes a drive with an empty ext4 filesystem.
    pub async fn create_formatted(
        &self,
        drive: &Path,
        size: ByteSize,
        label: &str,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        let disk = self.create_empty(drive, size).await?;
        match ext4::format(&disk, label, progress).await {
            Ok(()) => Ok(disk),
            Err(error) => {
                self.delete(drive).await?;
                Err(error.into())
            }
        }
    }

    /// Makes a drive's disk larger while a VM has it; the guest grows the filesystem.
    pub async fn lengthen(&self, drive: &Path, size: ByteSize) -> Result<(), DriveError> {
        let (backend, path) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.grow(&path, size)).await
    }

    /// Removes a drive; one that is not there is no error.
    pub async fn delete(&self, drive: &Path) -> Result<(), DriveError> {
        let (backend, drive) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.delete(&drive)).await
    }

    /// What a drive takes on the disk, in bytes.
    pub async fn allocated_bytes(&self, drive: &Path) -> Result<u64, DriveError> {
        let (backend, drive) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.allocated_bytes(&drive)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriveError> + Send + 'static,
) -> Result<T, DriveError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| DriveError::Worker)?
}

/// Makes a directory that drives can be cloned from in no time: a subvolume on btrfs, a plain one elsewhere.
pub fn create_home(directory: &Path) -> Result<(), DriveError> {
    if btrfs::create_subvolume(directory)? {
        return Ok(());
    }
    fs::create_dir(directory).map_err(|e| DriveError::io(directory, e))
}

/// Makes a file with an ext4 filesystem, and that filesystem, at least so large. Not while anything has it.
pub(crate) async fn lengthen(file: &Path, size: ByteSize, progress: &Progress) -> Result<(), DriveError> {
    let now = fs::metadata(file).map_err(|e| DriveError::io(file, e))?.len();
    if now < size.as_bytes() {
        stage::lengthen(file, size)?;
        ext4::grow_now(file, progress).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
