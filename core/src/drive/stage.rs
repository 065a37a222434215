//! Makes and removes a drive's directory atomically: a crash never leaves half of one under its name.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use fs_err as fs;
use nexus_schema::ByteSize;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{DISK, DriveError, KEEP_FREE};
use crate::os::failpoint;

/// The prefix of half-made and half-removed directories.
pub(crate) const PREFIX: &str = ".nexus-";
/// The unit of a disk's length.
const UNIT: u64 = 4096;

/// A directory under a temporary name. It is removed when dropped, unless it was renamed to its final name.
pub(super) struct Stage {
    path: PathBuf,
    kept: bool,
}

impl Stage {
    /// The directory.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The disk in it.
    pub(super) fn disk(&self) -> PathBuf {
        self.path.join(DISK)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "half-made drive not removed");
        }
    }
}

/// What of a new drive is already on the disk when it is renamed to its final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Only what the filesystem's own journal or commit keeps in order: one sync of the name makes everything durable. That is
    /// how btrfs and XFS work, and clones have no dirty data of their own.
    InOrder,
    /// The disk was synced.
    Synced,
    /// The disk is not synced yet but has a marker, which must be durable when the name is.
    Marked,
}

/// Makes `drive`: `make` makes its directory under a temporary name, `fill` its disk; then it is renamed.
pub(super) fn create(
    drive: &Path,
    filled: Filled,
    make: impl FnOnce(&Path) -> Result<(), DriveError>,
    fill: impl FnOnce(&Stage) -> Result<(), DriveError>,
) -> Result<PathBuf, DriveError> {
    let parent = parent_of(drive)?;
    if fs::symlink_metadata(drive).is_ok() {
        return Err(DriveError::Exists { path: drive.to_owned() });
    }
    let path = temporary(parent);
    make(&path)?;
    let mut stage = Stage { path, kept: false };
    fill(&stage)?;
    if filled == Filled::Synced || filled == Filled::Marked && !keeps_order(parent)? {
        sync_directory(&stage.path)?;
    }
    failpoint::reach("drive-staged");
    match renameat_with(CWD, &stage.path, CWD, drive, RenameFlags::NOREPLACE) {
        Ok(()) => stage.kept = true,
        Err(rustix::io::Errno::EXIST) => return Err(DriveError::Exists { path: drive.to_owned() }),
        Err(error) => return Err(DriveError::io(drive, error.into())),
    }
    sync_directory(parent)?;
    failpoint::reach("drive-named");
    Ok(drive.join(DISK))
}

/// A plain directory.
pub(super) fn make_directory(path: &Path) -> Result<(), DriveError> {
    fs::create_dir(path).map_err(|e| DriveError::io(path, e))
}

/// An empty disk.
pub(super) fn empty_disk(stage: &Stage, size: ByteSize) -> Result<(), DriveError> {
    check_room(stage.path(), 0)?;
    let disk = stage.disk();
    let file = fs::File::create_new(&disk).map_err(|e| DriveError::io(&disk, e))?;
    set_length(&file, &disk, size)
}

/// Fails unless `bytes` more fit into `directory`, with some space to spare for others.
pub(super) fn check_room(directory: &Path, bytes: u64) -> Result<(), DriveError> {
    let free = crate::os::disk::free_bytes(directory).map_err(|e| DriveError::io(directory, e))?;
    let needed = bytes.saturating_add(KEEP_FREE);
    if free < needed { Err(DriveError::full(directory, needed)) } else { Ok(()) }
}

/// Sets the length of an open disk and syncs it.
pub(super) fn set_length(file: &fs::File, path: &Path, size: ByteSize) -> Result<(), DriveError> {
    set_length_only(file, path, size)?;
    file.sync_all().map_err(|e| DriveError::io(path, e))
}

/// Sets the length of an open disk without a sync, relying on the filesystem's order ([`Filled::InOrder`]).
pub(super) fn set_length_only(file: &fs::File, path: &Path, size: ByteSize) -> Result<(), DriveError> {
    let length = size.as_bytes().div_ceil(UNIT).saturating_mul(UNIT);
    file.set_len(length).map_err(|e| DriveError::io(path, e))
}

/// Fails if `size` is smaller than `content` bytes need.
pub(super) fn check_size(size: ByteSize, content: u64) -> Result<(), DriveError> {
    if size.as_bytes() < content {
        return Err(DriveError::TooSmall { size, minimum: ByteSize::bytes(content) });
    }
    Ok(())
}

/// Makes a disk longer.
pub(super) fn lengthen(disk: &Path, size: ByteSize) -> Result<(), DriveError> {
    let file = fs::OpenOptions::new().write(true).open(disk).map_err(|e| DriveError::io(disk, e))?;
    let now = file.metadata().map_err(|e| DriveError::io(disk, e))?.len();
    check_size(size, now)?;
    set_length(&file, disk, size)
}

/// Replaces a drive by the one at `with`, and removes the old one.
pub(super) fn replace(drive: &Path, with: &Path) -> Result<(), DriveError> {
    renameat_with(CWD, with, CWD, drive, RenameFlags::EXCHANGE)
        .map_err(|e| DriveError::io(drive, e.into()))?;
    sync_directory(parent_of(drive)?)?;
    remove(with)
}

/// Puts the directory `staged` in the place of a drive, and moves the old drive aside. Can be repeated, wherever it was cut off.
pub(super) fn place(drive: &Path, staged: &Path) -> Result<(), DriveError> {
    let parent = parent_of(drive)?;
    let old = old_of(staged);
    if is_there(staged)? {
        match fs::rename(drive, &old) {
            // It was moved away before.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            moved => moved.map_err(|e| DriveError::io(drive, e))?,
        }
        failpoint::reach("rollback-drive-away");
        fs::rename(staged, drive).map_err(|e| DriveError::io(drive, e))?;
    } else if !is_there(drive)? {
        return Err(DriveError::io(staged, io::ErrorKind::NotFound.into()));
    }
    sync_directory(parent)
}

/// Removes what [`place`] moved away, if it is still there.
pub(super) fn remove_placed(staged: &Path) -> Result<(), DriveError> {
    remove(&old_of(staged))
}

/// Where a drive is moved that makes room for `staged`.
fn old_of(staged: &Path) -> PathBuf {
    let mut name = staged.file_name().unwrap_or_default().to_owned();
    name.push("-old");
    staged.with_file_name(name)
}

fn is_there(path: &Path) -> Result<bool, DriveError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(DriveError::io(path, error)),
    }
}

/// Removes a drive: first renames it, then removes the rest.
pub(super) fn delete(drive: &Path) -> Result<(), DriveError> {
    let parent = parent_of(drive)?;
    let gone = temporary(parent);
    match fs::rename(drive, &gone) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(DriveError::io(drive, error)),
    }
    sync_directory(parent)?;
    failpoint::reach("drive-unnamed");
    remove(&gone)
}

/// Removes everything half-made or half-removed in a directory of drives, but what is in `kept`, by name.
pub(super) fn sweep(directory: &Path, kept: &HashSet<String>) -> Result<(), DriveError> {
    for entry in fs::read_dir(directory).map_err(|e| DriveError::io(directory, e))? {
        let entry = entry.map_err(|e| DriveError::io(directory, e))?;
        let name = entry.file_name();
        let is_kept = name.to_str().is_some_and(|name| kept.contains(name));
        if name.as_encoded_bytes().starts_with(PREFIX.as_bytes()) && !is_kept {
            tracing::info!(path = %entry.path().display(), "half-made drive removed");
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a directory with its contents. An emptied btrfs subvolume can be removed by `rmdir` like any directory.
pub(super) fn remove(path: &Path) -> Result<(), DriveError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(DriveError::io(path, error)),
        _ => Ok(()),
    }
}

/// An unused name in `parent`.
pub(super) fn temporary(parent: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    parent.join(format!("{PREFIX}{}-{now}-{number}", std::process::id()))
}

pub(super) fn parent_of(drive: &Path) -> Result<&Path, DriveError> {
    drive.parent().ok_or_else(|| DriveError::io(drive, io::ErrorKind::InvalidInput.into()))
}

/// Whether names become durable in the order in which they were made: through a journal (ext4, XFS) or a common commit (btrfs).
fn keeps_order(directory: &Path) -> Result<bool, DriveError> {
    Ok([EXT4, XFS, BTRFS].contains(&filesystem(directory)?))
}

/// linux/magic.h: EXT4_SUPER_MAGIC
const EXT4: u64 = 0xef53;
/// linux/magic.h: XFS_SUPER_MAGIC
pub(super) const XFS: u64 = 0x5846_5342;
/// linux/magic.h: BTRFS_SUPER_MAGIC
pub(super) const BTRFS: u64 = 0x9123_683e;

/// The magic number of a directory's filesystem.
pub(super) fn filesystem(directory: &Path) -> Result<u64, DriveError> {
    let stat = rustix::fs::statfs(directory).map_err(|e| DriveError::io(directory, e.into()))?;
    Ok(u64::try_from(stat.f_type).unwrap_or_default())
}

pub(super) fn sync_directory(directory: &Path) -> Result<(), DriveError> {
    let synced = fs::File::open(directory).and_then(|d| d.sync_all());
    synced.map_err(|e| DriveError::io(directory, e))
}
