//! The errors of packing and unpacking.

use std::io;

use nexus_schema::tools::tree::TreeSummary;
use nexus_schema::{ErrorCode, ToolError};
use rustix::io::Errno;

/// Why a tree was not copied.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file operation failed.
    #[error("{action} {path}")]
    File {
        /// The operation.
        action: &'static str,
        /// The path; bytes that are not UTF-8 are replaced.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An entry of the archive is refused.
    #[error("entry `{path}` is refused: {why}")]
    Refused {
        /// Its name.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A tree cannot be copied to its target.
    #[error("cannot copy to {path}: {why}")]
    Place {
        /// The target.
        path: String,
        /// Why not.
        why: &'static str,
    },
    /// The archive is damaged.
    #[error("the archive is damaged at byte {at}: {what}")]
    Damaged {
        /// The offset.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A limit was exceeded.
    #[error("more than {limit} {what}")]
    TooLarge {
        /// The limit.
        limit: u64,
        /// What is limited.
        what: &'static str,
    },
    /// The disk is full.
    #[error("write {path}: less than {keep_free} bytes would be left on the disk")]
    Full {
        /// The file that was being written.
        path: String,
        /// How many bytes must stay free.
        keep_free: u64,
    },
    /// The other end of the stream is gone, or reading from it failed.
    #[error("the stream was interrupted")]
    Stream(#[source] io::Error),
    /// A pattern is invalid.
    #[error("`{pattern}` is not a valid pattern: {why}")]
    Pattern {
        /// As given.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl TreeError {
    /// Creates the error of a failed file operation.
    pub fn file(action: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        Self::File { action, path: shown(path), source: source.into() }
    }

    /// Creates the error of a refused entry.
    pub fn refused(path: &[u8], why: &'static str) -> Self {
        Self::Refused { path: shown(path), why }
    }

    /// Returns the error code for callers.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::File { source, .. } => match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOSPC | Errno::DQUOT) => ErrorCode::DiskFull,
                Some(Errno::NOENT | Errno::NOTDIR) => ErrorCode::FileNotFound,
                _ => ErrorCode::FileRefused,
            },
            Self::Full { .. } => ErrorCode::DiskFull,
            Self::Refused { .. } | Self::Place { .. } | Self::Damaged { .. } => ErrorCode::FileRefused,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Stream(_) => ErrorCode::GuestUnreachable,
            Self::Pattern { .. } => ErrorCode::InvalidArgument,
            Self::Cancelled => ErrorCode::Cancelled,
        }
    }

    /// Converts the error to the form of tools.
    pub fn to_tool_error(&self) -> ToolError {
        let error = ToolError::new(self.code(), nexus_schema::error::chain(self));
        match self {
            Self::Refused { .. } => error.hint("move what is in the way, or leave the entry out"),
            Self::Full { .. } => error.hint("free space on that disk"),
            _ => error,
        }
    }
}

/// A copy that ended early, and its result so far.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Broken {
    /// Why it ended.
    pub error: TreeError,
    /// The copied files; each is either complete or unchanged.
    pub done: Box<TreeSummary>,
}

impl Broken {
    /// Converts the error to the form of tools, with the result so far.
    pub fn to_tool_error(&self) -> ToolError {
        let mut error = self.error.to_tool_error();
        let done = &self.done;
        if done.entries() > 0 {
            error.message = format!(
                "{}; {} entries were copied completely, the last is `{}`",
                error.message,
                done.entries(),
                done.last.as_deref().unwrap_or_default()
            );
        }
        error
    }
}

/// Returns a name for people; bytes that are not UTF-8 and control characters are replaced.
pub(crate) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    text.chars().take(400).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
