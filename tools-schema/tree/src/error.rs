//! How packing and unpacking fail.

use std::io;

use nexus_schema::tools::tree::TreeSummary;
use nexus_schema::{ErrorCode, ToolError};
use rustix::io::Errno;

/// Why a tree was not copied.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file could not be read, written or looked at.
    #[error("{action} {path}")]
    File {
        /// What was done.
        action: &'static str,
        /// On what; bytes that are not UTF-8 are replaced.
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
    /// A tree cannot go where it was to.
    #[error("cannot copy to {path}: {why}")]
    Place {
        /// Where.
        path: String,
        /// Why not.
        why: &'static str,
    },
    /// The archive makes no sense.
    #[error("the archive is damaged at byte {at}: {what}")]
    Damaged {
        /// Where.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// More than may come.
    #[error("more than {limit} {what}")]
    TooLarge {
        /// How many.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
    /// The disk has no more room.
    #[error("write {path}: less than {keep_free} bytes would be left on the disk")]
    Full {
        /// What was to be written.
        path: String,
        /// What stays free for everybody else.
        keep_free: u64,
    },
    /// The other end of the stream is gone, or its reading failed.
    #[error("the stream broke off")]
    Stream(#[source] io::Error),
    /// A pattern is none.
    #[error("`{pattern}` is not a pattern of names: {why}")]
    Pattern {
        /// As given.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is no longer wanted.
    #[error("cancelled")]
    Cancelled,
}

impl TreeError {
    /// A file could not be read, written or looked at.
    pub fn file(action: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        Self::File { action, path: shown(path), source: source.into() }
    }

    /// An entry is refused.
    pub fn refused(path: &[u8], why: &'static str) -> Self {
        Self::Refused { path: shown(path), why }
    }

    /// The code under which callers see it.
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

    /// The error as a tool gives it.
    pub fn to_tool_error(&self) -> ToolError {
        let error = ToolError::new(self.code(), nexus_schema::error::chain(self));
        match self {
            Self::Refused { .. } => error.hint("move what is in the way, or leave the entry out"),
            Self::Full { .. } => error.hint("free room on that disk"),
            _ => error,
        }
    }
}

/// A copy that ended early, and what it left behind.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Broken {
    /// Why.
    pub error: TreeError,
    /// What is there now: each file whole, or as it was before.
    pub done: Box<TreeSummary>,
}

impl Broken {
    /// The error as a tool gives it, with what was left behind.
    pub fn to_tool_error(&self) -> ToolError {
        let mut error = self.error.to_tool_error();
        let done = &self.done;
        if done.entries() > 0 {
            error.message = format!(
                "{}; {} entries were copied before, each of them whole, the last is `{}`",
                error.message,
                done.entries(),
                done.last.as_deref().unwrap_or_default()
            );
        }
        error
    }
}

/// A name for people: bytes that are not UTF-8 and control characters are replaced.
pub(crate) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    text.chars().take(400).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
