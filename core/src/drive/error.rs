//! The errors of drives.

use std::io;
use std::path::{Path, PathBuf};

use nexus_schema::{ByteSize, ErrorCode};

use crate::ext4::Ext4Error;
use crate::os::disk::{free_bytes, is_full};
use crate::progress::Cancelled;

/// Why a drive was not made, grown or removed.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It was cancelled.
    #[error("the drive was cancelled")]
    Cancelled,
    /// There is not enough space on the disk.
    #[error("not enough space in {directory}: {needed} needed, {free} free", directory = .directory.display())]
    DiskFull {
        /// Where.
        directory: PathBuf,
        /// What is needed at least.
        needed: ByteSize,
        /// How much was free.
        free: ByteSize,
    },
    /// The name is already taken.
    #[error("{path} exists already", path = .path.display())]
    Exists {
        /// The drive's directory.
        path: PathBuf,
    },
    /// A drive cannot be smaller than its content.
    #[error("a drive of {size} is smaller than its content, {minimum}")]
    TooSmall {
        /// The requested size.
        size: ByteSize,
        /// The smallest possible size.
        minimum: ByteSize,
    },
    /// A file or directory could not be read or written.
    #[error("{path}", path = .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The filesystem on the drive could not be made, grown or labelled.
    #[error(transparent)]
    Filesystem(Ext4Error),
    /// The copy was reported before it was synced, and then the host crashed or the sync failed.
    #[error("{drive} is incomplete: the host crashed, or the disk failed, before the copy was synced", drive = .drive.display())]
    Lost {
        /// The drive's directory.
        drive: PathBuf,
    },
    /// The worker ended early.
    #[error("the worker that makes drives ended early")]
    Worker,
}

impl From<Cancelled> for DriveError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<Ext4Error> for DriveError {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::Cancelled => Self::Cancelled,
            Ext4Error::DiskFull { directory, needed, free } => Self::DiskFull { directory, needed, free },
            other => Self::Filesystem(other),
        }
    }
}

impl DriveError {
    /// An error while reading or writing `path`; a full disk becomes [`DriveError::DiskFull`].
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

    /// The error code for callers.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Cancelled => ErrorCode::Cancelled,
            Self::DiskFull { .. } => ErrorCode::DiskFull,
            Self::TooSmall { .. } => ErrorCode::InvalidArgument,
            Self::Filesystem(error) => error.code(),
            Self::Lost { .. } => ErrorCode::DriveNotFound,
            Self::Exists { .. } | Self::Io { .. } | Self::Worker => ErrorCode::Internal,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DiskFull { directory, .. } => Some(format!("free some space in {}", directory.display())),
            Self::TooSmall { minimum, .. } => Some(format!("ask for at least {minimum}")),
            Self::Filesystem(error) => error.hint(),
            Self::Lost { .. } => Some(
                "nothing ever ran on it: delete it, or the VM that it belongs to, and make it again".into(),
            ),
            _ => None,
        }
    }
}
