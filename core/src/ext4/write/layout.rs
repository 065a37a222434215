//! The places of the groups' bitmaps and inode tables.
//!
//! ```text
//! head of group 0 │ contents, directories, journal │ bitmaps │ inode tables │ free … │ group n: its own bitmaps and table │ free …
//! ```
//! All groups with content have theirs together after the content (`flex_bg`), written in one piece. Later groups have their
//! own at their beginning; for these only the metadata that marks them as empty is written.

use nexus_schema::ByteSize;

use super::super::Ext4Error;
use super::output::{Cursor, has_head};
use super::{BLOCK, GROUP, INODE, Size};

/// Inodes of a block of the inode table.
pub(super) const INODES_PER_BLOCK: u64 = (BLOCK / INODE) as u64;
/// The maximum number of inodes in a group: their bitmap is one block.
const INODES_MAX: u64 = (BLOCK * 8) as u64;
/// The last group is worthwhile only if it has at least this many blocks beyond its own metadata.
const WORTHWHILE: u64 = 64;

/// The groups of a filesystem.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    /// Blocks of a group's inode table.
    pub(super) table_blocks: u64,
    /// Blocks of the superblock, the descriptors and the reserve, in groups that have them.
    pub(super) head: u64,
    /// The first of the adjacent bitmaps: one for the blocks of each such group, then one for its inodes.
    bitmaps: u64,
    /// Where those groups' inode tables are.
    tables: Vec<u64>,
}

/// The places of one group's own metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) table: u64,
}

/// The requirements of a layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    pub(super) size: Size,
    /// The minimum number of free blocks.
    pub(super) slack: u64,
    pub(super) inodes: u32,
    /// The minimum number of inodes per group.
    pub(super) density: u64,
    pub(super) head: u64,
}

impl Layout {
    /// Lays out the groups after the content, which ends at `cursor`.
    pub(super) fn find(cursor: Cursor, needs: &Needs) -> Result<Self, Ext4Error> {
        let content = cursor.next();
        let mut size = needs.size;
        let wanted = |size: Size, end: u64| match size {
            Size::AtLeast(bytes) => (bytes / BLOCK as u64).max(end + needs.slack),
            Size::Exactly(bytes) => bytes / BLOCK as u64,
        };
        let mut groups = wanted(size, content).div_ceil(GROUP).max(1);
        loop {
            let inodes_per_group = inodes_per_group(groups, needs);
            if inodes_per_group > INODES_MAX {
                if let Size::Exactly(_) = size {
                    return Err(too_small(needs, content));
                }
                groups += 1;
                continue;
            }
            let (mut layout, end) = Self::behind(cursor, groups, inodes_per_group, needs.head);
            let mut blocks = wanted(size, end);
            if blocks < end {
                return Err(too_small(needs, end));
            }
            if let Size::AtLeast(_) = size {
                blocks = blocks.max((groups - 1) * GROUP + 1);
            }
            if blocks.div_ceil(GROUP) > groups {
                groups = blocks.div_ceil(GROUP);
                continue;
            }
            let last = groups - 1;
            let (over, least) = (blocks - last * GROUP, layout.own_blocks(last) + WORTHWHILE);
            if over < least {
                match size {
                    Size::AtLeast(_) => blocks = last * GROUP + least,
                    Size::Exactly(_) if last > 0 => {
                        size = Size::Exactly(last * GROUP * BLOCK as u64);
                        groups = last;
                        continue;
                    }
                    Size::Exactly(_) => return Err(too_small(needs, least)),
                }
            }
            layout.blocks = blocks;
            return Ok(layout);
        }
    }

    /// Lays out the groups with content: all that begin before its end, including the bitmaps and tables after it.
    fn behind(cursor: Cursor, groups: u64, inodes_per_group: u64, head: u64) -> (Self, u64) {
        let table_blocks = inodes_per_group.div_ceil(INODES_PER_BLOCK);
        let mut with_content = cursor.next().div_ceil(GROUP).min(groups);
        loop {
            let mut cursor = cursor;
            let bitmaps = cursor.piece(2 * with_content);
            let tables: Vec<u64> = (0..with_content).map(|_| cursor.piece(table_blocks)).collect();
            let end = cursor.next();
            if end <= with_content * GROUP || with_content == groups {
                let layout =
                    Self { blocks: 0, groups, inodes_per_group, table_blocks, head, bitmaps, tables };
                return (layout, end);
            }
            with_content += 1;
        }
    }

    /// How many groups hold content, or bitmaps and tables of groups with content.
    pub(super) fn with_content(&self) -> u64 {
        self.tables.len() as u64
    }

    pub(super) fn place(&self, group: u64) -> Place {
        match self.tables.get(group as usize) {
            Some(table) => Place {
                block_bitmap: self.bitmaps + group,
                inode_bitmap: self.bitmaps + self.with_content() + group,
                table: *table,
            },
            None => {
                let start = group * GROUP + self.head_blocks(group);
                Place { block_bitmap: start, inode_bitmap: start + 1, table: start + 2 }
            }
        }
    }

    /// Metadata blocks at the beginning of a group.
    pub(super) fn own_blocks(&self, group: u64) -> u64 {
        let own = if group < self.with_content() { 0 } else { 2 + self.table_blocks };
        self.head_blocks(group) + own
    }

    fn head_blocks(&self, group: u64) -> u64 {
        if has_head(group) { self.head } else { 0 }
    }

    /// The blocks of a group; the last one may have fewer.
    pub(super) fn blocks_of(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP).min(GROUP)
    }

    /// The groups past the first that have a copy of the superblock and the descriptors.
    pub(super) fn copies(&self) -> impl Iterator<Item = u64> {
        (1..self.groups).filter(|group| has_head(*group))
    }

    /// Blocks that can never hold files, as Linux counts them (`s_overhead_clusters`).
    pub(super) fn overhead(&self, journal: u64) -> u64 {
        self.groups * (2 + self.table_blocks) + (1 + self.copies().count() as u64) * self.head + journal
    }
}

fn inodes_per_group(groups: u64, needs: &Needs) -> u64 {
    // Inode numbers have 32 bits.
    let most = u64::from(u32::MAX) / groups / INODES_PER_BLOCK * INODES_PER_BLOCK;
    let inodes = u64::from(needs.inodes);
    let wanted = (inodes + inodes / 16).div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
    wanted.max(needs.density.min(most))
}

fn too_small(needs: &Needs, blocks: u64) -> Ext4Error {
    let (Size::AtLeast(size) | Size::Exactly(size)) = needs.size;
    let needed = ByteSize::bytes(blocks * BLOCK as u64);
    Ext4Error::TooSmall { size: ByteSize::bytes(size), needed }
}
