//! The kept part of one output stream: its head and its tail, in blocks that are freed one by one.

use std::collections::VecDeque;
use std::ops::{Deref, Range};

use bytes::Bytes;

/// The size of a full block, in bytes: large enough for the allocator to return it to the system.
const BLOCK: usize = 256 << 10;
/// Output of at least this size, in bytes, is kept in the block that it was read into, instead of being copied. It nearly fills that block.
const SHARED_FROM: usize = BLOCK / 8 * 7;

/// The head and the tail of a stream. As long as the whole stream fits, there is no gap between them.
#[derive(Debug, Default)]
pub(super) struct Kept {
    head: Blocks,
    head_max: usize,
    tail: Blocks,
    tail_max: usize,
    total: u64,
}

impl Kept {
    /// Creates a buffer that keeps up to `keep` bytes: the head and the tail.
    pub(super) fn new(keep: usize) -> Self {
        let tail_max = keep / 2;
        Self { head_max: keep - tail_max, tail_max, ..Self::default() }
    }

    /// Creates a buffer that keeps the last `keep` bytes.
    pub(super) fn newest(keep: usize) -> Self {
        Self { tail_max: keep, ..Self::default() }
    }

    /// Appends output.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let room = self.head_max.saturating_sub(self.head.len);
        // Once the tail has bytes, or bytes were dropped, the head is complete.
        let room = if self.total - bytes.len() as u64 == self.head.len as u64 { room } else { 0 };
        let (head, rest) = bytes.split_at(room.min(bytes.len()));
        self.head.push(head);
        self.tail.push(&rest[rest.len().saturating_sub(self.tail_max)..]);
        self.tail.drop_front(self.tail.len.saturating_sub(self.tail_max));
    }

    /// The same for output in a block of its own. If the head is complete, much of it is not copied.
    pub(super) fn share(&mut self, bytes: &Bytes) {
        let head_is_complete = self.head.len >= self.head_max || self.total > self.head.len as u64;
        if !head_is_complete || bytes.len() < SHARED_FROM || bytes.len() > self.tail_max {
            return self.push(bytes);
        }
        self.total += bytes.len() as u64;
        self.tail.share(bytes.clone());
        self.tail.drop_front(self.tail.len.saturating_sub(self.tail_max));
    }

    /// Returns the total size of the stream so far, in bytes.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Returns how much is kept, in bytes.
    pub(super) fn len(&self) -> usize {
        self.head.len + self.tail.len
    }

    /// Returns the range of bytes between head and tail that were dropped.
    pub(super) fn gap(&self) -> Range<u64> {
        self.head.len as u64..self.total - self.tail.len as u64
    }

    /// Returns how many bytes were dropped.
    pub(super) fn dropped(&self) -> u64 {
        let gap = self.gap();
        gap.end - gap.start
    }

    /// Returns the first `most` contiguous kept bytes at or after `offset`, and their offset.
    pub(super) fn read(&self, offset: u64, most: usize) -> (u64, Vec<u8>) {
        let gap = self.gap();
        if offset < gap.start {
            let mut bytes = self.head.read(offset as usize, most);
            if gap.is_empty() {
                bytes.extend(self.tail.read(0, most - bytes.len()));
            }
            return (offset, bytes);
        }
        let start = offset.clamp(gap.end, self.total);
        (start, self.tail.read((start - gap.end) as usize, most))
    }

    /// Returns the last `most` bytes, as far as they are kept contiguously.
    pub(super) fn last(&self, most: usize) -> Vec<u8> {
        let from = self.total.saturating_sub(most as u64);
        let gap = self.gap();
        let from = if gap.is_empty() { from } else { from.max(gap.end) };
        self.read(from, most).1
    }

    /// Reduces what is kept now and later to `most` bytes.
    pub(super) fn shrink(&mut self, most: usize) {
        let tail_max = most / 2;
        let head_max = most - tail_max;
        if self.gap().is_empty() && self.head.len > head_max {
            // There is no gap: the end of the head becomes the start of the tail.
            let wanted = tail_max.saturating_sub(self.tail.len);
            let from = self.head.len.saturating_sub(wanted).max(head_max);
            let mut tail = Blocks::default();
            tail.push(&self.head.read(from, self.head.len - from));
            tail.push(&self.tail.read(0, self.tail.len));
            self.tail = tail;
        }
        self.head.truncate(head_max);
        self.tail.drop_front(self.tail.len.saturating_sub(tail_max));
        self.head_max = self.head.len.min(head_max);
        self.tail_max = tail_max;
        self.tail.spare = None;
    }

    /// Nothing more comes.
    pub(super) fn end(&mut self) {
        self.tail.spare = None;
    }

    /// Drops everything that is kept so far.
    pub(super) fn clear(&mut self) {
        self.head = Blocks::default();
        self.head_max = 0;
        self.tail = Blocks::default();
    }
}

/// A part of a queue.
#[derive(Debug)]
enum Block {
    /// Filled by copies.
    Own(Vec<u8>),
    /// What others have, too.
    Shared(Bytes),
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// A queue of bytes.
#[derive(Debug, Default)]
struct Blocks {
    blocks: VecDeque<Block>,
    /// The number of dropped bytes at the start of the first block.
    skip: usize,
    len: usize,
    /// The full block that was dropped last, for reuse: a new one costs a page fault for each of its pages.
    spare: Option<Vec<u8>>,
}

impl Blocks {
    fn push(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len();
        while !bytes.is_empty() {
            if !matches!(self.blocks.back(), Some(Block::Own(last)) if last.len() < BLOCK) {
                let first = if self.blocks.is_empty() { 0 } else { BLOCK };
                let block = self.spare.take().unwrap_or_else(|| Vec::with_capacity(first));
                self.blocks.push_back(Block::Own(block));
            }
            let Some(Block::Own(last)) = self.blocks.back_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - last.len()));
            last.extend_from_slice(now);
            bytes = later;
        }
    }

    fn share(&mut self, bytes: Bytes) {
        self.len += bytes.len();
        self.blocks.push_back(Block::Shared(bytes));
    }

    fn drop_front(&mut self, count: usize) {
        self.len -= count;
        self.skip += count;
        while self.blocks.front().is_some_and(|first| self.skip >= first.len()) {
            let Some(block) = self.blocks.pop_front() else { break };
            self.skip -= block.len();
            if let Block::Own(mut bytes) = block
                && bytes.len() == BLOCK
            {
                bytes.clear();
                self.spare = Some(bytes);
            }
        }
        if self.blocks.is_empty() {
            self.skip = 0;
        }
    }

    fn truncate(&mut self, len: usize) {
        while self.len > len {
            let is_first = self.blocks.len() == 1;
            let Some(last) = self.blocks.back_mut() else { return };
            let in_last = if is_first { self.len } else { last.len() };
            let over = (self.len - len).min(in_last);
            let rest = last.len() - over;
            match last {
                Block::Own(bytes) => bytes.truncate(rest),
                Block::Shared(bytes) => bytes.truncate(rest),
            }
            self.len -= over;
            if over == in_last {
                self.blocks.pop_back();
            }
        }
        if self.len == 0 {
            *self = Self::default();
        }
    }

    fn read(&self, from: usize, most: usize) -> Vec<u8> {
        let mut at = self.skip + from;
        let mut left = most.min(self.len.saturating_sub(from));
        let mut bytes = Vec::with_capacity(left);
        for block in &self.blocks {
            if left == 0 {
                break;
            }
            if at >= block.len() {
                at -= block.len();
                continue;
            }
            let piece = &block[at..block.len().min(at + left)];
            bytes.extend_from_slice(piece);
            left -= piece.len();
            at = 0;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream in which every byte shows its offset.
    fn pattern(range: Range<usize>) -> Vec<u8> {
        range.map(|at| (at % 251) as u8).collect()
    }

    fn filled(keep: usize, total: usize, piece: usize) -> Kept {
        let mut kept = Kept::new(keep);
        for start in (0..total).step_by(piece) {
            kept.push(&pattern(start..total.min(start + piece)));
        }
        kept
    }

    #[test]
    fn what_fits_is_whole_to_the_byte() {
        for (keep, total) in [(10, 10), (11, 11), (1 << 20, 1 << 20), (3_000_000, 3_000_000), (10, 0)] {
            for piece in [1, 7, 65_536] {
                if piece == 1 && total > 1000 {
                    continue;
                }
                let kept = filled(keep, total, piece);
                assert_eq!((kept.total(), kept.len(), kept.dropped()), (total as u64, total, 0));
                assert!(kept.read(0, usize::MAX) == (0, pattern(0..total)), "{keep} {total} {piece}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_loses_its_middle() {
        for (keep, total, piece) in
            [(10, 11, 3), (10, 1000, 7), (1 << 20, 3 << 20, 65_536), (700_001, 2_000_003, 9_999)]
        {
            let kept = filled(keep, total, piece);
            assert_eq!(kept.len(), keep);
            assert_eq!(kept.dropped(), (total - keep) as u64);
            let gap = kept.gap();
            assert!(kept.read(0, usize::MAX) == (0, pattern(0..gap.start as usize)), "{keep} {total}");
            let tail = pattern(gap.end as usize..total);
            assert!(kept.read(gap.start, usize::MAX) == (gap.end, tail.clone()), "the gap is passed over");
            assert_eq!(kept.read(gap.end + 1, 2), (gap.end + 1, tail[1..3].to_vec()));
            assert_eq!(kept.last(3), tail[tail.len() - 3..]);
            assert!(kept.last(usize::MAX) == tail, "{keep} {total}");
            assert_eq!(kept.read(total as u64 + 5, 7), (total as u64, Vec::new()));
        }
    }

    #[test]
    fn what_is_shared_is_kept_the_same_as_what_is_copied() {
        for keep in [(2 << 20) + 1, 700_000, 1000] {
            for sizes in [&[SHARED_FROM][..], &[BLOCK - 4, 10, 100_000, SHARED_FROM, 1], &[BLOCK, 7, 70_000]]
            {
                for newest in [false, true] {
                    let make = || if newest { Kept::newest(keep) } else { Kept::new(keep) };
                    let (mut shared, mut copied, mut total) = (make(), make(), 0);
                    for size in sizes.iter().cycle().take(30) {
                        let bytes = pattern(total..total + size);
                        copied.push(&bytes);
                        shared.share(&bytes.into());
                        total += size;
                        assert_eq!((shared.len(), shared.gap()), (copied.len(), copied.gap()), "{keep}");
                    }
                    assert_eq!(shared.total(), total as u64);
                    let gap = copied.gap();
                    assert!(shared.read(0, usize::MAX) == copied.read(0, usize::MAX), "{keep} {sizes:?}");
                    assert!(shared.read(gap.end, usize::MAX) == copied.read(gap.end, usize::MAX), "{keep}");
                    shared.shrink(keep / 3);
                    copied.shrink(keep / 3);
                    assert!(shared.last(usize::MAX) == copied.last(usize::MAX), "{keep} {sizes:?}");
                    let is_shared = |block: &Block| matches!(block, Block::Shared(_));
                    assert!(keep < 1 << 20 || shared.tail.blocks.iter().any(is_shared), "{keep} {sizes:?}");
                }
            }
        }
    }

    #[test]
    fn shrinking_keeps_both_ends_and_goes_on() {
        for (keep, total) in [(1 << 20, 900_000), (1 << 20, 600_000), (1 << 20, 5 << 20), (1 << 20, 1_000)] {
            for most in [100_000, 1_000, 3, 0] {
                let mut kept = filled(keep, total, 10_000);
                kept.shrink(most);
                assert_eq!(kept.len(), most.min(total), "{total} {most}");
                kept.push(&pattern(total..total + 50_000));
                let (gap, end) = (kept.gap(), total + 50_000);
                let first = if gap.is_empty() { end } else { gap.start as usize };
                assert!(first == 0 || kept.read(0, usize::MAX).1 == pattern(0..first), "{total} {most}");
                assert!(kept.read(gap.end, usize::MAX).1 == pattern(gap.end as usize..end), "{total} {most}");
                assert_eq!(kept.len() > 0, most > 0, "{total} {most}");
                assert_eq!(kept.total(), total as u64 + 50_000);
            }
        }
        let mut kept = filled(1 << 20, 5 << 20, 10_000);
        kept.clear();
        assert_eq!((kept.len(), kept.total(), kept.dropped()), (0, 5 << 20, 5 << 20));
        kept.push(b"more");
        assert_eq!(kept.read(0, 10), (5 << 20, b"more".to_vec()));
    }
}
