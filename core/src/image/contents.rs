//! Writes the contents of files from a source into the image.

use std::io::{self, Read};
use std::path::Path;

use nexus_schema::ByteSize;

use super::{ImageError, Limits};
use crate::ext4::{Content, ContentReader, Ext4Error, Made, Options, Size, Writer};
use crate::progress::Progress;

use super::tree::Tree;

/// The image's file while it is written; contents are written before the names are known.
pub(crate) struct Contents {
    writer: Writer,
    size: Size,
    limits: Limits,
    progress: Progress,
    bytes: u64,
}

/// Why reading a content stopped early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The source cannot be read.
    Read(io::Error),
    /// The source ended before its promised length.
    Short,
    /// Something else.
    Other(ImageError),
}

impl Contents {
    /// Starts a new file, which becomes a filesystem of at least `size`.
    pub(crate) fn create(
        file: &Path,
        size: Option<ByteSize>,
        limits: Limits,
        progress: &Progress,
    ) -> Result<Self, ImageError> {
        Self::within(file, Size::AtLeast(size.map_or(0, ByteSize::as_bytes)), limits, progress)
    }

    fn within(file: &Path, size: Size, limits: Limits, progress: &Progress) -> Result<Self, ImageError> {
        let writer = Writer::create(file, size, limits.keep_free, progress)?;
        Ok(Self { writer, size, limits, progress: progress.clone(), bytes: 0 })
    }

    /// Starts another new file beside this one.
    pub(crate) fn beside(&self, name: &str) -> Result<Self, ImageError> {
        let file = self.path().with_file_name(name);
        Self::within(&file, self.size, self.limits.clone(), &self.progress)
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.writer.path()
    }

    /// Bytes of content written so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Stores a short content from memory.
    pub(crate) fn keep(&mut self, content: &[u8]) -> Result<Content, ImageError> {
        match self.take(content, content.len() as u64) {
            Ok(content) => Ok(content),
            Err(Stop::Other(error)) => Err(error),
            Err(Stop::Read(_) | Stop::Short) => Ok(Content::default()),
        }
    }

    /// Reads exactly `size` bytes from `source`; blocks of zeros become holes.
    pub(crate) fn take(&mut self, source: impl Read, size: u64) -> Result<Content, Stop> {
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limits.bytes {
            let limit = self.limits.bytes;
            return Err(Stop::Other(ImageError::TooLarge { limit, what: "bytes of content" }));
        }
        self.writer.take(source, size).map_err(|error| match error {
            Ext4Error::Source(error) => Stop::Read(error),
            Ext4Error::Short => Stop::Short,
            other => Stop::Other(other.into()),
        })
    }

    /// Reads a stored content again.
    pub(crate) fn reader(&mut self, content: Content) -> Result<ContentReader, ImageError> {
        Ok(self.writer.reader(content)?)
    }

    /// Completes the file: a filesystem of the files in the tree.
    pub(crate) fn finish(self, tree: &Tree, options: &Options<'_>) -> Result<Made, ImageError> {
        Ok(self.writer.finish(tree.nodes(), options)?)
    }
}
