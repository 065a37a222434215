//! Drives: writable copy-on-write clones of images, and empty disks.
//!
//! A drive is a directory with one sparse file, [`DISK`]. It is made under a temporary name in the same directory, and renamed
//! once it is complete: a crash leaves either the drive or something that [`Drives::sweep`] removes. By then it is synced to
//! disk; a copy instead has a marker until it is (see [`pending`]). There are three backends; [`Drives::probe`] tries them
//! where the drives are and takes the first that works: btrfs snapshots, reflinks (btrfs, XFS), copies of everything but holes
//! (any filesystem).
//!
//! This room does not know the store.

mod btrfs;
mod copy;
mod error;
mod locks;
mod pending;
mod reflink;
mod stage;

use std::collections::HashSet;
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
pub(crate) use stage::PREFIX as HALF_MADE;

use crate::ext4;
use crate::os::disk::allocated_bytes;
use crate::os::failpoint;
use crate::progress::Progress;
use stage::Filled;

/// The disk's name in a drive's directory.
pub const DISK: &str = "disk.ext4";

/// How many bytes must stay free on the disk when a drive is made, copied or saved.
pub(crate) const KEEP_FREE: u64 = 64 << 20;

/// A way to copy drives. All methods block.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name: `btrfs`, `reflink` or `copy`.
    fn name(&self) -> &'static str;

    /// Makes the drive `drive` (a directory that does not exist yet) from the file `image`, with a disk of `size`.
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

    /// Makes a drive's disk longer; its filesystem is not changed.
    fn grow(&self, drive: &Path, size: ByteSize) -> Result<(), DriveError> {
        stage::lengthen(&drive.join(DISK), size)
    }

    /// Removes a drive; a missing drive is not an error.
    fn delete(&self, drive: &Path) -> Result<(), DriveError> {
        stage::delete(drive)
    }

    /// How many bytes a drive occupies on disk, including blocks that it shares with its image.
    fn allocated_bytes(&self, drive: &Path) -> Result<u64, DriveError> {
        let disk = drive.join(DISK);
        allocated_bytes(&disk).map_err(|e| DriveError::io(&disk, e))
    }
}

/// Finds the best backend for drives in `directory` by trying.
pub fn probe(directory: &Path) -> Result<Box<dyn Backend>, DriveError> {
    match try_out(directory) {
        // A full disk makes trying impossible, so the filesystem's type has to do.
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
    /// The drives in `directory`, with the best backend for it. Makes the directory if it is missing.
    pub fn probe(directory: &Path) -> Result<Self, DriveError> {
        fs::create_dir_all(directory).map_err(|e| DriveError::io(directory, e))?;
        let backend = Arc::from(probe(directory)?);
        tracing::debug!(?backend, directory = %directory.display(), "drive backend chosen");
        Ok(Self { directory: directory.to_owned(), backend })
    }

    /// The drives in `directory`, with a given backend.
    pub fn with(directory: &Path, backend: impl Backend + 'static) -> Self {
        Self { directory: directory.to_owned(), backend: Arc::new(backend) }
    }

    /// The backend's name.
    pub fn backend(&self) -> &'static str {
        self.backend.name()
    }

    /// Removes what a crash left half-made, but copies of these names. Call it only at start, while nothing is being made.
    pub fn sweep(&self, kept: &HashSet<String>) -> Result<(), DriveError> {
        stage::sweep(&self.directory, kept)
    }

    /// Makes a drive from an image (or from another drive's disk that nobody writes to) and grows its filesystem to `size`, so
    /// that the guest has all of the space at once.
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

    /// Syncs a copied drive to disk. Call it before anything changes the drive: before a VM runs on it or anything writes to
    /// it, so that no later writes are lost with the copy.
    pub async fn settle(&self, drive: &Path) -> Result<(), DriveError> {
        let drive = drive.to_owned();
        blocking(move || pending::settle(&drive)).await
    }

    /// The same in the background. A failure is reported when the drive is used.
    fn settle_later(&self, drive: &Path) {
        let drive = drive.to_owned();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = pending::settle(&drive) {
                tracing::warn!(drive = %drive.display(), %error, "a copied drive is not on the disk");
            }
        });
    }

    /// For the start of the daemon: syncs copies that an earlier daemon left unsynced, and returns those that a crash of the
    /// host destroyed.
    pub(crate) fn settle_all(&self) -> Result<Vec<(PathBuf, Origin)>, DriveError> {
        let (lost, here): (Vec<_>, Vec<_>) =
            pending::marked(&self.directory)?.into_iter().partition(|(_, lost)| lost.is_some());
        for (drive, _) in here {
            self.settle_later(&drive);
        }
        Ok(lost.into_iter().filter_map(|(drive, origin)| Some((drive, origin?))).collect())
    }

    /// Makes a lost drive again from its image.
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

    /// Makes a drive that is an exact copy of a file, synced to disk.
    pub(crate) async fn copy_exactly(
        &self,
        file: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<(), DriveError> {
        self.copy(file, drive, size, progress).await?;
        if let Err(error) = self.settle(drive).await {
            self.delete(drive).await?;
            return Err(error);
        }
        Ok(())
    }

    /// The same under a temporary name, which [`Drives::put_in_place`] makes its drive's. Unless it is kept, it is removed at the next start.
    pub(crate) async fn stage_copy(
        &self,
        file: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        let fresh = stage::temporary(&self.directory);
        self.copy_exactly(file, &fresh, size, progress).await?;
        Ok(fresh)
    }

    /// Puts what [`Drives::stage_copy`] made in the place of a drive. It can be called again if it was cut off, and does nothing once it is done. The
    /// old drive stays until [`Drives::forget_replaced`]. No VM may be using the drive.
    pub(crate) async fn put_in_place(&self, drive: &Path, staged: &Path) -> Result<(), DriveError> {
        let (drive, staged) = (drive.to_owned(), staged.to_owned());
        blocking(move || stage::place(&drive, &staged)).await
    }

    /// Removes the drive that was replaced by `staged`. Without that it is removed at the next start.
    pub(crate) async fn forget_replaced(&self, staged: &Path) -> Result<(), DriveError> {
        let staged = staged.to_owned();
        blocking(move || stage::remove_placed(&staged)).await
    }

    /// What is wrong with a drive, if known.
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

    /// Makes a drive's disk larger, and also its filesystem if no guest has written to it; otherwise the next guest that mounts
    /// it does that. No VM may be using the drive.
    pub async fn grow(&self, drive: &Path, size: ByteSize, progress: &Progress) -> Result<(), DriveError> {
        self.settle(drive).await?;
        let (backend, path) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.grow(&path, size)).await?;
        failpoint::reach("drive-lengthened");
        Ok(ext4::grow(&drive.join(DISK), progress).await?)
    }

    /// Labels the filesystem on a drive that no running VM uses. An error if it has no filesystem.
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

    /// Makes a drive's disk larger while a VM uses it; the guest grows the filesystem.
    pub async fn lengthen(&self, drive: &Path, size: ByteSize) -> Result<(), DriveError> {
        let (backend, path) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.grow(&path, size)).await
    }

    /// Removes a drive; a missing drive is not an error.
    pub async fn delete(&self, drive: &Path) -> Result<(), DriveError> {
        let (backend, drive) = (self.backend.clone(), drive.to_owned());
        blocking(move || backend.delete(&drive)).await
    }

    /// How many bytes a drive occupies on disk.
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

/// Makes a directory that drives can be cloned from quickly: a subvolume on btrfs, a plain directory elsewhere.
pub fn create_home(directory: &Path) -> Result<(), DriveError> {
    if btrfs::create_subvolume(directory)? {
        return Ok(());
    }
    fs::create_dir(directory).map_err(|e| DriveError::io(directory, e))
}

/// Grows a file with an ext4 filesystem, and the filesystem, to at least this size. Nothing may be using it.
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
