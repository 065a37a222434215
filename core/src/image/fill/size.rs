//! How large a filesystem has to be for a tree.

use super::super::tree::{Body, Node, Tree};
use crate::ext4::{BLOCK, GROUP, Geometry, INODES_PER_BLOCK, JOURNAL_MIB, inodes_of};

/// Blocks that stay free.
const SLACK: u64 = 4_096;
/// The most that the last entry of a directory's block may leave unused, and what every block needs for its checksum.
const DIRECTORY_WASTE: u64 = 264 + 12;

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
    1 + (bytes + 24) / (BLOCK - DIRECTORY_WASTE)
}
