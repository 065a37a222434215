//! Writes an ext4 filesystem into a sparse file in one pass, without privileges or other programs.
//!
//! Contents are written to their blocks as they are read; the metadata comes last. Contents that a later entry replaced or a
//! layer hid are cleared from the file at the end. The same nodes and contents make the same bytes.
//!
//! ```text
//! Writer::create ─> take, take, take … ─> finish(nodes)
//!                   contents               numbers ─ attributes, trees, directories ─ journal ─ groups ─ inodes ─ heads
//! ```
//! Kernels since 5.10 can mount the result and grow it online: space for the descriptors of 1 TiB is reserved, or of its own
//! size for larger filesystems. Beyond that Linux uses `meta_bg`.
//!
//! This room does not know where entries come from: the maker of the nodes checks names and follows paths.

mod contents;
mod directory;
mod extents;
mod finish;
mod format;
mod groups;
mod hash;
mod inode;
mod layout;
mod node;
mod numbers;
mod output;
mod raw;
mod superblock;
pub(crate) mod xattr;

use std::path::Path;

use fs_err as fs;
use sha2::{Digest, Sha256};

use super::Ext4Error;
use crate::progress::Progress;
use contents::CHUNK;
pub(crate) use contents::{ContentReader, fill};
use extents::Extent;
pub(crate) use format::format;
pub(crate) use node::{Attributes, Body, Child, Content, LINKS_MAX, Node, NodeId, ROOT, Xattrs};
use output::{Cursor, Output};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks of a group.
const GROUP: u64 = 32_768;
/// Bytes of an inode.
const INODE: usize = 256;
/// The largest filesystem, in bytes: more groups would not have enough inode numbers.
const LARGEST: u64 = 64 << 40;

/// The size of a filesystem, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// As large as its content needs, with some space, but not smaller than this.
    AtLeast(u64),
    /// As large as its disk.
    Exactly(u64),
}

/// What a filesystem is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Writable: with a journal and free space.
    Drive,
    /// Read-only: with neither.
    ReadOnly,
}

/// Properties of a filesystem other than its content.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options<'o> {
    pub(crate) purpose: Purpose,
    /// At most 16 bytes.
    pub(crate) label: &'o str,
    /// The digest that its UUID and hash seed are made from; `None` uses the content.
    pub(crate) identity: Option<[u8; 32]>,
    /// When it was made, in seconds since 1970.
    pub(crate) made: u32,
}

/// A filesystem that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Made {
    /// Version 8 (RFC 9562), made from a digest.
    pub(crate) uuid: [u8; 16],
    /// In bytes.
    pub(crate) size: u64,
}

/// A filesystem that is being written.
pub(crate) struct Writer {
    output: Output,
    cursor: Cursor,
    head: u64,
    size: Size,
    /// The runs of all contents; those of one content are adjacent.
    extents: Vec<Extent>,
    /// Over the sizes and checksums of all contents in order.
    digest: Sha256,
    chunk: Vec<u8>,
}

impl Writer {
    /// Starts a filesystem in a new file; `keep_free` bytes must stay free on the disk.
    pub(crate) fn create(
        path: &Path,
        size: Size,
        keep_free: u64,
        progress: &Progress,
    ) -> Result<Self, Ext4Error> {
        check_size(size)?;
        let failed = |source| Ext4Error::io(path, source);
        let file =
            fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(failed)?;
        Ok(Self::within(file, size, keep_free, progress))
    }

    /// Starts a filesystem in a file of zeros that already has its final length.
    pub(crate) fn format(path: &Path, progress: &Progress) -> Result<Self, Ext4Error> {
        let failed = |source| Ext4Error::io(path, source);
        let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let size = Size::Exactly(file.metadata().map_err(failed)?.len());
        check_size(size)?;
        Ok(Self::within(file, size, 0, progress))
    }

    fn within(file: fs::File, size: Size, keep_free: u64, progress: &Progress) -> Self {
        let (Size::AtLeast(bytes) | Size::Exactly(bytes)) = size;
        let head = superblock::head_blocks(bytes);
        Self {
            output: Output::new(file, keep_free, progress),
            cursor: Cursor::new(head),
            head,
            size,
            extents: Vec::new(),
            digest: Sha256::new(),
            chunk: vec![0; CHUNK],
        }
    }

    /// The filesystem's file.
    pub(crate) fn path(&self) -> &Path {
        self.output.path()
    }
}

fn check_size(size: Size) -> Result<(), Ext4Error> {
    let (Size::AtLeast(bytes) | Size::Exactly(bytes)) = size;
    if bytes > LARGEST { Err(Ext4Error::TooLarge { what: "more than 64 TiB" }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
