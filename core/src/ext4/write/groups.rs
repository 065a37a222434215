//! Bitmaps and descriptors of the groups.

use super::super::Ext4Error;
use super::layout::Layout;
use super::output::Output;
use super::raw::{Seed, crc, set_halves, set_words, set16};
use super::superblock::{DESCRIPTOR, descriptor_blocks};
use super::{BLOCK, GROUP};

// Flags of a descriptor: the inode bitmap or the block bitmap was never written; the unused part of the inode table is zeros.
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const INODE_ZEROED: u16 = 4;

/// Which blocks are in use in the groups with content.
pub(super) struct Used(Vec<u64>);

impl Used {
    pub(super) fn new(groups: u64) -> Self {
        Self(vec![0; (groups * GROUP / 64) as usize])
    }

    /// Marks blocks as used; blocks after the groups with content are ignored.
    pub(super) fn mark(&mut self, start: u64, blocks: u64) {
        let mut at = start;
        let end = (start + blocks).min(self.0.len() as u64 * 64);
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            self.0[(at / 64) as usize] |= (u64::MAX >> (64 - bits)) << (at % 64);
            at += bits;
        }
    }

    /// Runs of unused blocks in `from..to`.
    pub(super) fn gaps(&self, from: u64, to: u64) -> Vec<(u64, u64)> {
        let mut gaps: Vec<(u64, u64)> = Vec::new();
        let mut at = from;
        while at < to {
            let word = self.0[(at / 64) as usize] >> (at % 64);
            let left = (64 - at % 64).min(to - at);
            let used = u64::from(word.trailing_ones());
            if used > 0 {
                at += used.min(left);
                continue;
            }
            let free = u64::from(word.trailing_zeros()).min(left);
            match gaps.last_mut() {
                Some((start, blocks)) if *start + *blocks == at => *blocks += free,
                _ => gaps.push((at, free)),
            }
            at += free;
        }
        gaps
    }

    fn group(&self, group: u64) -> &[u64] {
        let words = (GROUP / 64) as usize;
        &self.0[group as usize * words..][..words]
    }
}

/// The written bitmaps.
pub(super) struct Groups {
    /// Whole blocks.
    pub(super) descriptors: Vec<u8>,
    pub(super) free_blocks: u64,
}

/// Writes the bitmaps and returns the descriptors; `directories` counts the directories of each group with used inodes.
pub(super) fn put(
    layout: &Layout,
    used: &Used,
    used_inodes: u32,
    directories: &[u32],
    seed: Seed,
    output: &mut Output,
) -> Result<Groups, Ext4Error> {
    let mut descriptors = vec![0; descriptor_blocks(layout.groups) as usize * BLOCK];
    let mut free_blocks = 0;
    let descriptor = |all: &mut [u8], group: u64| -> std::ops::Range<usize> {
        debug_assert!((group as usize + 1) * DESCRIPTOR <= all.len());
        group as usize * DESCRIPTOR..(group as usize + 1) * DESCRIPTOR
    };
    for group in 0..layout.groups {
        let blocks = layout.blocks_of(group);
        let at = descriptor(&mut descriptors, group);
        let raw = &mut descriptors[at];
        let has_content = group < layout.with_content();
        // Linux can compute what is in use in a group without content, except for the last group.
        let (free, flags) = if has_content || group + 1 == layout.groups {
            let bitmap = if has_content { bitmap(used.group(group)) } else { ones(layout.own_blocks(group)) };
            let free = blocks - count(&bitmap);
            let bitmap = filled(bitmap, blocks);
            output.put(layout.place(group).block_bitmap, &bitmap)?;
            set_halves(raw, 0x18, 0x38, crc(seed.0, &bitmap));
            (free, INODE_ZEROED)
        } else {
            (blocks - layout.own_blocks(group), INODE_ZEROED | BLOCK_UNINIT)
        };
        free_blocks += free;
        set_halves(raw, 0x0c, 0x2c, free as u32);
        set16(raw, 0x12, flags);
    }
    for group in 0..layout.groups {
        let per_group = layout.inodes_per_group;
        let inodes = u64::from(used_inodes).saturating_sub(group * per_group).min(per_group);
        let at = descriptor(&mut descriptors, group);
        let raw = &mut descriptors[at];
        if inodes == 0 {
            let flags = u16::from_le_bytes([raw[0x12], raw[0x13]]);
            set16(raw, 0x12, flags | INODE_UNINIT);
        } else {
            let bitmap = filled(ones(inodes), per_group);
            output.put(layout.place(group).inode_bitmap, &bitmap)?;
            set_halves(raw, 0x1a, 0x3a, crc(seed.0, &bitmap[..(per_group / 8) as usize]));
        }
        let place = layout.place(group);
        set_words(raw, 0x00, 0x20, place.block_bitmap);
        set_words(raw, 0x04, 0x24, place.inode_bitmap);
        set_words(raw, 0x08, 0x28, place.table);
        // Free inodes, and inodes at the end that were never used.
        set_halves(raw, 0x0e, 0x2e, (per_group - inodes) as u32);
        set_halves(raw, 0x1c, 0x32, (per_group - inodes) as u32);
        set_halves(raw, 0x10, 0x30, directories.get(group as usize).copied().unwrap_or(0));
        let checksum = crc(crc(seed.0, &(group as u32).to_le_bytes()), raw);
        set16(raw, 0x1e, checksum as u16);
    }
    Ok(Groups { descriptors, free_blocks })
}

fn bitmap(words: &[u64]) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// A bitmap whose first bits are set.
fn ones(count: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    let whole = (count / 8) as usize;
    bytes[..whole].fill(0xff);
    if !count.is_multiple_of(8) {
        bytes[whole] = (1 << (count % 8)) - 1;
    }
    bytes
}

/// Sets all bits from `count` on, because they stand for nothing.
fn filled(mut bytes: [u8; BLOCK], count: u64) -> [u8; BLOCK] {
    let whole = (count / 8) as usize;
    if !count.is_multiple_of(8) {
        bytes[whole] |= 0xff << (count % 8);
    }
    bytes[whole + usize::from(!count.is_multiple_of(8))..].fill(0xff);
    bytes
}

fn count(bytes: &[u8; BLOCK]) -> u64 {
    bytes.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_gaps_agree_block_by_block() {
        let mut used = Used::new(2);
        let mut expected = vec![false; 2 * GROUP as usize];
        for (start, blocks) in [(0, 1), (63, 2), (64, 64), (200, 1), (32_700, 200), (65_500, 100)] {
            used.mark(start, blocks);
            let end = (start + blocks).min(2 * GROUP);
            expected[start as usize..end as usize].fill(true);
        }
        for (from, to) in [(0, 2 * GROUP), (1, 63), (63, 201), (129, 32_701), (40_000, 65_536), (5, 5)] {
            let mut is = expected.clone();
            for (start, blocks) in used.gaps(from, to) {
                assert!(blocks > 0);
                for block in &mut is[start as usize..(start + blocks) as usize] {
                    assert!(!std::mem::replace(block, true), "{start}");
                }
            }
            assert!(is[from as usize..to as usize].iter().all(|used| *used), "{from}..{to}");
        }
    }

    #[test]
    fn bits_without_a_meaning_are_set() {
        assert_eq!(count(&ones(0)), 0);
        assert_eq!((count(&ones(13)), ones(13)[..2].to_vec()), (13, vec![0xff, 0x1f]));
        assert_eq!(count(&ones(GROUP)), GROUP);
        let bitmap = filled(ones(13), 20);
        assert_eq!(bitmap[..4], [0xff, 0x1f, 0xf0, 0xff]);
        assert_eq!(filled(ones(8), GROUP), ones(8));
        assert_eq!(filled(ones(8), 8), [0xff; BLOCK]);
    }
}
