//! Writes an ext4 filesystem into a sparse file in one pass, without any privilege and without any other program.
//!
//! Contents go to their blocks as they come, whatever will be known of them later; what describes them comes last. What a later
//! entry replaced or a layer hid is cleared from the file before it is done. The same nodes and contents make the same bytes.
//!
//! ```text
//! Writer::create ─> take, take, take … ─> finish(nodes)
//!                   contents               numbers ─ attributes, trees, directories ─ journal ─ groups ─ inodes ─ heads
//! ```
//! Kernels from 5.10 on mount the result and grow it online: the blocks for the descriptors of 1 TiB are kept free in front, for
//! larger filesystems those of their size. Past that Linux goes on in its own way (`meta_bg`).
//!
//! Nothing here knows where entries come from: names are checked, and paths followed, by who makes the nodes.

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
/// The largest filesystem, in bytes: with more groups there would not be numbers for their inodes.
const LARGEST: u64 = 64 << 40;

/// The size of a filesystem, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// As large as its content needs, with some room, but not smaller than this.
    AtLeast(u64),
    /// As large as its disk.
    Exactly(u64),
}

/// What a filesystem is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It is written to: it has a journal and room.
    Drive,
    /// It is only ever read: it has neither.
    ReadOnly,
}

/// What is said of a filesystem beside its content.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options<'o> {
    pub(crate) purpose: Purpose,
    /// At most 16 bytes.
    pub(crate) label: &'o str,
    /// What its UUID and its hashes are made of; if it is `None`, the content.
    pub(crate) identity: Option<[u8; 32]>,
    /// When it was made, in seconds since 1970.
    pub(crate) made: u32,
}

/// A filesystem that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Made {
    /// Of version 8 (RFC 9562): made of a digest.
    pub(crate) uuid: [u8; 16],
    /// In bytes.
    pub(crate) size: u64,
}

/// A filesystem in the making.
pub(crate) struct Writer {
    output: Output,
    cursor: Cursor,
    head: u64,
    size: Size,
    /// The runs of all contents, each content's side by side.
    extents: Vec<Extent>,
    /// Of sizes and checksums of all contents as they came.
    digest: Sha256,
    chunk: Vec<u8>,
}

impl Writer {
    /// Begins a filesystem in a new file; `keep_free` bytes of the disk stay free for everybody else.
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

    /// Begins a filesystem in a file that is all zeros and as long as the filesystem will be.
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
