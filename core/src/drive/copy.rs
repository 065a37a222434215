//! Copies what is not a hole: works on any filesystem.

use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::ByteSize;
use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::{Errno, pread, pwrite};

use super::stage::{self, Filled, Stage};
use super::{Backend, DriveError};
use crate::op::Progress;

/// How much is copied between two looks at the cancellation.
const CHUNK: u64 = 16 << 20;
/// How much is copied at once where the kernel does not do it.
const BUFFER: usize = 1 << 20;
/// The unit in which zeros become holes there.
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
        stage::create(drive, Filled::Synced, stage::make_directory, |stage| {
            fill(stage, image, size, progress)
        })
    }
}

/// Copies `image` into the staged drive.
fn fill(stage: &Stage, image: &Path, size: ByteSize, progress: &Progress) -> Result<(), DriveError> {
    let from = fs::File::open(image).map_err(|e| DriveError::io(image, e))?;
    let length = from.metadata().map_err(|e| DriveError::io(image, e))?.len();
    stage::check_size(size, length)?;
    stage::check_room(stage.path(), super::allocated_bytes(image)?)?;
    let disk = stage.disk();
    let to = fs::File::create_new(&disk).map_err(|e| DriveError::io(&disk, e))?;
    copy_data(&from, &to, length, progress).map_err(|e| match e {
        Stopped::Cancelled => DriveError::Cancelled,
        Stopped::Failed(e) => DriveError::io(&disk, e.into()),
    })?;
    stage::set_length(&to, &disk, size)
}

/// Copies a file to a new one with its holes, by reflink where that works. Blocks.
pub(crate) fn copy_file(from: &Path, to: &Path, progress: &Progress) -> Result<(), DriveError> {
    let source = fs::File::open(from).map_err(|e| DriveError::io(from, e))?;
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

/// Copies all that is not a hole of the first `length` bytes.
fn copy_data(from: &fs::File, to: &fs::File, length: u64, progress: &Progress) -> Result<(), Stopped> {
    let mut at = 0;
    let mut in_kernel = true;
    let mut buffer = Vec::new();
    while at < length {
        let start = match seek(from.file(), SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // No such thing here: all of it may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from.file(), SeekFrom::Hole(start)).unwrap_or(length).min(length);
        at = start;
        while at < end {
            progress.check().map_err(|_| Stopped::Cancelled)?;
            let want = (end - at).min(CHUNK);
            let copied = if in_kernel { by_kernel(from, to, at, want) } else { Ok(0) };
            let copied = match copied {
                Ok(copied) if copied > 0 => copied,
                Ok(_) | Err(Errno::XDEV | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => {
                    in_kernel = false;
                    by_hand(from, to, at, want, &mut buffer)?
                }
                Err(error) => return Err(error.into()),
            };
            if copied == 0 {
                return Ok(());
            }
            at += copied;
            progress.advance(at, Some(length));
        }
    }
    Ok(())
}

fn by_kernel(from: &fs::File, to: &fs::File, at: u64, want: u64) -> Result<u64, Errno> {
    let (mut here, mut there) = (at, at);
    let want = usize::try_from(want).unwrap_or(BUFFER);
    let copied = copy_file_range(from.file(), Some(&mut here), to.file(), Some(&mut there), want)?;
    Ok(copied as u64)
}

fn by_hand(from: &fs::File, to: &fs::File, at: u64, want: u64, buffer: &mut Vec<u8>) -> Result<u64, Errno> {
    buffer.resize(BUFFER, 0);
    let want = usize::try_from(want).unwrap_or(BUFFER).min(BUFFER);
    let read = pread(from.file(), &mut buffer[..want], at)?;
    for (index, block) in buffer[..read].chunks(BLOCK).enumerate() {
        if block.iter().all(|b| *b == 0) {
            continue;
        }
        let mut done = 0;
        while done < block.len() {
            done += pwrite(to.file(), &block[done..], at + (index * BLOCK + done) as u64)?;
        }
    }
    Ok(read as u64)
}
