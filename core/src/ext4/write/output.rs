//! The filesystem's file, and which of its blocks are still free.

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
/// After how many bytes the room on the disk is looked at again.
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

/// Where the next block is taken from: on and on, past the heads of groups.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    next: u64,
    /// Blocks of a superblock and all descriptors that there can be.
    head: u64,
}

impl Cursor {
    pub(super) fn new(head: u64) -> Self {
        Self { next: head, head }
    }

    /// The first block that was not taken yet.
    pub(super) fn next(self) -> u64 {
        self.next
    }

    /// Takes at most `want` blocks in one piece: the first of them, and how many.
    pub(super) fn run(&mut self, want: u64) -> (u64, u64) {
        self.pass_head();
        let length = want.min(self.end(want) - self.next);
        let start = self.next;
        self.next += length;
        (start, length)
    }

    /// Takes `want` blocks in one piece.
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

    /// Where the blocks end that can be taken in one piece, as far as `want` of them matter.
    fn end(self, want: u64) -> u64 {
        let mut group = self.next / GROUP + 1;
        while !has_head(group) && group * GROUP - self.next < want {
            group += 1;
        }
        group * GROUP
    }
}

/// The file. Blocks that follow each other are written together.
pub(super) struct Output {
    file: fs::File,
    path: PathBuf,
    progress: Progress,
    /// Bytes of the disk that stay free for everybody else.
    keep_free: u64,
    /// Bytes written since the room was looked at.
    unseen: u64,
    buffer: Vec<u8>,
    /// Where the buffer's first block belongs.
    at: u64,
}

impl Output {
    /// A new file, empty; or one that is there already and all zeros.
    pub(super) fn new(file: fs::File, keep_free: u64, progress: &Progress) -> Self {
        let (path, progress) = (file.path().to_owned(), progress.clone());
        let buffer = Vec::with_capacity(BUFFER + BUFFER / 4);
        Self { file, path, progress, keep_free, unseen: 0, buffer, at: 0 }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if the work was cancelled.
    pub(super) fn check(&self) -> Result<(), Ext4Error> {
        Ok(self.progress.check()?)
    }

    /// The same, and now and then whether enough of the disk stays free.
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

    /// Writes from a block on; the last block is filled up with zeros.
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

    /// Writes what is still in memory.
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

    /// Makes sure that blocks hold zeros and take no room: what was written to them is gone.
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
        // A disk stays as long as it was made.
        if now < length {
            self.file.set_len(length).map_err(|e| self.failed(e))?;
        }
        Ok(())
    }

    /// Another handle of the file, with all that was put so far in it.
    pub(super) fn handle(&mut self) -> Result<fs::File, Ext4Error> {
        self.flush()?;
        self.file.try_clone().map_err(|e| self.failed(e))
    }

    fn failed(&self, source: std::io::Error) -> Ext4Error {
        Ext4Error::io(&self.path, source)
    }
}
