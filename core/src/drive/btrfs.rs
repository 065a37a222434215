//! Clones by btrfs snapshots of the image's subvolume. This works for ordinary users too: they may snapshot
//! their own subvolumes, and remove empty ones by `rmdir`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::ByteSize;

use super::stage::{self, Filled, Stage};
use super::{Backend, DriveError, reflink};
use crate::os::subvolume::{self, MAGIC, ROOT_INODE};
use crate::progress::Progress;

/// Clones by btrfs snapshot.
#[derive(Debug, Clone, Copy)]
pub struct Btrfs;

impl Backend for Btrfs {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn clone_image(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        progress.check()?;
        let home = stage::parent_of(image)?;
        // An image that is on another filesystem, or not in a subvolume of this user, is reflinked into a new subvolume.
        let own = is_subvolume(home)?
            && home.metadata().map_err(|e| DriveError::io(home, e))?.uid()
                == rustix::process::geteuid().as_raw();
        if !own {
            return stage::create(drive, Filled::InOrder, make_subvolume, |stage| {
                reflink::fill(stage, image, size)
            });
        }
        let length = fs::metadata(image).map_err(|e| DriveError::io(image, e))?.len();
        stage::check_size(size, length)?;
        let snapshot = |path: &Path| {
            stage::check_room(home, 0)?;
            subvolume::snapshot(home, path).map_err(|e| DriveError::io(path, e.into()))
        };
        stage::create(drive, Filled::InOrder, snapshot, |stage| trim(stage, image, size))
    }

    fn create_empty(&self, drive: &Path, size: ByteSize) -> Result<PathBuf, DriveError> {
        stage::create(drive, Filled::Synced, make_subvolume, |stage| stage::empty_disk(stage, size))
    }
}

/// Leaves nothing but the disk in a fresh snapshot.
fn trim(stage: &Stage, image: &Path, size: ByteSize) -> Result<(), DriveError> {
    let path = stage.path();
    let name = image.file_name().unwrap_or_default();
    for entry in fs::read_dir(path).map_err(|e| DriveError::io(path, e))? {
        let entry = entry.map_err(|e| DriveError::io(path, e))?;
        if entry.file_name() == name {
            continue;
        }
        let kind = entry.file_type().map_err(|e| DriveError::io(path, e))?;
        let removed =
            if kind.is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
        removed.map_err(|e| DriveError::io(&entry.path(), e))?;
    }
    let disk = stage.disk();
    fs::rename(path.join(name), &disk).map_err(|e| DriveError::io(&disk, e))?;
    // The image is read-only to its owner; its clone is not.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&disk, mode).map_err(|e| DriveError::io(&disk, e))?;
    let file = fs::OpenOptions::new().write(true).open(&disk).map_err(|e| DriveError::io(&disk, e))?;
    stage::set_length_only(&file, &disk, size)
}

fn make_subvolume(path: &Path) -> Result<(), DriveError> {
    subvolume::create(path).map_err(|e| DriveError::io(path, e.into()))
}

/// Makes a subvolume; returns `false` if the directory is not on btrfs or this user may not.
pub(super) fn create_subvolume(path: &Path) -> Result<bool, DriveError> {
    if !is_btrfs(stage::parent_of(path)?)? {
        return Ok(false);
    }
    match subvolume::create(path) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Err(DriveError::Exists { path: path.to_owned() }),
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), "no subvolume");
            Ok(false)
        }
    }
}

/// Whether subvolumes can be made, snapshotted and removed in a directory.
pub(super) fn works(directory: &Path) -> Result<bool, DriveError> {
    if !is_btrfs(directory)? {
        return Ok(false);
    }
    let (first, second) = (stage::temporary(directory), stage::temporary(directory));
    let made = subvolume::create(&first).and_then(|()| subvolume::snapshot(&first, &second));
    let removed = [&first, &second].map(|path| stage::remove(path));
    if made == Err(rustix::io::Errno::NOSPC) {
        return Err(DriveError::full(directory, 0));
    }
    Ok(made.is_ok() && removed.iter().all(Result::is_ok))
}

fn is_btrfs(directory: &Path) -> Result<bool, DriveError> {
    let stat = rustix::fs::statfs(directory).map_err(|e| DriveError::io(directory, e.into()))?;
    Ok(stat.f_type == MAGIC)
}

fn is_subvolume(directory: &Path) -> Result<bool, DriveError> {
    let metadata = fs::metadata(directory).map_err(|e| DriveError::io(directory, e))?;
    Ok(metadata.ino() == ROOT_INODE && is_btrfs(directory)?)
}
