//! How working on an ext4 filesystem fails.

use std::io;
use std::path::{Path, PathBuf};

use nexus_schema::{ByteSize, ErrorCode};

use crate::os::disk::{free_bytes, is_full};
use crate::os::tool::ProgramError;
use crate::progress::Cancelled;

/// Why a filesystem was not made, read, grown or named.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// It was no longer wanted.
    #[error("the work on the filesystem was cancelled")]
    Cancelled,
    /// There is not enough room on the disk.
    #[error("not enough room in {directory}: {needed} needed, {free} free", directory = .directory.display())]
    DiskFull {
        /// Where.
        directory: PathBuf,
        /// What is needed at least.
        needed: ByteSize,
        /// What there was.
        free: ByteSize,
    },
    /// The filesystem's file could not be read or written.
    #[error("{path}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no ext4 filesystem in the file.
    #[error("there is no ext4 filesystem on {disk}", disk = .disk.display())]
    NoFilesystem {
        /// The file.
        disk: PathBuf,
    },
    /// The filesystem could not be filled.
    #[error("fill the filesystem: {said}")]
    Fill {
        /// What the tool said.
        said: String,
    },
    /// The filesystem has an error.
    #[error("the filesystem is damaged: {said}")]
    Check {
        /// What the check said.
        said: String,
    },
    /// A program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
}

impl From<Cancelled> for Ext4Error {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl Ext4Error {
    /// An error of reading or writing `path`; a full disk is told apart.
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        if is_full(&source) {
            return Self::full(path.parent().unwrap_or(path), 0);
        }
        Self::Io { path: path.to_owned(), source }
    }

    /// The disk of `directory` is full.
    pub(crate) fn full(directory: &Path, needed: u64) -> Self {
        let free = free_bytes(directory).unwrap_or(0);
        Self::DiskFull {
            directory: directory.to_owned(),
            needed: ByteSize::bytes(needed.max(free + 1)),
            free: ByteSize::bytes(free),
        }
    }

    /// The code of the failure for callers.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Cancelled | Self::Program(ProgramError::Cancelled { .. }) => ErrorCode::Cancelled,
            Self::DiskFull { .. } => ErrorCode::DiskFull,
            Self::NoFilesystem { .. } => ErrorCode::InvalidArgument,
            Self::Program(ProgramError::Missing { .. }) => ErrorCode::HostUnsuitable,
            Self::Fill { .. } | Self::Check { .. } => ErrorCode::ImageFailed,
            Self::Io { .. } | Self::Program(_) => ErrorCode::Internal,
        }
    }

    /// The next thing to do, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DiskFull { directory, .. } => Some(format!("free some space in {}", directory.display())),
            Self::NoFilesystem { .. } => {
                Some("attach it as a root drive, or make a new one with drive_create".into())
            }
            Self::Program(error) => error.hint(),
            _ => None,
        }
    }
}
