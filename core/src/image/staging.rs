//! The staging directory: contents of files under numbers, nothing else.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt;
use fs_err::{File, OpenOptions};

use super::tree::Content;
use super::{ImageError, Limits};
use crate::progress::Progress;

/// The unit in which holes are made.
pub(crate) const BLOCK: usize = 4096;
/// How much is read at once.
const CHUNK: usize = 256 << 10;
/// After how many bytes the room on the disk is looked at again.
const LOOK: u64 = 16 << 20;

/// Contents of files, each under a number.
pub(crate) struct Staging {
    directory: PathBuf,
    limits: Limits,
    next: u64,
    bytes: u64,
    unseen: u64,
    file_mode: Option<u32>,
    buffer: Vec<u8>,
}

/// How reading a content ends early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The source cannot be read.
    Read(io::Error),
    /// The source has less than it promised.
    Short,
    /// Something else.
    Other(ImageError),
}

impl From<ImageError> for Stop {
    fn from(error: ImageError) -> Self {
        Self::Other(error)
    }
}

impl Staging {
    /// In an empty directory of its own.
    pub(crate) fn new(directory: &Path, limits: Limits) -> Self {
        Self {
            directory: directory.to_owned(),
            limits,
            next: 0,
            bytes: 0,
            unseen: 0,
            file_mode: None,
            buffer: vec![0; CHUNK],
        }
    }

    /// Where the contents are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The permission bits that staged files got.
    pub(crate) fn file_mode(&self) -> Option<u32> {
        self.file_mode
    }

    /// Where a content is.
    pub(crate) fn path(&self, number: u64) -> PathBuf {
        self.directory.join(number.to_string())
    }

    /// Bytes of content taken so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Keeps a short content that is at hand.
    pub(crate) fn keep(&mut self, content: &[u8], progress: &Progress) -> Result<Content, ImageError> {
        match self.take(content, content.len() as u64, progress) {
            Ok(content) => Ok(content),
            Err(Stop::Other(error)) => Err(error),
            Err(Stop::Read(_) | Stop::Short) => Ok(Content::default()),
        }
    }

    /// Takes exactly `size` bytes from `source`; blocks of zeros become holes.
    pub(crate) fn take(
        &mut self,
        mut source: impl Read,
        size: u64,
        progress: &Progress,
    ) -> Result<Content, Stop> {
        if size == 0 {
            return Ok(Content::default());
        }
        let mut sink = self.open(size)?;
        let mut left = size;
        while left > 0 {
            progress.check().map_err(ImageError::from)?;
            let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let mut buffer = std::mem::take(&mut self.buffer);
            let filled = fill(&mut source, &mut buffer[..want]);
            let taken = match filled {
                Ok(taken) if taken == want => sink.write(&buffer[..want]).map_err(Stop::from),
                Ok(_) => Err(Stop::Short),
                Err(error) => Err(Stop::Read(error)),
            };
            self.buffer = buffer;
            taken?;
            left -= want as u64;
            self.look(want as u64)?;
        }
        Ok(sink.finish()?)
    }

    /// Opens the next content, `size` bytes long.
    pub(crate) fn open(&mut self, size: u64) -> Result<Sink, ImageError> {
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limits.bytes {
            return Err(ImageError::TooLarge { limit: self.limits.bytes, what: "bytes of content" });
        }
        let number = self.next;
        self.next += 1;
        let path = self.path(number);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)
            .map_err(|e| ImageError::write(&path, e))?;
        if self.file_mode.is_none() {
            let metadata = file.metadata().map_err(|e| ImageError::write(&path, e))?;
            self.file_mode = Some(metadata.mode() & 0o7777);
        }
        Ok(Sink { path, file, number, size, at: 0, blocks: 0, runs: 0, in_run: false })
    }

    /// Fails when less than `bytes` more fit, with what is to stay free.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<(), ImageError> {
        check_room(&self.directory, bytes.saturating_add(self.limits.keep_free))
    }

    /// Looks now and then whether enough of the disk stays free.
    fn look(&mut self, written: u64) -> Result<(), ImageError> {
        self.unseen += written;
        if self.unseen < LOOK {
            return Ok(());
        }
        self.unseen = 0;
        check_room(&self.directory, self.limits.keep_free)
    }
}

/// Fails when less than `needed` bytes are free where `directory` is.
pub(crate) fn check_room(directory: &Path, needed: u64) -> Result<(), ImageError> {
    let free = crate::os::disk::free_bytes(directory).map_err(|e| ImageError::write(directory, e))?;
    if free < needed { Err(ImageError::full(directory, needed)) } else { Ok(()) }
}

/// A content that is being written.
pub(crate) struct Sink {
    path: PathBuf,
    file: File,
    number: u64,
    size: u64,
    at: u64,
    blocks: u64,
    runs: u64,
    in_run: bool,
}

impl Sink {
    /// Writes the next bytes; all pieces but the last are whole blocks.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let mut start = 0;
        while start < bytes.len() {
            let zero = is_zero_block(bytes, start);
            let mut end = start;
            while end < bytes.len() && is_zero_block(bytes, end) == zero {
                end = (end + BLOCK).min(bytes.len());
            }
            if zero {
                self.skip((end - start) as u64)?;
            } else {
                self.write_run(&bytes[start..end])?;
            }
            start = end;
        }
        Ok(())
    }

    /// Leaves a hole.
    pub(crate) fn skip(&mut self, bytes: u64) -> Result<(), ImageError> {
        self.at += bytes;
        self.in_run = false;
        self.file.seek(SeekFrom::Start(self.at)).map_err(|e| ImageError::write(&self.path, e))?;
        Ok(())
    }

    fn write_run(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.file.write_all(bytes).map_err(|e| ImageError::write(&self.path, e))?;
        self.at += bytes.len() as u64;
        self.blocks += (bytes.len() as u64).div_ceil(BLOCK as u64);
        if !self.in_run {
            self.runs += 1;
            self.in_run = true;
        }
        Ok(())
    }

    /// Ends the content; what was not written up to its size is a hole.
    pub(crate) fn finish(self) -> Result<Content, ImageError> {
        if !self.in_run {
            self.file.set_len(self.size).map_err(|e| ImageError::write(&self.path, e))?;
        }
        Ok(Content { staged: Some(self.number), size: self.size, blocks: self.blocks, runs: self.runs })
    }
}

fn is_zero_block(bytes: &[u8], at: usize) -> bool {
    bytes[at..(at + BLOCK).min(bytes.len())].iter().all(|b| *b == 0)
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
