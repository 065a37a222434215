//! The blocks of files as runs (extents): up to four in the inode, or more in a tree of blocks.
//!
//! Source: linux/fs/ext4/ext4_extents.h.

use super::super::Ext4Error;
use super::BLOCK;
use super::output::{Cursor, Output};
use super::raw::{crc, set16, set32};

const MAGIC: u16 = 0xf30a;
/// Length of the header of a tree block, and of an entry.
const ENTRY: usize = 12;
/// Bytes of the tree's root, in the inode.
pub(super) const ROOT: usize = 60;
/// Entries in the root, and in a block.
pub(super) const IN_ROOT: usize = 4;
const IN_BLOCK: usize = (BLOCK - ENTRY - 4) / ENTRY;
/// The longest run (`EXT_INIT_MAX_LEN`).
const LENGTH_MAX: u32 = 32_768;

/// A run of consecutive blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Its position in the file, in blocks.
    pub(super) logical: u32,
    pub(super) length: u32,
    /// Its first block.
    pub(super) start: u32,
}

impl Extent {
    /// Appends blocks to a file's runs.
    pub(super) fn append(all: &mut Vec<Self>, first: usize, next: Self) {
        match all[first..].last_mut() {
            Some(last)
                if last.logical + last.length == next.logical
                    && last.start + last.length == next.start
                    && last.length + next.length <= LENGTH_MAX =>
            {
                last.length += next.length;
            }
            _ => all.push(next),
        }
    }

    fn put(&self, bytes: &mut [u8], at: usize) {
        set32(bytes, at, self.logical);
        // A greater length would mean blocks without content.
        set16(bytes, at + 4, self.length.min(LENGTH_MAX) as u16);
        set32(bytes, at + 8, self.start);
    }
}

/// The root of a tree, and the blocks of the tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tree {
    pub(super) root: [u8; ROOT],
    pub(super) blocks: u32,
}

/// The root of a tree without blocks, for at most [`IN_ROOT`] runs.
pub(super) fn flat(extents: &[Extent]) -> [u8; ROOT] {
    let mut root = [0; ROOT];
    head(&mut root, extents.len(), IN_ROOT, 0);
    for (at, extent) in extents.iter().take(IN_ROOT).enumerate() {
        extent.put(&mut root, ENTRY * (at + 1));
    }
    root
}

/// Writes the tree of a file with more runs than an inode holds; `seed` is the inode's checksum seed.
pub(super) fn deep(
    extents: &[Extent],
    seed: u32,
    cursor: &mut Cursor,
    output: &mut Output,
) -> Result<Tree, Ext4Error> {
    let mut blocks = 0;
    let mut put = |mut block: [u8; BLOCK]| -> Result<u64, Ext4Error> {
        let checksum = crc(seed, &block[..BLOCK - 4]);
        set32(&mut block, BLOCK - 4, checksum);
        let (start, _) = cursor.run(1);
        blocks += 1;
        output.put(start, &block)?;
        Ok(start)
    };
    // The blocks of each level, by the first file position that they cover.
    let mut level: Vec<(u32, u64)> = Vec::new();
    for part in extents.chunks(IN_BLOCK) {
        let mut block = [0; BLOCK];
        head(&mut block, part.len(), IN_BLOCK, 0);
        for (at, extent) in part.iter().enumerate() {
            extent.put(&mut block, ENTRY * (at + 1));
        }
        level.push((part[0].logical, put(block)?));
    }
    let mut depth = 1;
    while level.len() > IN_ROOT {
        let mut above = Vec::new();
        for part in level.chunks(IN_BLOCK) {
            let mut block = [0; BLOCK];
            index(&mut block, part, IN_BLOCK, depth);
            above.push((part[0].0, put(block)?));
        }
        level = above;
        depth += 1;
    }
    let mut root = [0; ROOT];
    index(&mut root, &level, IN_ROOT, depth);
    Ok(Tree { root, blocks })
}

fn head(bytes: &mut [u8], entries: usize, most: usize, depth: u16) {
    set16(bytes, 0, MAGIC);
    set16(bytes, 2, entries as u16);
    set16(bytes, 4, most as u16);
    set16(bytes, 6, depth);
}

fn index(bytes: &mut [u8], below: &[(u32, u64)], most: usize, depth: u16) {
    head(bytes, below.len(), most, depth);
    for (at, (logical, block)) in below.iter().enumerate() {
        let at = ENTRY * (at + 1);
        set32(bytes, at, *logical);
        set32(bytes, at + 4, *block as u32);
        set16(bytes, at + 8, (block >> 32) as u16);
    }
}
