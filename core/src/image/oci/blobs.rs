//! Finds the blobs of an image on this host: in a directory with an OCI layout, or in an archive that was read.

use std::io::{self, Read, Seek};
use std::path::PathBuf;

use fs_err::os::unix::fs::OpenOptionsExt;
use nexus_schema::ByteSize;

use super::digest::Digest;
use super::document::{Blob, DOCUMENT_MAX};
use super::{ImageError, OciError};
use crate::image::contents::Contents;
use crate::image::tree::{Body, Tree};
use crate::progress::Progress;

/// Content that can be read more than once.
pub(crate) trait Content: Read + Seek {}

impl<T: Read + Seek> Content for T {}

/// Files by name.
#[expect(clippy::large_enum_variant, reason = "one exists at a time")]
pub(crate) enum Blobs {
    /// In a directory.
    Directory(PathBuf),
    /// In an archive that was read; its links cannot point outside it.
    Archive { tree: Tree, contents: Contents },
}

impl Blobs {
    /// Opens a file, if it exists.
    pub(crate) fn open(&mut self, name: &str) -> Result<Option<Box<dyn Content>>, ImageError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(name);
                // Does not block forever if it is a FIFO.
                let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
                let flags = flags.bits().cast_signed();
                let opened = fs_err::OpenOptions::new().read(true).custom_flags(flags).open(&path);
                let file = match opened {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    opened => opened.map_err(|e| ImageError::source(&path, e))?,
                };
                let meta = file.metadata().map_err(|e| ImageError::source(&path, e))?;
                Ok(meta.is_file().then(|| Box::new(file) as Box<dyn Content>))
            }
            Self::Archive { tree, contents } => {
                let Some(node) = tree.find(name.as_bytes()) else { return Ok(None) };
                let Body::File(content) = &tree.node(node).body else { return Ok(None) };
                Ok(Some(Box::new(contents.reader(*content)?)))
            }
        }
    }

    /// Reads a document by its name, up to the maximum size.
    pub(crate) fn document(&mut self, name: &str) -> Result<Vec<u8>, ImageError> {
        let content = self.open(name)?.ok_or_else(|| missing(name))?;
        let mut bytes = Vec::new();
        content.take(DOCUMENT_MAX + 1).read_to_end(&mut bytes).map_err(|e| self.unreadable(name, e))?;
        if bytes.len() as u64 > DOCUMENT_MAX {
            let limit = ByteSize::bytes(DOCUMENT_MAX);
            return Err(OciError::TooLarge { what: name.to_owned(), limit }.into());
        }
        Ok(bytes)
    }

    /// Reads a document by its digest, and verifies it.
    pub(crate) fn verified_document(&mut self, blob: &Blob) -> Result<Vec<u8>, ImageError> {
        let name = name_of(&blob.digest);
        let bytes = self.document(&name)?;
        check_size(&name, blob, bytes.len() as u64)?;
        let mut hasher = blob.digest.hasher();
        hasher.update(&bytes);
        blob.digest.expect(&name, hasher)?;
        Ok(bytes)
    }

    /// Opens a blob by its digest, after it was read completely and verified.
    pub(crate) fn verified(
        &mut self,
        blob: &Blob,
        progress: &Progress,
    ) -> Result<Box<dyn Content>, ImageError> {
        let name = name_of(&blob.digest);
        let mut content = self.open(&name)?.ok_or_else(|| missing(&name))?;
        let mut hasher = blob.digest.hasher();
        let mut buffer = vec![0; 1 << 20];
        let mut found = 0;
        loop {
            progress.check()?;
            let read = content.read(&mut buffer).map_err(|e| self.unreadable(&name, e))?;
            if read == 0 {
                break;
            }
            found += read as u64;
            if found > blob.size {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        check_size(&name, blob, found)?;
        blob.digest.expect(&name, hasher)?;
        content.rewind().map_err(|e| self.unreadable(&name, e))?;
        Ok(content)
    }

    fn unreadable(&self, name: &str, error: io::Error) -> ImageError {
        let path = match self {
            Self::Directory(directory) => directory.join(name),
            Self::Archive { .. } => PathBuf::from(name),
        };
        ImageError::source(&path, error)
    }
}

/// The name of a blob in a layout.
pub(crate) fn name_of(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

pub(crate) fn check_size(what: &str, blob: &Blob, found: u64) -> Result<(), OciError> {
    if found == blob.size {
        return Ok(());
    }
    let found = found.min(blob.size.saturating_add(1));
    Err(OciError::Size { what: what.to_owned(), expected: blob.size, found })
}

pub(crate) fn missing(name: &str) -> OciError {
    OciError::Missing { what: super::digest::shown(name) }
}
