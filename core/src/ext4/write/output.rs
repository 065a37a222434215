//! The filesystem's file, and which of its blocks are free.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fs_err as fs;
use rustix::fs::FallocateFlags;

use super::super::Ext4Error;
use super::raw::ZEROS;
use super::{BLOCK, GROUP};
use crate::os::disk::free_bytes;
use crate::progress::Progress;

/// How much is written at once.
const BUFFER: usize = 1 << 20;
/// After how many bytes the free disk space is checked again.
const LOOK: u64 = 16 << 20;

/// Whether a group has a copy of the superblock and the descriptors, or the first of them (`sparse_super`).
pub(super) fn has_head(group: u64) -> bool {
    let is_power = |of: u64| {
        let mut power = of;
        while power < group {
            power *= of;
        }
        power == group
    };
    group <= 1 || is_power(3) || is_power(5) || is_power(7)
}

/// Where the next block is allocated: always forward, skipping the heads of groups.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    next: u64,
    /// Blocks of a superblock and the maximum number of descriptors.
    head: u64,
}

impl Cursor {
    pub(super) fn new(head: u64) -> Self {
        Self { next: head, head }
    }

    /// The first free block.
    pub(super) fn next(self) -> u64 {
        self.next
    }

    /// Allocates at most `want` consecutive blocks: returns the first and the number.
    pub(super) fn run(&mut self, want: u64) -> (u64, u64) {
        self.pass_head();
        let length = want.min(self.end(want) - self.next);
        let start = self.next;
        self.next += length;
        (start, length)
    }

    /// Allocates `want` consecutive blocks.
    pub(super) fn piece(&mut self, want: u64) -> u64 {
        loop {
            self.pass_head();
            let end = self.end(want);
            if end - self.next >= want {
                let start = self.next;
                self.next += want;
                return start;
            }
            self.next = end;
        }
    }

    fn pass_head(&mut self) {
        let group = self.next / GROUP;
        if has_head(group) {
            self.next = self.next.max(group * GROUP + self.head);
        }
    }

    /// The end of the consecutive free blocks, looking no further than `want` blocks.
    fn end(self, want: u64) -> u64 {
        let mut group = self.next / GROUP + 1;
        while !has_head(group) && group * GROUP - self.next < want {
            group += 1;
        }
        group * GROUP
    }
}

/// The file. Consecutive blocks are written together.
pub(super) struct Output {
    file: fs::File,
    path: PathBuf,
    progress: Progress,
    /// Bytes that must stay free on the disk.
    keep_free: u64,
    /// Bytes written since the free space was last checked.
    unseen: u64,
    buffer: Vec<u8>,
    /// The position of the buffer's first block.
    at: u64,
}

impl Output {
    /// A new empty file, or an existing one that is all zeros.
    pub(super) fn new(file: fs::File, keep_free: u64, progress: &Progress) -> Self {
        let (path, progress) = (file.path().to_owned(), progress.clone());
        let buffer = Vec::with_capacity(BUFFER + BUFFER / 4);
        Self { file, path, progress, keep_free, unseen: 0, buffer, at: 0 }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if it was cancelled.
    pub(super) fn check(&self) -> Result<(), Ext4Error> {
        Ok(self.progress.check()?)
    }

    /// The same, and occasionally checks the free disk space.
    fn wrote(&mut self, bytes: u64) -> Result<(), Ext4Error> {
        self.check()?;
        self.unseen += bytes;
        if self.unseen < LOOK {
            return Ok(());
        }
        self.unseen = 0;
        let directory = self.path.parent().unwrap_or(&self.path);
        let free = free_bytes(directory).map_err(|e| self.failed(e))?;
        if free < self.keep_free { Err(Ext4Error::full(directory, self.keep_free)) } else { Ok(()) }
    }

    /// Writes at a block; the last block is padded with zeros.
    pub(super) fn put(&mut self, block: u64, bytes: &[u8]) -> Result<(), Ext4Error> {
        let follows = block == self.at + (self.buffer.len() / BLOCK) as u64;
        if !follows || self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        if self.buffer.is_empty() {
            self.at = block;
        }
        self.buffer.extend_from_slice(bytes);
        self.buffer.resize(self.buffer.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    /// Writes what is still buffered.
    pub(super) fn flush(&mut self) -> Result<(), Ext4Error> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let written = self.file.file().write_all_at(&self.buffer, self.at * BLOCK as u64);
        written.map_err(|e| self.failed(e))?;
        let bytes = self.buffer.len() as u64;
        self.buffer.clear();
        self.wrote(bytes)
    }

    /// Turns blocks into holes, whatever was written to them.
    pub(super) fn clear(&mut self, start: u64, blocks: u64) -> Result<(), Ext4Error> {
        self.flush()?;
        let (offset, length) = (start * BLOCK as u64, blocks * BLOCK as u64);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(self.file.file(), hole, offset, length) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => break,
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        for block in start..start + blocks {
            self.put(block, &ZEROS)?;
        }
        self.flush()
    }

    /// Ends the file.
    pub(super) fn finish(mut self, blocks: u64) -> Result<(), Ext4Error> {
        self.flush()?;
        let length = blocks * BLOCK as u64;
        let now = self.file.metadata().map_err(|e| self.failed(e))?.len();
        // A disk keeps its length.
        if now < length {
            self.file.set_len(length).map_err(|e| self.failed(e))?;
        }
        Ok(())
    }

    /// Another handle of the file, after flushing the buffer.
    pub(super) fn handle(&mut self) -> Result<fs::File, Ext4Error> {
        self.flush()?;
        self.file.try_clone().map_err(|e| self.failed(e))
    }

    fn failed(&self, source: std::io::Error) -> Ext4Error {
        Ext4Error::io(&self.path, source)
    }
}
