//! Where the blocks of a file are, and its bytes.
//!
//! Layouts: linux/fs/ext4/ext4_extents.h; blocks by a list, with one to three levels of lists, in older filesystems.

use super::bytes::{joined, u16_le, u32_le};
use super::inode::{HAS_EXTENTS, IS_ENCRYPTED, IS_INLINE, PLACES};
use super::superblock::as_u64;
use super::{Filesystem, Inode, Kind, ReadError};

const EXTENT_MAGIC: u16 = 0xf30a;
/// The levels of an extent tree.
const DEPTH_MAX: u16 = 5;
/// A longer extent is one that was never written to.
const WRITTEN_MAX: u64 = 32_768;
/// How many places of blocks are in the inode itself; the places of three levels of lists follow.
const DIRECT: u64 = 12;
/// The longest target of a link in Linux.
const TARGET_MAX: u64 = 4_096;

/// Blocks of a file that are together in the filesystem, or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first block; `None` for a hole.
    pub(super) first: Option<u64>,
    /// How many: at least one.
    pub(super) count: u64,
}

impl Filesystem {
    /// Reads bytes of a regular file, beginning at `offset`; holes are zeros.
    ///
    /// # Returns
    /// How many bytes were read: 0 only at the file's end and for an empty buffer.
    pub(crate) fn read(&self, inode: &Inode, offset: u64, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let left = usize::try_from(inode.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let Some(mut buffer) = buffer.get_mut(..length).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        if inode.flags & IS_ENCRYPTED != 0 {
            return Err(ReadError::Unsupported {
                what: format!("an encrypted file (inode {})", inode.number),
            });
        }
        if inode.flags & IS_INLINE != 0 {
            let content = self.inline(inode)?;
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let from = content.get(start..).unwrap_or_default();
            buffer.fill(0);
            buffer.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            return Ok(length);
        }
        let block_size = as_u64(self.geometry.block_size);
        let mut offset = offset;
        while !buffer.is_empty() {
            let within = offset % block_size;
            let run = self.run(inode, offset / block_size)?;
            let bytes = run.count.saturating_mul(block_size) - within;
            let count = buffer.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            let (part, rest) = buffer.split_at_mut(count);
            match run.first {
                Some(first) => self.disk.read(first * block_size + within, part)?,
                None => part.fill(0),
            }
            buffer = rest;
            offset += as_u64(count);
        }
        Ok(length)
    }

    /// The target of a symbolic link.
    pub(crate) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        if inode.kind() != Kind::Symlink || inode.size > TARGET_MAX {
            return Err(ReadError::inode("the link's target", inode.number));
        }
        let length = usize::try_from(inode.size).unwrap_or(0);
        if inode.flags & (IS_INLINE | HAS_EXTENTS | IS_ENCRYPTED) == 0 && length < PLACES {
            return Ok(inode.places.get(..length).unwrap_or_default().to_vec());
        }
        let mut target = vec![0; length];
        self.read(inode, 0, &mut target)?;
        Ok(target)
    }

    /// The content that is in the inode: in place of the blocks' numbers, and the rest as an extended attribute.
    pub(super) fn inline(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        let mut content = inode.places.to_vec();
        if let Some(rest) = self.inline_rest(inode)? {
            content.extend(rest);
        }
        Ok(content)
    }

    /// The run of blocks that begins at block `logical` of a file.
    pub(super) fn run(&self, inode: &Inode, logical: u64) -> Result<Run, ReadError> {
        let run = if inode.flags & HAS_EXTENTS != 0 {
            self.extent(inode, logical)?
        } else {
            self.listed(inode, logical)?
        };
        match run.first {
            Some(first) if !self.disk.has(first, run.count) => {
                Err(ReadError::inode("the place of a block", inode.number))
            }
            _ => Ok(run),
        }
    }

    fn extent(&self, inode: &Inode, logical: u64) -> Result<Run, ReadError> {
        let wrong = || ReadError::inode("the extent tree", inode.number);
        let mut node = inode.places.to_vec();
        let mut levels: Option<u16> = None;
        // Where what this node knows ends: at the next entry of the node above.
        let mut end = u64::MAX;
        loop {
            let depth = u16_le(&node, 6);
            if u16_le(&node, 0) != EXTENT_MAGIC
                || levels.map_or(depth > DEPTH_MAX, |above| depth.checked_add(1) != Some(above))
            {
                return Err(wrong());
            }
            let count = usize::from(u16_le(&node, 2));
            let entries = node.get(12..12 + 12 * count).ok_or_else(wrong)?;
            let entries: Vec<&[u8]> = entries.chunks_exact(12).collect();
            let after = entries.partition_point(|entry| u64::from(u32_le(entry, 0)) <= logical);
            if let Some(next) = entries.get(after) {
                end = end.min(u64::from(u32_le(next, 0)));
            }
            let hole = Run { first: None, count: end.saturating_sub(logical).max(1) };
            let Some(entry) = after.checked_sub(1).and_then(|at| entries.get(at)) else {
                return Ok(hole);
            };
            if depth == 0 {
                let length = u64::from(u16_le(entry, 4));
                let (length, is_written) =
                    if length > WRITTEN_MAX { (length - WRITTEN_MAX, false) } else { (length, true) };
                let skipped = logical.checked_sub(u64::from(u32_le(entry, 0))).ok_or_else(wrong)?;
                if skipped >= length {
                    return Ok(hole);
                }
                let first = joined(u32_le(entry, 8), u32::from(u16_le(entry, 6)));
                return Ok(Run { first: is_written.then(|| first + skipped), count: length - skipped });
            }
            let below = joined(u32_le(entry, 4), u32::from(u16_le(entry, 8)));
            node = self.disk.block(below)?;
            levels = Some(depth);
        }
    }

    fn listed(&self, inode: &Inode, logical: u64) -> Result<Run, ReadError> {
        if logical < DIRECT {
            let list = inode.places.get(..48).unwrap_or_default();
            return Ok(together(list, usize::try_from(logical).unwrap_or(0)));
        }
        let per_block = as_u64(self.geometry.block_size) / 4;
        let mut rest = logical - DIRECT;
        let mut covered = per_block;
        for level in 0..3_usize {
            if rest >= covered {
                rest -= covered;
                covered = covered.saturating_mul(per_block);
                continue;
            }
            let mut place = u32_le(&inode.places, 48 + 4 * level);
            loop {
                if place == 0 {
                    return Ok(Run { first: None, count: covered - rest % covered });
                }
                let list = self.disk.block(u64::from(place))?;
                covered /= per_block;
                let at = usize::try_from(rest / covered % per_block).unwrap_or(0);
                if covered == 1 {
                    return Ok(together(&list, at));
                }
                place = u32_le(&list, 4 * at);
            }
        }
        Err(ReadError::inode("the size", inode.number))
    }
}

/// The blocks of a list from the one at `at` that follow one another.
fn together(list: &[u8], at: usize) -> Run {
    let places = || list.chunks_exact(4).skip(at).map(|place| u64::from(u32_le(place, 0)));
    let first = places().next().unwrap_or(0);
    let mut count = 0;
    for place in places() {
        let expected = if first == 0 { 0 } else { first + count };
        if place != expected {
            break;
        }
        count += 1;
    }
    Run { first: (first != 0).then_some(first), count: count.max(1) }
}
