//! Copies that are reported before they are synced to disk.
//!
//! Once written, a copy is complete for every process of this host, but it reaches the disk only later. Until then a marker is
//! beside the drive's disk: an empty file whose name says what was copied, and during which boot of the host.
//!
//! ```text
//! copied, marked ─> renamed ─> name and marker synced ─> reported
//!                              in the background, or before anything changes it: disk synced ─> marker removed
//! ```
//!
//! Nothing changes a drive that has a marker, so such a drive is a plain copy. If the host crashed before the marker was
//! removed, the copy is not trusted: the copy of an image is made again, any other is reported lost.

use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;

use super::{DISK, DriveError, stage};
use crate::os::failpoint;

/// The prefix of markers.
const MARK: &str = "unsynced-";
/// Stands in place of the boot if syncing failed.
const FAILED: &str = "failed";

/// What a drive was copied from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// An image, which never changes.
    Image,
    /// Another drive.
    Drive,
}

impl Origin {
    /// What a disk is.
    pub(super) fn of(disk: &Path) -> Self {
        if disk.file_name().is_some_and(|name| name == DISK) { Self::Drive } else { Self::Image }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Drive => "drive",
        }
    }
}

/// A marker that was found.
struct Mark {
    path: PathBuf,
    origin: Origin,
    run: String,
}

/// Marks the drive in `directory` as not synced.
pub(super) fn mark(directory: &Path, origin: Origin, run: &str) -> Result<(), DriveError> {
    let path = directory.join(name(origin, run));
    fs::File::create_new(&path).map(drop).map_err(|e| DriveError::io(&path, e))
}

fn name(origin: Origin, run: &str) -> String {
    format!("{MARK}{}-{run}", origin.as_str())
}

fn find(drive: &Path) -> Result<Option<Mark>, DriveError> {
    let entries = match fs::read_dir(drive) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DriveError::io(drive, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| DriveError::io(drive, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(told) = name.strip_prefix(MARK) else { continue };
        // A marker that this code did not write is not taken for the copy of an image.
        let (origin, run) = match told.split_once('-') {
            Some(("image", run)) => (Origin::Image, run),
            Some((_, run)) => (Origin::Drive, run),
            None => (Origin::Drive, FAILED),
        };
        return Ok(Some(Mark { path: entry.path(), origin, run: run.to_owned() }));
    }
    Ok(None)
}

/// If the drive was not synced when the host crashed: what it was copied from.
pub(super) fn lost(drive: &Path) -> Result<Option<Origin>, DriveError> {
    let mark = find(drive)?.filter(|mark| Some(&*mark.run) != crate::os::boot_id::of_host());
    Ok(mark.map(|mark| mark.origin))
}

/// Fails if a drive is lost.
pub(super) fn check(drive: &Path) -> Result<(), DriveError> {
    match lost(drive)? {
        Some(_) => Err(DriveError::Lost { drive: drive.to_owned() }),
        None => Ok(()),
    }
}

/// Syncs a drive to disk if necessary; fails if it is lost. A drive that is deleted meanwhile is no error.
pub(super) fn settle(drive: &Path) -> Result<(), DriveError> {
    match put_on_disk(drive) {
        Err(_) if !drive.exists() => Ok(()),
        settled => settled,
    }
}

fn put_on_disk(drive: &Path) -> Result<(), DriveError> {
    check(drive)?;
    let Some(mark) = find(drive)? else { return Ok(()) };
    // One at a time, because the kernel reports a write error only once.
    let locked = match fs::File::open(&mark.path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return check(drive),
        Err(error) => return Err(DriveError::io(&mark.path, error)),
    };
    locked.file().lock().map_err(|e| DriveError::io(&mark.path, e))?;
    check(drive)?;
    if find(drive)?.is_none() {
        return Ok(());
    }
    let disk = drive.join(DISK);
    let synced = fs::File::open(&disk).and_then(|file| file.sync_all());
    if let Err(error) = synced {
        if !drive.exists() {
            return Ok(());
        }
        tracing::error!(drive = %drive.display(), %error, "a copied drive cannot be put on the disk");
        let failed = drive.join(name(mark.origin, FAILED));
        fs::rename(&mark.path, &failed).map_err(|e| DriveError::io(&mark.path, e))?;
        stage::sync_directory(drive)?;
        return Err(DriveError::io(&disk, error));
    }
    failpoint::reach("drive-synced");
    match fs::remove_file(&mark.path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(DriveError::io(&mark.path, error));
        }
        _ => {}
    }
    // Otherwise the marker could reappear after the drive was changed.
    stage::sync_directory(drive)
}

/// The drives of a directory that have a marker; for lost ones, what they were copied from.
pub(super) fn marked(directory: &Path) -> Result<Vec<(PathBuf, Option<Origin>)>, DriveError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(|e| DriveError::io(directory, e))? {
        let path = entry.map_err(|e| DriveError::io(directory, e))?.path();
        if path.is_dir() && find(&path)?.is_some() {
            let lost = lost(&path)?;
            found.push((path, lost));
        }
    }
    Ok(found)
}
