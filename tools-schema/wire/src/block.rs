//! Large buffers that are reused. A new one costs a page fault for each of its pages, which takes longer than copying its content.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// How much a block holds, in bytes.
pub const SIZE: usize = 256 << 10;
/// How many unused blocks are kept, by all streams of a process together.
const UNUSED_MAX: usize = 8;

static UNUSED: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

fn unused() -> MutexGuard<'static, Vec<Box<[u8]>>> {
    UNUSED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block, filled from its start. Dropping it, or the bytes made of it, allows its reuse.
#[derive(Debug)]
pub struct Block {
    bytes: Box<[u8]>,
    filled: usize,
}

impl Block {
    /// An empty block.
    pub fn new() -> Self {
        let bytes = unused().pop();
        Self { bytes: bytes.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()), filled: 0 }
    }

    /// What is not filled yet. Tell [`Self::fill`] how much of it was filled.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// So many bytes of [`Self::room`] were filled.
    pub fn fill(&mut self, bytes: usize) {
        self.filled = (self.filled + bytes).min(SIZE);
    }

    /// Appends as many of these bytes as there is room for; returns how many.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let room = self.room();
        let taken = bytes.len().min(room.len());
        room[..taken].copy_from_slice(&bytes[..taken]);
        self.fill(taken);
        taken
    }

    /// What was filled, without a copy.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Default for Block {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut unused = unused();
        if unused.len() < UNUSED_MAX {
            unused.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_filled_and_reused_without_their_content() {
        let mut block = Block::new();
        assert_eq!((block.len(), block.room().len()), (0, SIZE));
        block.room()[..3].copy_from_slice(b"abc");
        block.fill(3);
        assert_eq!(block.push(b"de"), 2);
        let bytes = block.freeze();
        assert_eq!(&bytes[1..], b"bcde");
        drop(bytes);
        let blocks: Vec<Block> = (0..2 * UNUSED_MAX).map(|_| Block::new()).collect();
        assert!(blocks.iter().all(|block| block.is_empty()));
        drop(blocks);
        assert!(unused().len() <= UNUSED_MAX);
        let mut block = Block::new();
        assert_eq!(block.push(&[7; SIZE + 1]), SIZE);
        assert_eq!((block.push(b"x"), block.room().len()), (0, 0));
    }
}
