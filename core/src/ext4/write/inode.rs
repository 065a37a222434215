//! Inodes in their on-disk form: `struct ext4_inode` of linux/fs/ext4/ext4.h.

use super::INODE;
use super::extents::ROOT;
use super::node::{Attributes, Body, Content};
use super::raw::{Seed, crc, set_halves, set_words, set16, set32};

/// Reserved inodes.
pub(super) const ROOT_INODE: u32 = 2;
pub(super) const RESIZE_INODE: u32 = 7;
pub(super) const JOURNAL_INODE: u32 = 8;
/// The first inode that is not reserved.
pub(super) const FIRST_INODE: u32 = 11;

/// Flag: its blocks are described by extents.
const EXTENTS: u32 = 0x8_0000;
/// Flag: the directory has an index.
const INDEXED: u32 = 0x1000;

/// The offset of the 60 bytes for blocks.
pub(super) const BLOCKS: usize = 0x28;
/// The old 32-bit block number that matters here: the double-indirect block.
const DOUBLE_INDIRECT: usize = BLOCKS + 4 * 13;
/// The maximum link count; a directory with more subdirectories gets a count of one (`dir_nlink`).
const LINKS_MAX: u32 = super::node::LINKS_MAX;
/// Shorter symlink targets are stored in the inode.
pub(super) const LONG_TARGET: usize = 60;

/// The fields of an inode other than its attributes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Blocks {
    /// In bytes.
    pub(super) size: u64,
    /// All its blocks: content, tree and attributes.
    pub(super) count: u64,
    /// The root of its tree.
    pub(super) root: Option<[u8; ROOT]>,
    /// The block of its attributes; 0 if there is none.
    pub(super) attributes: u64,
}

/// An inode that is being made.
pub(super) struct Inode(pub(super) [u8; INODE]);

impl Inode {
    /// The inode of a node.
    pub(super) fn new(body: &Body, attributes: &Attributes, links: u32, blocks: &Blocks) -> Self {
        let mut raw = Self::plain(attributes.mtime, attributes.mtime_ns);
        let bytes = &mut raw.0;
        set16(bytes, 0x00, body.mode_type() << 12 | attributes.mode & 0o7777);
        set_halves(bytes, 0x02, 0x78, attributes.uid);
        set_halves(bytes, 0x18, 0x7a, attributes.gid);
        set16(bytes, 0x1a, links as u16);
        raw.set_blocks(blocks);
        let bytes = &mut raw.0;
        match body {
            Body::Symlink(target) if target.len() < LONG_TARGET => {
                bytes[BLOCKS..BLOCKS + target.len()].copy_from_slice(target);
            }
            // Small numbers use the old encoding, others the new one.
            Body::Device { major, minor, .. } if *major < 256 && *minor < 256 => {
                set32(bytes, BLOCKS, major << 8 | minor);
            }
            Body::Device { major, minor, .. } => {
                set32(bytes, BLOCKS + 4, (minor & 0xff) | major << 8 | (minor & !0xff) << 12);
            }
            _ => {}
        }
        raw
    }

    /// The inode of a directory with this many subdirectories.
    pub(super) fn directory(
        attributes: &Attributes,
        subdirectories: u32,
        is_indexed: bool,
        blocks: &Blocks,
    ) -> Self {
        let links = subdirectories + 2;
        let links = if links > LINKS_MAX { 1 } else { links };
        let mut raw = Self::new(&Body::directory(), attributes, links, blocks);
        if is_indexed {
            set32(&mut raw.0, 0x20, EXTENTS | INDEXED);
        }
        raw
    }

    /// The inode of the journal.
    pub(super) fn journal(made: u32, blocks: &Blocks) -> Self {
        let mut raw =
            Self::new(&Body::File(Content::default()), &Attributes::root(0o600, made.into()), 1, blocks);
        raw.set_blocks(blocks);
        raw
    }

    /// The inode that owns the reserved descriptor blocks, through the double-indirect block `index`.
    pub(super) fn resize(made: u32, index: u64, blocks: &Blocks) -> Self {
        let mut raw =
            Self::new(&Body::File(Content::default()), &Attributes::root(0o600, made.into()), 1, blocks);
        set32(&mut raw.0, DOUBLE_INDIRECT, index as u32);
        raw
    }

    fn plain(mtime: i64, nanoseconds: u32) -> Self {
        let mut raw = Self([0; INODE]);
        let bytes = &mut raw.0;
        // Bytes of an inode past the first 128.
        set16(bytes, 0x80, 32);
        // Seconds have 34 bits and start in 1901: 32 signed bits, and two more beside the nanoseconds.
        let seconds = mtime.clamp(-(1 << 31), (1 << 31) - 1 + (3 << 32));
        let low = seconds as i32;
        let more = ((seconds - i64::from(low)) >> 32) as u32 & 3 | nanoseconds.min(999_999_999) << 2;
        // atime, ctime, mtime and crtime.
        for (time, extra) in [(0x08, 0x8c), (0x0c, 0x84), (0x10, 0x88), (0x90, 0x94)] {
            set32(bytes, time, low.cast_unsigned());
            set32(bytes, extra, more);
        }
        raw
    }

    fn set_blocks(&mut self, blocks: &Blocks) {
        let bytes = &mut self.0;
        set_words(bytes, 0x04, 0x6c, blocks.size);
        // In sectors of 512 bytes.
        let sectors = blocks.count * 8;
        set32(bytes, 0x1c, sectors as u32);
        set16(bytes, 0x74, (sectors >> 32) as u16);
        set32(bytes, 0x68, blocks.attributes as u32);
        set16(bytes, 0x76, (blocks.attributes >> 32) as u16);
        if let Some(root) = &blocks.root {
            set32(bytes, 0x20, EXTENTS);
            bytes[BLOCKS..BLOCKS + ROOT].copy_from_slice(root);
        }
    }

    /// Its bytes, including the checksum.
    pub(super) fn finish(mut self, seed: Seed, number: u32) -> [u8; INODE] {
        let checksum = crc(seed.inode(number), &self.0);
        set_halves(&mut self.0, 0x7c, 0x82, checksum);
        self.0
    }
}
