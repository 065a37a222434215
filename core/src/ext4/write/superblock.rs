//! The heads of groups: the superblock, the descriptors, and reserved space for more of them. Also the journal's superblock.
//!
//! Source: `struct ext4_super_block` and `struct ext4_group_desc` of linux/fs/ext4/ext4.h, `journal_superblock_t` of
//! linux/include/linux/jbd2.h; `reserve_backup_gdb` of linux/fs/ext4/resize.c for the inode that owns the reserve.

use super::super::Ext4Error;
use super::extents::ROOT;
use super::inode::{FIRST_INODE, JOURNAL_INODE};
use super::layout::Layout;
use super::output::Output;
use super::raw::{crc, set_words, set16, set32, set32_be};
use super::{BLOCK, GROUP, INODE};

/// Bytes of a group's descriptor.
pub(super) const DESCRIPTOR: usize = 64;
/// The minimum number of blocks for descriptors: enough for 1 TiB.
const DESCRIPTOR_BLOCKS: u64 = 128;
/// The offset of the first superblock; copies start at the beginning of their block.
const AT: usize = 1024;
const SUPERBLOCK: usize = 1024;

// Features. Compatible: has_journal, ext_attr, resize_inode, dir_index.
const HAS_JOURNAL: u32 = 0x4;
const RESIZE_INODE: u32 = 0x10;
const COMPATIBLE: u32 = 0x8 | 0x20;
// Incompatible: filetype, extents, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
// Read-only compatible: sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

/// Blocks of a head in a filesystem of at least this many bytes.
pub(super) fn head_blocks(bytes: u64) -> u64 {
    let groups = bytes.div_ceil(GROUP * BLOCK as u64);
    1 + descriptor_blocks(groups).max(DESCRIPTOR_BLOCKS)
}

/// Blocks for the descriptors of this many groups.
pub(super) fn descriptor_blocks(groups: u64) -> u64 {
    (groups * DESCRIPTOR as u64).div_ceil(BLOCK as u64)
}

/// The superblock's fields other than the layout.
pub(super) struct Facts<'f> {
    pub(super) uuid: [u8; 16],
    pub(super) hash_seed: [u8; 16],
    pub(super) label: &'f str,
    /// When it was made, in seconds since 1970.
    pub(super) made: u32,
    pub(super) free_blocks: u64,
    pub(super) used_inodes: u32,
    pub(super) journal: Option<Journal>,
}

/// The journal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Journal {
    pub(super) blocks: u64,
    pub(super) root: [u8; ROOT],
}

/// Writes the superblock and the descriptors, and their copies.
pub(super) fn put_heads(
    layout: &Layout,
    facts: &Facts<'_>,
    descriptors: &[u8],
    output: &mut Output,
) -> Result<(), Ext4Error> {
    let mut superblock = superblock(layout, facts);
    for group in std::iter::once(0).chain(layout.copies()) {
        // The group of this copy.
        set16(&mut superblock, 0x5a, group as u16);
        let checksum = crc(!0, &superblock[..SUPERBLOCK - 4]);
        set32(&mut superblock, SUPERBLOCK - 4, checksum);
        let mut block = [0; BLOCK];
        let at = if group == 0 { AT } else { 0 };
        block[at..at + SUPERBLOCK].copy_from_slice(&superblock);
        output.put(group * GROUP, &block)?;
        output.put(group * GROUP + 1, descriptors)?;
    }
    Ok(())
}

fn superblock(layout: &Layout, facts: &Facts<'_>) -> [u8; SUPERBLOCK] {
    let mut block = [0; SUPERBLOCK];
    let inodes = (layout.inodes_per_group * layout.groups) as u32;
    let reserve = reserve(layout);
    let b = &mut block[..];
    set32(b, 0x00, inodes);
    set_words(b, 0x04, 0x150, layout.blocks);
    set_words(b, 0x0c, 0x158, facts.free_blocks);
    set32(b, 0x10, inodes - facts.used_inodes);
    // Blocks and clusters of 4 KiB: 1 KiB shifted by 2.
    set32(b, 0x18, 2);
    set32(b, 0x1c, 2);
    set32(b, 0x20, GROUP as u32);
    set32(b, 0x24, GROUP as u32);
    set32(b, 0x28, layout.inodes_per_group as u32);
    // The times of the last write, the last check and the creation.
    for time in [0x30, 0x40, 0x108] {
        set32(b, time, facts.made);
    }
    // No check after a number of mounts.
    set16(b, 0x36, 0xffff);
    set16(b, 0x38, 0xef53);
    // Clean; read-only after an error; dynamic revision.
    set16(b, 0x3a, 1);
    set16(b, 0x3c, 2);
    set32(b, 0x4c, 1);
    set32(b, 0x54, FIRST_INODE);
    set16(b, 0x58, INODE as u16);
    let mut compatible = COMPATIBLE;
    if reserve > 0 {
        compatible |= RESIZE_INODE;
        set16(b, 0xce, reserve as u16);
    }
    if let Some(journal) = &facts.journal {
        compatible |= HAS_JOURNAL;
        set32(b, 0xe0, JOURNAL_INODE);
        // A backup of the journal inode's blocks and size.
        b[0xfd] = 1;
        b[0x10c..0x10c + ROOT].copy_from_slice(&journal.root);
        set32(b, 0x14c, (journal.blocks * BLOCK as u64) as u32);
    }
    set32(b, 0x5c, compatible);
    set32(b, 0x60, INCOMPATIBLE);
    set32(b, 0x64, READ_COMPATIBLE);
    b[0x68..0x78].copy_from_slice(&facts.uuid);
    b[0x78..0x78 + facts.label.len()].copy_from_slice(facts.label.as_bytes());
    b[0xec..0xfc].copy_from_slice(&facts.hash_seed);
    b[0xfc] = super::hash::VERSION;
    set16(b, 0xfe, DESCRIPTOR as u16);
    // Default mount options: user_xattr and acl.
    set32(b, 0x100, 0x4 | 0x8);
    // Bytes of an inode after the first 128: minimum, and wanted.
    set16(b, 0x15c, 32);
    set16(b, 0x15e, 32);
    // Names are hashed as signed characters.
    set32(b, 0x160, 1);
    // 16 groups per flex group; checksums are CRC-32C.
    b[0x174] = 4;
    b[0x175] = 1;
    let overhead = layout.overhead(facts.journal.map_or(0, |journal| journal.blocks));
    set32(b, 0x248, overhead as u32);
    block
}

/// Blocks of a head that are reserved for more descriptors.
pub(super) fn reserve(layout: &Layout) -> u64 {
    layout.head - 1 - descriptor_blocks(layout.groups)
}

/// Writes the blocks that assign the reserve to its inode: `index` lists those of the first head, and each of them lists its
/// copies.
pub(super) fn put_reserve(layout: &Layout, index: u64, output: &mut Output) -> Result<(), Ext4Error> {
    let first = 1 + descriptor_blocks(layout.groups);
    let reserve = first..layout.head;
    let mut block = [0; BLOCK];
    for at in reserve.clone() {
        // The entries for descriptor blocks in use stay empty.
        set32(&mut block, 4 * (at as usize - 1), at as u32);
    }
    output.put(index, &block)?;
    for at in reserve {
        let mut block = [0; BLOCK];
        for (number, group) in layout.copies().enumerate() {
            set32(&mut block, 4 * number, (group * GROUP + at) as u32);
        }
        output.put(at, &block)?;
    }
    Ok(())
}

/// The first block of an empty journal.
pub(super) fn journal(uuid: &[u8; 16], blocks: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    set32_be(&mut block, 0x00, 0xc03b_3998);
    // Version 2 of the superblock.
    set32_be(&mut block, 0x04, 4);
    set32_be(&mut block, 0x0c, BLOCK as u32);
    set32_be(&mut block, 0x10, blocks as u32);
    // Its first block, and the number of the first transaction.
    set32_be(&mut block, 0x14, 1);
    set32_be(&mut block, 0x18, 1);
    block[0x30..0x40].copy_from_slice(uuid);
    // The number of filesystems that use it.
    set32_be(&mut block, 0x40, 1);
    block
}
