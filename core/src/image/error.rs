//! The errors of making an image.

use std::io;
use std::path::{Path, PathBuf};

use nexus_schema::{ByteSize, ErrorCode};

use super::oci::OciError;
use crate::drive::DriveError;
use crate::ext4::Ext4Error;
use crate::os::disk::{free_bytes, is_full};
use crate::os::subids::Lacking;
use crate::os::tool::ProgramError;
use crate::progress::Cancelled;

/// Why an image was not made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It was cancelled.
    #[error("the image was cancelled")]
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
    /// The source cannot be read.
    #[error("read {path}", path = .path.display())]
    Source {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The source's format is unknown.
    #[error("{path} is neither a directory, nor a tar archive (plain, gzip, xz or zstd), nor an ext4 image", path = .path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// The archive is damaged.
    #[error("the archive is damaged at byte {at}: {what}")]
    Damaged {
        /// Where in the unpacked archive.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The archive cannot be read or unpacked.
    #[error("unpack the archive at byte {at}")]
    Unpack {
        /// Where in the unpacked archive.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An entry is not allowed in an image.
    #[error("entry `{name}` is refused: {what}")]
    Refused {
        /// Its name, made printable and shortened.
        name: String,
        /// Why.
        what: &'static str,
    },
    /// The source exceeds a limit.
    #[error("the source has more than {limit} {what}")]
    TooLarge {
        /// The limit.
        limit: u64,
        /// What is limited.
        what: &'static str,
    },
    /// The source is empty.
    #[error("the source is empty")]
    Empty,
    /// The image should start its own init, but has none.
    #[error("the image has no init system of its own")]
    NoInit,
    /// A file of the image could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The filesystem could not be made or read.
    #[error(transparent)]
    Filesystem(Ext4Error),
    /// A filesystem, or a file in it, could not be read.
    #[error("read the filesystem in {path}", path = .path.display())]
    Unreadable {
        /// The filesystem's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The daemon's user has no subordinate ids for this.
    #[error(transparent)]
    Ids(#[from] Lacking),
    /// The image's directory could not be made or filled.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// An OCI image could not be read.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// The worker that read the source ended early.
    #[error("the worker that reads the source ended early")]
    Worker,
}

impl From<Cancelled> for ImageError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<Ext4Error> for ImageError {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::Cancelled => Self::Cancelled,
            Ext4Error::DiskFull { directory, needed, free } => Self::DiskFull { directory, needed, free },
            Ext4Error::Program(error) => Self::Program(error),
            other => Self::Filesystem(other),
        }
    }
}

impl ImageError {
    /// An error while writing `path`; a full disk becomes [`ImageError::DiskFull`].
    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        if is_full(&source) {
            return Self::full(path.parent().unwrap_or(path), 0);
        }
        Self::Write { path: path.to_owned(), source }
    }

    /// An error while reading `path`.
    pub(crate) fn source(path: &Path, source: io::Error) -> Self {
        Self::Source { path: path.to_owned(), source }
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
            Self::Drive(error) => error.code(),
            Self::Oci(error) => error.code(),
            Self::Source { .. } | Self::Unknown { .. } | Self::NoInit => ErrorCode::InvalidArgument,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Program(ProgramError::Missing { .. }) | Self::Ids(_) => ErrorCode::HostUnsuitable,
            Self::Filesystem(error) => error.code(),
            Self::Damaged { .. }
            | Self::Unpack { .. }
            | Self::Refused { .. }
            | Self::Empty
            | Self::Unreadable { .. }
            | Self::Write { .. }
            | Self::Program(_)
            | Self::Worker => ErrorCode::ImageFailed,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DiskFull { directory, .. } => Some(format!("free some space in {}", directory.display())),
            Self::NoInit => Some("use the init mode `agent`, or install an init system in the image".into()),
            Self::Program(error) => super::bootstrap::hint(error).or_else(|| error.hint()),
            Self::Oci(error) => error.hint(),
            Self::Ids(lacking) => Some(format!(
                "{}; or start from `busybox`, rootfs:alpine or oci:IMAGE, which need none",
                lacking.fix()
            )),
            _ => None,
        }
    }
}
