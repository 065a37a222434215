//! Writes and reads the contents of files.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use fs_err as fs;
use sha2::Digest;

use super::super::Ext4Error;
use super::extents::Extent;
use super::node::Content;
use super::raw::ZEROS;
use super::{BLOCK, Writer};

/// How much is read at once.
pub(super) const CHUNK: usize = 256 << 10;
/// The longest file; each of its blocks needs a number.
const SIZE_MAX: u64 = (u32::MAX as u64) * BLOCK as u64;

impl Writer {
    /// Reads exactly `size` bytes from `source` as the content of a file; blocks of zeros become holes.
    ///
    /// A content that no node uses in the end is cleared from the filesystem.
    pub(crate) fn take(&mut self, mut source: impl Read, size: u64) -> Result<Content, Ext4Error> {
        if size > SIZE_MAX {
            return Err(Ext4Error::TooLarge { what: "a file of this size" });
        }
        let first = self.extents.len();
        let mut buffer = std::mem::take(&mut self.chunk);
        let (mut left, mut checksum) = (size, 0);
        let mut logical = 0;
        let taken = loop {
            if left == 0 {
                break Ok(());
            }
            let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut buffer[..want];
            match fill(&mut source, chunk) {
                Ok(filled) if filled < want => break Err(Ext4Error::Short),
                Ok(_) => {}
                Err(error) => break Err(Ext4Error::Source(error)),
            }
            checksum = crc32c::crc32c_append(checksum, chunk);
            let taken = self.take_chunk(first, logical, chunk).and_then(|()| self.output.check());
            if let Err(error) = taken {
                break Err(error);
            }
            left -= want as u64;
            logical += want.div_ceil(BLOCK) as u32;
        };
        self.chunk = buffer;
        taken?;
        self.digest.update(size.to_le_bytes());
        self.digest.update(checksum.to_le_bytes());
        let place = |number: usize| {
            u32::try_from(number).map_err(|_| Ext4Error::TooLarge { what: "contents in as many pieces" })
        };
        Ok(Content { size, first: place(first)?, count: place(self.extents.len() - first)? })
    }

    /// Writes the part of a file that begins at a block, except blocks of zeros.
    fn take_chunk(&mut self, first: usize, logical: u32, chunk: &[u8]) -> Result<(), Ext4Error> {
        let is_zero = |at: usize| {
            let block = &chunk[at..(at + BLOCK).min(chunk.len())];
            block == &ZEROS[..block.len()]
        };
        let mut start = 0;
        while start < chunk.len() {
            let zero = is_zero(start);
            let mut end = start + BLOCK;
            while end < chunk.len() && is_zero(end) == zero {
                end += BLOCK;
            }
            let end = end.min(chunk.len());
            if !zero {
                self.append(first, logical + (start / BLOCK) as u32, &chunk[start..end])?;
            }
            start = end;
        }
        Ok(())
    }

    /// Appends blocks to a file whose runs begin at `first`.
    pub(super) fn append(
        &mut self,
        first: usize,
        mut logical: u32,
        mut bytes: &[u8],
    ) -> Result<(), Ext4Error> {
        while !bytes.is_empty() {
            let (start, length) = self.allocate(first, logical, bytes.len().div_ceil(BLOCK) as u64)?;
            let now = bytes.len().min(length as usize * BLOCK);
            self.output.put(start, &bytes[..now])?;
            logical += length as u32;
            bytes = &bytes[now..];
        }
        Ok(())
    }

    /// Allocates at most `want` blocks for a position in a file whose runs begin at `first`.
    pub(super) fn allocate(
        &mut self,
        first: usize,
        logical: u32,
        want: u64,
    ) -> Result<(u64, u64), Ext4Error> {
        let (start, length) = self.cursor.run(want);
        let too_large = |_| Ext4Error::TooLarge { what: "more than 16 TiB of contents" };
        let next = Extent { logical, length: length as u32, start: u32::try_from(start).map_err(too_large)? };
        u32::try_from(start + length).map_err(too_large)?;
        Extent::append(&mut self.extents, first, next);
        Ok((start, length))
    }

    /// Reads a stored content again.
    pub(crate) fn reader(&mut self, content: Content) -> Result<ContentReader, Ext4Error> {
        let file = self.output.handle()?;
        Ok(ContentReader { file, extents: self.runs(content).to_vec(), size: content.size, at: 0 })
    }

    /// The runs of a content.
    pub(super) fn runs(&self, content: Content) -> &[Extent] {
        &self.extents[content.first as usize..][..content.count as usize]
    }
}

/// Reads a content back, which stays possible while more is written.
pub(crate) struct ContentReader {
    file: fs::File,
    extents: Vec<Extent>,
    size: u64,
    at: u64,
}

impl Read for ContentReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(self.at).min(buffer.len() as u64);
        if left == 0 {
            return Ok(0);
        }
        let block = (self.at / BLOCK as u64) as u32;
        let next = self.extents.partition_point(|extent| extent.logical + extent.length <= block);
        let bytes = |blocks: u32| u64::from(blocks) * BLOCK as u64;
        match self.extents.get(next) {
            Some(extent) if extent.logical <= block => {
                let within = self.at - bytes(extent.logical);
                let want = left.min(bytes(extent.length) - within) as usize;
                let read = self.file.file().read_at(&mut buffer[..want], bytes(extent.start) + within)?;
                self.at += read as u64;
                Ok(read)
            }
            hole => {
                let end = hole.map_or(self.size, |extent| bytes(extent.logical));
                let zeros = left.min(end - self.at);
                buffer[..zeros as usize].fill(0);
                self.at += zeros;
                Ok(zeros as usize)
            }
        }
    }
}

impl Seek for ContentReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Reads until `buffer` is full or the source ends.
pub(crate) fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
