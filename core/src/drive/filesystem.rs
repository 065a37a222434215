//! The filesystem on a drive that no VM has: grown to its disk's length by the host, which takes milliseconds.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use fs_err as fs;

use super::DriveError;
use crate::op::Progress;
use crate::os::tool::Tool;

/// Where the superblock is, linux/fs/ext4/ext4.h.
const SUPERBLOCK: usize = 1024;
const MAGIC: u16 = 0xef53;

/// Grows the ext4 filesystem on `disk` to the disk's length. Any other content is left alone.
pub(super) async fn grow(disk: &Path, progress: &Progress) -> Result<(), DriveError> {
    let length = fs::metadata(disk).map_err(|e| DriveError::io(disk, e))?.len();
    let Some(bytes) = ext4_bytes(disk)? else { return Ok(()) };
    if bytes >= length {
        return Ok(());
    }
    // A drive that was in use is looked over first: growing one with an error in it would make things worse.
    let timeout = Duration::from_secs(600);
    let check = Tool::find("e2fsck")?.call().arg("-fp").arg(disk).timeout(timeout).success(&[0, 1, 2]);
    let grow = Tool::find("resize2fs")?.call().arg(disk).timeout(timeout);
    if was_mounted(disk)? || !is_clean(disk)? {
        check.run(progress.token()).await?;
    }
    grow.run(progress.token()).await?;
    Ok(())
}

/// Names the ext4 filesystem on `disk`.
pub(super) async fn label(disk: &Path, label: &str, progress: &Progress) -> Result<(), DriveError> {
    let Some(block) = superblock(disk)? else {
        return Err(DriveError::NoFilesystem { disk: disk.to_owned() });
    };
    let name = &block[0x78..0x88];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    if &name[..end] == label.as_bytes() {
        return Ok(());
    }
    let timeout = Duration::from_secs(600);
    let check = Tool::find("e2fsck")?.call().arg("-fp").arg(disk).timeout(timeout).success(&[0, 1, 2]);
    let tune = Tool::find("tune2fs")?.call().args(["-L", label]).arg(disk).timeout(timeout);
    // What its journal holds would undo the name at the next mount.
    if was_mounted(disk)? {
        check.run(progress.token()).await?;
    }
    tune.run(progress.token()).await?;
    Ok(())
}

/// Makes an empty ext4 filesystem on a disk.
pub(super) async fn format(disk: &Path, label: &str, progress: &Progress) -> Result<(), DriveError> {
    crate::image::ext4::format(disk, label, progress).await.map_err(|error| match error {
        crate::image::ImageError::Cancelled => DriveError::Cancelled,
        error => DriveError::Format { disk: disk.to_owned(), source: Box::new(error) },
    })
}

/// How large the ext4 filesystem on a disk is; `None` if there is none.
fn ext4_bytes(disk: &Path) -> Result<Option<u64>, DriveError> {
    let Some(block) = superblock(disk)? else { return Ok(None) };
    let word =
        |at: usize| u64::from(u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]));
    // s_blocks_count_lo, s_log_block_size, s_feature_incompat (64bit), s_blocks_count_hi
    let high = if word(0x60) & 0x80 != 0 { word(0x150) } else { 0 };
    let blocks = high << 32 | word(0x04);
    Ok(1024_u64.checked_shl(u32::try_from(word(0x18)).unwrap_or(64)).map(|size| blocks.saturating_mul(size)))
}

/// Whether it was ever mounted (`s_mtime`).
fn was_mounted(disk: &Path) -> Result<bool, DriveError> {
    Ok(superblock(disk)?.is_some_and(|block| block[0x2c..0x30] != [0; 4]))
}

/// Whether nothing was cut off that changed it (`s_state`: valid, without errors).
fn is_clean(disk: &Path) -> Result<bool, DriveError> {
    Ok(superblock(disk)?.is_none_or(|block| u16::from_le_bytes([block[0x3a], block[0x3b]]) & 3 == 1))
}

fn superblock(disk: &Path) -> Result<Option<[u8; 1024]>, DriveError> {
    let mut start = [0; SUPERBLOCK + 1024];
    let mut file = fs::File::open(disk).map_err(|e| DriveError::io(disk, e))?;
    match file.read_exact(&mut start) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(DriveError::io(disk, error)),
    }
    let mut block = [0; 1024];
    block.copy_from_slice(&start[SUPERBLOCK..]);
    Ok((u16::from_le_bytes([block[0x38], block[0x39]]) == MAGIC).then_some(block))
}
