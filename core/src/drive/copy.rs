//! Copies everything but holes; works on any filesystem.

use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::ByteSize;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread, pwrite};

use super::pending::{self, Origin};
use super::stage::{self, Filled, Stage};
use super::{Backend, DriveError};
use crate::os::disk::allocated_bytes;
use crate::os::given;
use crate::progress::Progress;

/// How much is copied at once: it fits in a processor's cache. The kernel's own copy (`copy_file_range`) goes page by page
/// between files of ext4, so it is no faster.
const BUFFER: usize = 256 << 10;
/// The unit in which zeros become holes.
const BLOCK: usize = 4096;

/// Copies that keep holes.
#[derive(Debug, Clone, Copy)]
pub struct Copy;

impl Backend for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn clone_image(
        &self,
        image: &Path,
        drive: &Path,
        size: ByteSize,
        progress: &Progress,
    ) -> Result<PathBuf, DriveError> {
        let Some(run) = crate::os::boot_id::of_host() else {
            return stage::create(drive, Filled::Synced, stage::make_directory, |stage| {
                let to = fill(stage, image, size, progress)?;
                to.sync_all().map_err(|e| DriveError::io(&stage.disk(), e))
            });
        };
        stage::create(drive, Filled::Marked, stage::make_directory, |stage| {
            pending::mark(stage.path(), Origin::of(image), run)?;
            fill(stage, image, size, progress).map(drop)
        })
    }
}

/// Copies `image` into the staged drive.
fn fill(stage: &Stage, image: &Path, size: ByteSize, progress: &Progress) -> Result<fs::File, DriveError> {
    let from = fs::File::open(image).map_err(|e| DriveError::io(image, e))?;
    let length = from.metadata().map_err(|e| DriveError::io(image, e))?.len();
    stage::check_size(size, length)?;
    stage::check_room(stage.path(), allocated_bytes(image).map_err(|e| DriveError::io(image, e))?)?;
    let disk = stage.disk();
    let to = fs::File::create_new(&disk).map_err(|e| DriveError::io(&disk, e))?;
    copy_data(&from, &to, length, progress).map_err(|e| match e {
        Stopped::Cancelled => DriveError::Cancelled,
        Stopped::Failed(e) => DriveError::io(&disk, e.into()),
    })?;
    stage::set_length_only(&to, &disk, size)?;
    Ok(to)
}

/// Copies a file to a new one and keeps its holes; uses a reflink if possible. Blocks.
pub(crate) fn copy_file(from: &Path, to: &Path, progress: &Progress) -> Result<(), DriveError> {
    let source = given::open_file(from).map_err(|e| DriveError::io(from, e))?;
    let length = source.metadata().map_err(|e| DriveError::io(from, e))?.len();
    let target = fs::File::create_new(to).map_err(|e| DriveError::io(to, e))?;
    if rustix::fs::ioctl_ficlone(target.file(), source.file()).is_ok() {
        return Ok(());
    }
    copy_data(&source, &target, length, progress).map_err(|e| match e {
        Stopped::Cancelled => DriveError::Cancelled,
        Stopped::Failed(e) => DriveError::io(to, e.into()),
    })?;
    target.set_len(length).map_err(|e| DriveError::io(to, e))
}

enum Stopped {
    Cancelled,
    Failed(Errno),
}

impl From<Errno> for Stopped {
    fn from(error: Errno) -> Self {
        Self::Failed(error)
    }
}

/// Copies the data in the first `length` bytes, skipping holes.
fn copy_data(from: &fs::File, to: &fs::File, length: u64, progress: &Progress) -> Result<(), Stopped> {
    let mut at = 0;
    let mut buffer = vec![0; BUFFER];
    while at < length {
        let start = match seek(from.file(), SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // The filesystem does not report holes: everything may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from.file(), SeekFrom::Hole(start)).unwrap_or(length).min(length);
        at = start;
        while at < end {
            progress.check().map_err(|_| Stopped::Cancelled)?;
            let want = usize::try_from(end - at).unwrap_or(BUFFER).min(BUFFER);
            let copied = copy_piece(from, to, at, &mut buffer[..want])? as u64;
            if copied == 0 {
                return Ok(());
            }
            at += copied;
            progress.advance(at, Some(length));
        }
    }
    Ok(())
}

/// Copies what fits in the buffer, except blocks of zeros.
fn copy_piece(from: &fs::File, to: &fs::File, at: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    let read = pread(from.file(), &mut *buffer, at)?;
    let is_hole = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut start = 0;
    while start < read {
        let blocks = |from: usize| buffer[from..read].chunks(BLOCK);
        let zeros = blocks(start).take_while(|block| is_hole(block)).count() * BLOCK;
        let begin = (start + zeros).min(read);
        let data = blocks(begin).take_while(|block| !is_hole(block)).count() * BLOCK;
        let end = (begin + data).min(read);
        let mut done = begin;
        while done < end {
            done += pwrite(to.file(), &buffer[done..end], at + done as u64)?;
        }
        start = end;
    }
    Ok(read)
}
