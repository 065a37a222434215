//! How large a filesystem has to be for a tree.

use nexus_schema::ByteSize;

use super::super::tree::{Body, Node, Tree};

/// Mebibytes of the journal. Its blocks take room on the disk only once they are used.
pub(crate) const JOURNAL_MIB: u64 = 16;
/// Blocks of a group.
const GROUP: u64 = 32_768;
/// Inodes of a group, at least: one for 16 KiB, which counts once the filesystem has grown.
const INODES: u64 = 8_192;
/// Inodes of a group, at most.
const INODES_MAX: u64 = 65_536;
/// Inodes of a block of the inode table.
const INODES_PER_BLOCK: u64 = 16;
/// Blocks that stay free.
const SLACK: u64 = 4_096;
/// The most that the last entry of a directory's block may leave unused, and what every block needs for its checksum.
const DIRECTORY_WASTE: u64 = 264 + 12;

/// Numbers of a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) blocks: u64,
    pub(crate) inodes: u64,
}

impl Geometry {
    /// The same for a filesystem that is at least of a size.
    pub(crate) fn at_least(self, size: Option<ByteSize>) -> Self {
        let blocks = size.map_or(0, |size| size.as_bytes() / super::BLOCK);
        if blocks <= self.blocks {
            return self;
        }
        Self { blocks, inodes: inodes(blocks, self.inodes).max(self.inodes) }
    }
}

/// The size for a tree, with some slack.
pub(crate) fn measure(tree: &Tree) -> Geometry {
    let (mut blocks, mut inodes) = (0, 64);
    for node in tree.nodes() {
        inodes += 1;
        blocks += body_blocks(node) + u64::from(!node.attributes.xattrs.is_empty());
    }
    let content = blocks + blocks / 50 + JOURNAL_MIB * 256 + SLACK;
    // Groups are added until content and the groups' own blocks fit.
    let mut groups = content.div_ceil(GROUP);
    loop {
        let inodes = inodes_of(groups, inodes);
        // Superblock, descriptors and the reserve for growth are in few groups, but counted as if in all.
        let own = groups * (2 + 1 + 8 + 128) + inodes.div_ceil(INODES_PER_BLOCK);
        let total = content + own;
        if total.div_ceil(GROUP) <= groups {
            return Geometry { blocks: total, inodes };
        }
        groups = total.div_ceil(GROUP);
    }
}

/// The size for a tree that nothing is added to: no journal, and hardly any slack.
pub(crate) fn measure_read_only(tree: &Tree) -> Geometry {
    let (mut blocks, mut inodes) = (0, 16_u64);
    for node in tree.nodes() {
        inodes += 1;
        blocks += body_blocks(node);
    }
    let inodes = inodes + inodes / 16;
    let content = blocks + blocks / 100 + inodes.div_ceil(INODES_PER_BLOCK) + 256;
    let groups = content.div_ceil(GROUP) + 1;
    // Each group has a superblock and descriptors, two bitmaps, and an inode table that is rounded up.
    Geometry { blocks: content + groups * 8, inodes }
}

/// How many inodes a filesystem of so many blocks gets.
pub(crate) fn inodes(blocks: u64, needed: u64) -> u64 {
    inodes_of(blocks.div_ceil(GROUP).max(1), needed)
}

fn inodes_of(groups: u64, needed: u64) -> u64 {
    let wanted = (needed + needed / 16).div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
    groups * wanted.clamp(INODES, INODES_MAX)
}

fn body_blocks(node: &Node) -> u64 {
    match &node.body {
        Body::Directory(children) => directory_blocks(children.keys()),
        Body::File(content) if content.blocks == 0 => 0,
        // Four extents are in the inode; others take a block for each 340, and room is never in one piece.
        Body::File(content) => {
            let extents = content.runs + content.blocks / 4096;
            content.blocks + if extents > 3 { 1 + extents / 300 + extents / 90_000 } else { 0 }
        }
        Body::Symlink(target) => u64::from(target.len() >= 60),
        Body::Device { .. } | Body::Fifo => 0,
    }
}

/// The most blocks that a directory of these names takes.
pub(super) fn directory_blocks<'n>(names: impl Iterator<Item = &'n Vec<u8>>) -> u64 {
    let bytes: u64 = names.map(|name| 8 + (name.len() as u64).next_multiple_of(4)).sum();
    1 + (bytes + 24) / (super::BLOCK - DIRECTORY_WASTE)
}
