//! Reads an ext4 filesystem in a plain file that nobody writes to, without mounting it and without any privilege.
//!
//! What the journal has that is not in its place yet is seen as if it were: nothing is written. The orphan list is ignored:
//! a deleted file that was still open has no name. Checksums of metadata are not verified, only those of the journal: a
//! structure that contradicts itself is an error, and one that is only wrong is read as it is.
//!
//! The file may be a guest's, which is hostile: every number is checked before it is used, and every loop has an end. All
//! calls block.

mod bytes;
mod contents;
mod directory;
mod disk;
mod error;
mod inode;
mod journal;
mod superblock;
#[cfg(test)]
mod tests;
mod xattr;

use std::fs::File;

pub(crate) use directory::Entry;
use disk::Disk;
pub(crate) use error::ReadError;
pub(crate) use inode::{Inode, Kind};
use superblock::Geometry;

/// A filesystem to be read.
pub(crate) struct Filesystem {
    disk: Disk,
    geometry: Geometry,
}

impl Filesystem {
    /// Opens the filesystem in a file, and reads its journal if it was not unmounted.
    ///
    /// # Errors
    /// There is none, it has features that this reader does not know, or it is damaged.
    pub(crate) fn open(file: File) -> Result<Self, ReadError> {
        Self::open_while(file, &|| true)
    }

    /// The same while `goes_on`, which is asked from time to time, since a hostile journal is long.
    pub(crate) fn open_while(file: File, goes_on: &dyn Fn() -> bool) -> Result<Self, ReadError> {
        let mut bytes = [0; superblock::LENGTH];
        match Disk::raw(&file, superblock::AT, &mut bytes) {
            Err(ReadError::Io { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(ReadError::NoFilesystem);
            }
            read => read?,
        }
        let geometry = Geometry::read(&bytes)?;
        let mut filesystem = Self { disk: Disk::new(file, &geometry), geometry };
        if filesystem.geometry.needs_recovery {
            let newer = journal::newer(&filesystem, goes_on)?;
            filesystem.disk.replay(newer);
            // It grew if the superblock is among them.
            filesystem.disk.read(superblock::AT, &mut bytes)?;
            let geometry = Geometry::read(&bytes)?;
            if geometry.block_size != filesystem.geometry.block_size {
                let what = "the block size in the journal";
                return Err(ReadError::Damaged { what, of: "the superblock".to_owned() });
            }
            filesystem.disk.set_blocks(geometry.blocks);
            filesystem.geometry = geometry;
        }
        Ok(filesystem)
    }
}
