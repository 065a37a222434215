//! Copies that are told of before they are on the disk.
//!
//! A copy is whole for all of this host as soon as it is written; the disk has it later. Until then a mark beside the drive's
//! disk says so: an empty file whose name tells what was copied, and in which run of the host.
//!
//! ```text
//! copied, marked ─> named ─> its name synced, and the mark with it ─> told
//!                                      in the background, or before anything changes it: disk synced ─> mark removed
//! ```
//!
//! Nothing changes a drive that has a mark, so what has one is a plain copy. If the host went down before the mark was removed,
//! the copy is not taken for whole: that of an image is made again, any other one says that it is lost.

use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;

use super::{DISK, DriveError, stage};
use crate::os::failpoint;

/// What the names of marks begin with.
const MARK: &str = "unsynced-";
/// The run of a copy that the disk did not take.
const FAILED: &str = "failed";

/// What a drive is a copy of.
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

/// A mark that was found.
struct Mark {
    path: PathBuf,
    origin: Origin,
    run: String,
}

/// Marks the drive in `directory` as not on the disk yet.
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
        // What nobody here has written is not taken for a copy of an image.
        let (origin, run) = match told.split_once('-') {
            Some(("image", run)) => (Origin::Image, run),
            Some((_, run)) => (Origin::Drive, run),
            None => (Origin::Drive, FAILED),
        };
        return Ok(Some(Mark { path: entry.path(), origin, run: run.to_owned() }));
    }
    Ok(None)
}

/// Whether a drive was not on the disk when the host went down, and what it was a copy of then.
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

/// Puts a drive on the disk if it is not there yet; fails if it is lost. One that is deleted meanwhile needs nothing.
pub(super) fn settle(drive: &Path) -> Result<(), DriveError> {
    match put_on_disk(drive) {
        Err(_) if !drive.exists() => Ok(()),
        settled => settled,
    }
}

fn put_on_disk(drive: &Path) -> Result<(), DriveError> {
    check(drive)?;
    let Some(mark) = find(drive)? else { return Ok(()) };
    // One at a time: of a failure to write the kernel tells once.
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
    // Or it could come back once the drive is another than the copy.
    stage::sync_directory(drive)
}

/// The drives of a directory that have a mark, and whether they are lost.
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
