//! The numbers of a filesystem.

use nexus_schema::ByteSize;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// Mebibytes of the journal. Its blocks take room on the disk only once they are used.
pub(crate) const JOURNAL_MIB: u64 = 16;
/// Blocks of a group.
pub(crate) const GROUP: u64 = 32_768;
/// Inodes of a block of the inode table.
pub(crate) const INODES_PER_BLOCK: u64 = 16;
/// Inodes of a group, at least: one for 16 KiB, which counts once the filesystem has grown.
const INODES: u64 = 8_192;
/// Inodes of a group, at most.
const INODES_MAX: u64 = 65_536;

/// How large a filesystem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) blocks: u64,
    pub(crate) inodes: u64,
}

impl Geometry {
    /// The same for a filesystem that is at least of a size.
    pub(crate) fn at_least(self, size: Option<ByteSize>) -> Self {
        let blocks = size.map_or(0, |size| size.as_bytes() / BLOCK);
        if blocks <= self.blocks {
            return self;
        }
        Self { blocks, inodes: inodes(blocks, self.inodes).max(self.inodes) }
    }
}

/// How many inodes a filesystem of so many blocks gets.
pub(crate) fn inodes(blocks: u64, needed: u64) -> u64 {
    inodes_of(blocks.div_ceil(GROUP).max(1), needed)
}

/// How many inodes a filesystem of so many groups gets.
pub(crate) fn inodes_of(groups: u64, needed: u64) -> u64 {
    let wanted = (needed + needed / 16).div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
    groups * wanted.clamp(INODES, INODES_MAX)
}
