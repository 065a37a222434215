//! The errors of ext4 filesystems.

use std::io;
use std::path::{Path, PathBuf};

use nexus_schema::{ByteSize, ErrorCode};

use crate::os::disk::{free_bytes, is_full};
use crate::os::tool::ProgramError;
use crate::progress::Cancelled;

/// Why a filesystem was not made, read, grown or labelled.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// It was cancelled.
    #[error("the work on the filesystem was cancelled")]
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
    /// The filesystem has features that prevent guests from mounting it for writing or growing it.
    #[error("the ext4 filesystem has {what}, which guests cannot mount for writing and grow")]
    Features {
        /// Their names.
        what: String,
    },
    /// The filesystem could not be filled.
    #[error("fill the filesystem: {said}")]
    Fill {
        /// The output of the tool.
        said: String,
    },
    /// The filesystem has an error.
    #[error("the filesystem is damaged: {said}")]
    Check {
        /// The output of the check.
        said: String,
    },
    /// The source of a file's content could not be read.
    #[error("read the content of a file")]
    Source(#[source] io::Error),
    /// The source of a file's content ended before its promised size.
    #[error("the content of a file ended early")]
    Short,
    /// The content does not fit into the required size of the filesystem.
    #[error("a filesystem of {size} is too small: its content needs {needed}")]
    TooSmall {
        /// The required size.
        size: ByteSize,
        /// A sufficient size, as far as known.
        needed: ByteSize,
    },
    /// The content exceeds a limit of ext4 or of this writer.
    #[error("an ext4 filesystem cannot hold {what}")]
    TooLarge {
        /// What exceeds the limit.
        what: &'static str,
    },
    /// Something other than a directory is at `lost+found`.
    #[error("`/lost+found` is not a directory, and every ext4 filesystem needs that directory")]
    LostAndFound,
    /// The label is longer than the superblock's field.
    #[error("the label {label:?} is longer than 16 bytes")]
    Label {
        /// The label.
        label: String,
    },
    /// The worker ended early.
    #[error("the worker that writes the filesystem ended early")]
    Worker,
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
    /// An error while reading or writing `path`; a full disk becomes [`Ext4Error::DiskFull`].
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
            Self::Cancelled | Self::Program(ProgramError::Cancelled { .. }) => ErrorCode::Cancelled,
            Self::DiskFull { .. } => ErrorCode::DiskFull,
            Self::NoFilesystem { .. }
            | Self::Features { .. }
            | Self::TooSmall { .. }
            | Self::Label { .. } => ErrorCode::InvalidArgument,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Program(ProgramError::Missing { .. }) => ErrorCode::HostUnsuitable,
            Self::Fill { .. } | Self::Check { .. } | Self::Source(_) | Self::Short | Self::LostAndFound => {
                ErrorCode::ImageFailed
            }
            Self::Io { .. } | Self::Program(_) | Self::Worker => ErrorCode::Internal,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DiskFull { directory, .. } => Some(format!("free some space in {}", directory.display())),
            Self::NoFilesystem { .. } => {
                Some("attach it as a root drive, or make a new one with drive_create".into())
            }
            Self::Features { .. } => Some(
                "make the filesystem again with mke2fs's defaults, or import its files as a tar archive"
                    .into(),
            ),
            Self::TooSmall { needed, .. } => Some(format!("ask for at least {needed}")),
            Self::Program(error) => error.hint(),
            _ => None,
        }
    }
}
