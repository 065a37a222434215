//! The journal: which blocks it has newer than their places, without writing anything.
//!
//! Layout and rules: linux/include/linux/jbd2.h, fs/jbd2/recovery.c. Its numbers are big-endian.

use std::collections::HashMap;

use super::bytes::{joined, u16_be, u32_be};
use super::disk::Newer;
use super::superblock::as_u64;
use super::{Filesystem, ReadError};

pub(super) const MAGIC: u32 = 0xc03b_3998;
// Kinds of blocks.
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;
// Incompatible features: revoked blocks, 64-bit numbers, commits without a barrier, checksums of versions 2 and 3.
const REVOKES: u32 = 0x1;
const BITS_64: u32 = 0x2;
const ASYNC: u32 = 0x4;
const CHECKSUMS_V2: u32 = 0x8;
const CHECKSUMS_V3: u32 = 0x10;
// Flags of a block in a descriptor.
const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;
/// The length of the header that all its own blocks have.
const HEADER: usize = 12;
/// The longest journal that mke2fs makes, in blocks.
const BLOCKS_MAX: u64 = 10_240_000;
/// How many blocks may be replayed, and how many revoked: more than the journals have that mke2fs makes by default.
const ENTRIES_MAX: usize = 1 << 20;

/// A journal that is read from its first to its last complete transaction.
struct Journal<'f> {
    filesystem: &'f Filesystem,
    inode: super::Inode,
    features: u32,
    /// Where checksums begin; `None` if blocks have none.
    seed: Option<u32>,
    /// The blocks of the log: it continues at `first` after `end`.
    first: u64,
    end: u64,
}

/// What a transaction has.
#[derive(Default)]
struct Transaction {
    /// Blocks of the filesystem, and where the log has them.
    blocks: Vec<(u64, Newer)>,
    revoked: Vec<u64>,
}

/// The blocks of the filesystem that its journal has newer. It is read while `goes_on`.
pub(super) fn newer(
    filesystem: &Filesystem,
    goes_on: &dyn Fn() -> bool,
) -> Result<HashMap<u64, Newer>, ReadError> {
    let number = filesystem.geometry.journal;
    if number == 0 {
        return Err(ReadError::Unsupported { what: "a journal on another device to be replayed".to_owned() });
    }
    let wrong = |what| ReadError::Damaged { what, of: "the journal".to_owned() };
    let inode = filesystem.inode(number)?;
    let run = filesystem.run(&inode, 0)?;
    let head = filesystem.disk.block(run.first.ok_or_else(|| wrong("the start"))?)?;
    let version = u32_be(&head, 4);
    if u32_be(&head, 0) != MAGIC || !matches!(version, 3 | SUPERBLOCK_V2) {
        return Err(wrong("the superblock"));
    }
    if usize::try_from(u32_be(&head, HEADER)).ok() != Some(filesystem.geometry.block_size) {
        return Err(wrong("the block size"));
    }
    let features = if version == SUPERBLOCK_V2 { u32_be(&head, 0x28) } else { 0 };
    let known = REVOKES | BITS_64 | ASYNC | CHECKSUMS_V2 | CHECKSUMS_V3;
    if features & !known != 0 {
        // Among them are fast commits.
        return Err(ReadError::Unsupported {
            what: format!("a journal to be replayed with features {:#x}", features & !known),
        });
    }
    let (end, first) = (u64::from(u32_be(&head, 0x10)), u64::from(u32_be(&head, 0x14)));
    let (sequence, start) = (u32_be(&head, 0x18), u64::from(u32_be(&head, 0x1c)));
    if end > BLOCKS_MAX
        || end > inode.size / as_u64(filesystem.geometry.block_size)
        || first == 0
        || first >= end
    {
        return Err(wrong("the size"));
    }
    if start == 0 {
        return Ok(HashMap::new());
    }
    if start < first || start >= end {
        return Err(wrong("the start"));
    }
    let seed = (features & (CHECKSUMS_V2 | CHECKSUMS_V3) != 0)
        .then(|| crc(!0, head.get(0x30..0x40).unwrap_or_default()));
    Journal { filesystem, inode, features, seed, first, end }.replay(start, sequence, goes_on)
}

impl Journal<'_> {
    fn replay(
        &self,
        start: u64,
        sequence: u32,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<HashMap<u64, Newer>, ReadError> {
        let mut newer: HashMap<u64, (Newer, u32)> = HashMap::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let (mut at, mut sequence) = (start, sequence);
        let mut transaction = Transaction::default();
        let mut left = self.end - self.first;
        // A log that does not end is damaged, and has been read once when nothing is left.
        while let Some(after) = left.checked_sub(1) {
            left = after;
            if !goes_on() {
                return Err(ReadError::Stopped);
            }
            let block = self.filesystem.disk.block(self.place(at)?)?;
            if u32_be(&block, 0) != MAGIC || u32_be(&block, 8) != sequence {
                break;
            }
            at = self.next(at);
            match u32_be(&block, 4) {
                DESCRIPTOR if self.has_tail(&block) => {
                    let Some(rest) = self.descriptor(&block, sequence, &mut at, left, &mut transaction)?
                    else {
                        break;
                    };
                    left = rest;
                }
                REVOKE if self.has_tail(&block) => self.revokes(&block, &mut transaction),
                COMMIT if self.is_committed(&block) => {
                    let complete = std::mem::take(&mut transaction);
                    newer.extend(
                        complete.blocks.into_iter().map(|(number, place)| (number, (place, sequence))),
                    );
                    revoked.extend(complete.revoked.into_iter().map(|number| (number, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                // It was not written to its end: the transaction and those after it never happened.
                _ => break,
            }
            if newer.len().max(transaction.blocks.len()).max(revoked.len()).max(transaction.revoked.len())
                > ENTRIES_MAX
            {
                return Err(ReadError::TooLarge {
                    what: format!("more than {ENTRIES_MAX} blocks in its journal"),
                });
            }
        }
        // A block that was freed in the same transaction or later is not to be written.
        newer.retain(|number, (_, written)| {
            revoked.get(number).is_none_or(|freed| written.wrapping_sub(*freed).cast_signed() > 0)
        });
        Ok(newer.into_iter().map(|(number, (place, _))| (number, place)).collect())
    }

    /// The blocks that a descriptor names, which follow it in the log; `None` if one is not as it was written. Returns how many
    /// blocks of the log are left.
    fn descriptor(
        &self,
        block: &[u8],
        sequence: u32,
        at: &mut u64,
        mut left: u64,
        transaction: &mut Transaction,
    ) -> Result<Option<u64>, ReadError> {
        let is_v3 = self.features & CHECKSUMS_V3 != 0;
        let is_wide = self.features & BITS_64 != 0;
        let length = if is_v3 {
            16
        } else {
            8 + 4 * usize::from(is_wide) + 2 * usize::from(self.features & CHECKSUMS_V2 != 0)
        };
        let mut rest = block.get(HEADER..block.len() - self.tail()).unwrap_or_default();
        while let Some((tag, after)) = rest.split_at_checked(length) {
            rest = after;
            let flags = if is_v3 { u32_be(tag, 4) } else { u32::from(u16_be(tag, 6)) };
            let number = joined(u32_be(tag, 0), if is_wide { u32_be(tag, 8) } else { 0 });
            let Some(fewer) = left.checked_sub(1) else { return Ok(None) };
            left = fewer;
            let place = self.place(*at)?;
            *at = self.next(*at);
            if let Some(seed) = self.seed {
                let content = self.filesystem.disk.block(place)?;
                let sum = crc(crc(seed, &sequence.to_be_bytes()), &content);
                let is_right =
                    if is_v3 { u32_be(tag, 12) == sum } else { u32::from(u16_be(tag, 4)) == sum & 0xffff };
                if !is_right {
                    return Ok(None);
                }
            }
            transaction.blocks.push((number, Newer { at: place, is_escaped: flags & ESCAPED != 0 }));
            if flags & SAME_UUID == 0 {
                rest = rest.get(16..).unwrap_or_default();
            }
            if flags & LAST != 0 {
                break;
            }
        }
        Ok(Some(left))
    }

    fn revokes(&self, block: &[u8], transaction: &mut Transaction) {
        let is_wide = self.features & BITS_64 != 0;
        let used = usize::try_from(u32_be(block, HEADER)).unwrap_or(usize::MAX);
        let end = used.min(block.len() - self.tail());
        let numbers = block.get(HEADER + 4..end).unwrap_or_default();
        transaction.revoked.extend(numbers.chunks_exact(if is_wide { 8 } else { 4 }).map(|number| {
            if is_wide { joined(u32_be(number, 4), u32_be(number, 0)) } else { u64::from(u32_be(number, 0)) }
        }));
    }

    fn tail(&self) -> usize {
        if self.seed.is_some() { 4 } else { 0 }
    }

    /// Whether a descriptor or a block of revocations has its right checksum, which is in its last bytes.
    fn has_tail(&self, block: &[u8]) -> bool {
        let Some(seed) = self.seed else { return true };
        block
            .split_last_chunk::<4>()
            .is_some_and(|(before, sum)| crc(crc(seed, before), &[0; 4]) == u32::from_be_bytes(*sum))
    }

    fn is_committed(&self, block: &[u8]) -> bool {
        let Some(seed) = self.seed else { return true };
        let (before, after) = (block.get(..16).unwrap_or_default(), block.get(20..).unwrap_or_default());
        crc(crc(crc(seed, before), &[0; 4]), after) == u32_be(block, 16)
    }

    fn next(&self, at: u64) -> u64 {
        if at + 1 >= self.end { self.first } else { at + 1 }
    }

    /// Where in the filesystem a block of the log is.
    fn place(&self, at: u64) -> Result<u64, ReadError> {
        let run = self.filesystem.run(&self.inode, at)?;
        run.first.ok_or_else(|| ReadError::inode("a hole in the journal, that", self.inode.number))
    }
}

/// CRC-32C as the journal computes it: starting with a seed, and not inverted at the end.
fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
