//! Clones by `FICLONE`: the filesystem shares the blocks until one side writes (btrfs, XFS).

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::ByteSize;
use rustix::fs::ioctl_ficlone;

use super::stage::{self, Filled, Stage};
use super::{Backend, DriveError};
use crate::progress::Progress;

/// Clones by reflink.
#[derive(Debug, Clone, Copy)]
pub struct Reflink;

impl Backend for Reflink {
    fn name(&self) -> &'static str {
        "reflink"
    }

    fn clone_image(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        progress.check()?;
        stage::create(drive, Filled::InOrder, stage::make_directory, |stage| fill(stage, image, size))
    }
}

/// Clones `image` into the staged drive.
pub(super) fn fill(stage: &Stage, image: &Path, size: ByteSize) -> Result<(), DriveError> {
    stage::check_room(stage.path(), 0)?;
    let from = fs::File::open(image).map_err(|e| DriveError::io(image, e))?;
    stage::check_size(size, from.metadata().map_err(|e| DriveError::io(image, e))?.len())?;
    let disk = stage.disk();
    let to = fs::File::create_new(&disk).map_err(|e| DriveError::io(&disk, e))?;
    ioctl_ficlone(to.file(), from.file()).map_err(|e| DriveError::io(&disk, e.into()))?;
    stage::set_length_only(&to, &disk, size)
}

/// Whether reflinks work in a directory.
pub(super) fn works(directory: &Path) -> Result<bool, DriveError> {
    const TEXT: &[u8] = &[0x5a; 4096];
    let failed = |e| DriveError::io(directory, e);
    let trial = stage::temporary(directory);
    fs::create_dir(&trial).map_err(failed)?;
    let try_it = || -> std::io::Result<bool> {
        let mut from = fs::File::create_new(trial.join("a"))?;
        from.write_all(TEXT)?;
        let mut to = fs::OpenOptions::new().read(true).write(true).create_new(true).open(trial.join("b"))?;
        if ioctl_ficlone(to.file(), from.file()).is_err() {
            return Ok(false);
        }
        let mut copied = Vec::new();
        to.read_to_end(&mut copied)?;
        Ok(copied == TEXT)
    };
    let works = try_it();
    stage::remove(&trial)?;
    works.map_err(failed)
}
