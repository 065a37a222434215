//! Changes the filesystem on a drive that no VM uses. Only confined programs (`os/tool`) read what a guest wrote.

use std::path::Path;
use std::time::Duration;

use fs_err as fs;

use super::Ext4Error;
use super::superblock::Superblock;
use crate::os::tool::Tool;
use crate::progress::Progress;

/// Grows the ext4 filesystem on `disk` to the disk's length, if no guest has written to it yet. If a guest has mounted it
/// before, the next guest grows it when it mounts it. Any other content is left alone.
pub(crate) async fn grow(disk: &Path, progress: &Progress) -> Result<(), Ext4Error> {
    match Superblock::read(disk)? {
        Some(before) if before.was_mounted() || !before.is_clean() => Ok(()),
        _ => grow_now(disk, progress).await,
    }
}

/// Grows the ext4 filesystem on `disk`, even if a guest has written to it. Any other content is left alone.
pub(crate) async fn grow_now(disk: &Path, progress: &Progress) -> Result<(), Ext4Error> {
    let length = fs::metadata(disk).map_err(|e| Ext4Error::io(disk, e))?.len();
    let Some(before) = Superblock::read(disk)? else { return Ok(()) };
    if before.length().is_none_or(|bytes| bytes >= length) {
        return Ok(());
    }
    // A filesystem that was in use is checked first, because growing a damaged one would make things worse.
    let timeout = Duration::from_secs(600);
    let check = Tool::find("e2fsck")?.call().arg("-fp").disk(disk).timeout(timeout).success(&[0, 1, 2]);
    let grow = Tool::find("resize2fs")?.call().disk(disk).timeout(timeout);
    if before.was_mounted() || !before.is_clean() {
        check.run(progress.token()).await?;
    }
    grow.run(progress.token()).await?;
    Superblock::read(disk)?.map_or(Ok(()), |grown| grown.note_overhead(disk))
}

/// Labels the ext4 filesystem on `disk`.
pub(crate) async fn label(disk: &Path, label: &str, progress: &Progress) -> Result<(), Ext4Error> {
    let Some(block) = Superblock::read(disk)? else {
        return Err(Ext4Error::NoFilesystem { disk: disk.to_owned() });
    };
    if block.label() == label.as_bytes() {
        return Ok(());
    }
    let timeout = Duration::from_secs(600);
    let check = Tool::find("e2fsck")?.call().arg("-fp").disk(disk).timeout(timeout).success(&[0, 1, 2]);
    let tune = Tool::find("tune2fs")?.call().args(["-L", label]).disk(disk).timeout(timeout);
    // Otherwise the next mount would undo the label by replaying the journal.
    if block.was_mounted() {
        check.run(progress.token()).await?;
    }
    tune.run(progress.token()).await?;
    Ok(())
}
