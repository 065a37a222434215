//! The blocks of the file, with those of the journal in their place.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use super::ReadError;
use super::superblock::{Geometry, as_u64};

/// What is read at a time of tables and directories; no block is larger.
const CHUNK: usize = 64 << 10;
/// How many chunks are kept.
const CHUNKS_MAX: usize = 256;

/// Where the journal has the newest content of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Newer {
    /// The block of the journal that holds it.
    pub(super) at: u64,
    /// Its first four bytes are the journal's magic number, which is kept as zeros there.
    pub(super) is_escaped: bool,
}

pub(super) struct Disk {
    file: File,
    block_size: usize,
    blocks: u64,
    newer: HashMap<u64, Newer>,
    chunks: Mutex<HashMap<u64, Arc<[u8]>>>,
}

impl Disk {
    pub(super) fn new(file: File, geometry: &Geometry) -> Self {
        Self {
            file,
            block_size: geometry.block_size,
            blocks: geometry.blocks,
            newer: HashMap::new(),
            chunks: Mutex::default(),
        }
    }

    /// Puts the blocks of a journal in place.
    pub(super) fn replay(&mut self, newer: HashMap<u64, Newer>) {
        self.newer = newer;
        self.chunks.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    #[cfg(test)]
    pub(super) fn newer_blocks(&self) -> usize {
        self.newer.len()
    }

    /// The number of blocks, which a superblock in the journal may have changed.
    pub(super) fn set_blocks(&mut self, blocks: u64) {
        self.blocks = blocks;
    }

    /// The file's bytes as they are, without the journal.
    pub(super) fn raw(file: &File, at: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        file.read_exact_at(buffer, at).map_err(|source| ReadError::Io { at, source })
    }

    /// Whether a run of blocks is within the filesystem.
    pub(super) fn has(&self, first: u64, count: u64) -> bool {
        first.checked_add(count).is_some_and(|end| end <= self.blocks)
    }

    /// Bytes from `at`, which are not kept: for the contents of files.
    pub(super) fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        Self::raw(&self.file, at, buffer)?;
        self.put_newer(at, buffer)
    }

    /// A part of a table or directory that is within one block.
    pub(super) fn table(&self, at: u64, length: usize) -> Result<Vec<u8>, ReadError> {
        let size = as_u64(self.block_size);
        if length > self.block_size || !self.has(at / size, 1) {
            return Err(ReadError::block("the place", at / size));
        }
        let (number, within) = (at / as_u64(CHUNK), at % as_u64(CHUNK));
        let chunk = self.chunk(number)?;
        let within = usize::try_from(within).unwrap_or(CHUNK);
        let part = chunk
            .get(within..within + length)
            .ok_or_else(|| ReadError::Io { at, source: std::io::ErrorKind::UnexpectedEof.into() })?;
        Ok(part.to_vec())
    }

    /// A whole block of a table or directory.
    pub(super) fn block(&self, number: u64) -> Result<Vec<u8>, ReadError> {
        if !self.has(number, 1) {
            return Err(ReadError::block("the place", number));
        }
        self.table(number * as_u64(self.block_size), self.block_size)
    }

    fn chunk(&self, number: u64) -> Result<Arc<[u8]>, ReadError> {
        let lock = || self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = lock().get(&number) {
            return Ok(Arc::clone(chunk));
        }
        let at = number * as_u64(CHUNK);
        let mut bytes = vec![0; CHUNK];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, at + as_u64(filled)) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ReadError::Io { at, source }),
            }
        }
        bytes.truncate(filled - filled % self.block_size);
        self.put_newer(at, &mut bytes)?;
        let chunk: Arc<[u8]> = bytes.into();
        let mut chunks = lock();
        if chunks.len() >= CHUNKS_MAX {
            chunks.clear();
        }
        chunks.insert(number, Arc::clone(&chunk));
        Ok(chunk)
    }

    fn put_newer(&self, at: u64, mut buffer: &mut [u8]) -> Result<(), ReadError> {
        if self.newer.is_empty() {
            return Ok(());
        }
        let size = as_u64(self.block_size);
        let (mut number, mut skipped) = (at / size, at % size);
        while !buffer.is_empty() {
            let within = usize::try_from(skipped).unwrap_or(0);
            let (part, rest) = buffer.split_at_mut(buffer.len().min(self.block_size - within));
            if let Some(newer) = self.newer.get(&number) {
                Self::raw(&self.file, newer.at * size + skipped, part)?;
                if newer.is_escaped {
                    let magic = super::journal::MAGIC.to_be_bytes();
                    part.iter_mut()
                        .zip(magic.into_iter().skip(within))
                        .for_each(|(byte, magic)| *byte = magic);
                }
            }
            buffer = rest;
            (number, skipped) = (number + 1, 0);
        }
        Ok(())
    }
}
