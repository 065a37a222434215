//! The errors of reading.

use std::io;

/// Why a filesystem, or something in it, was not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The file could not be read.
    #[error("read the filesystem at byte {at}")]
    Io {
        /// Where in the file.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no ext4 filesystem in the file.
    #[error("there is no ext4 filesystem in the file")]
    NoFilesystem,
    /// The filesystem needs something that this reader does not have.
    #[error("the ext4 filesystem has {what}, which cannot be read here")]
    Unsupported {
        /// What.
        what: String,
    },
    /// A structure contradicts itself or its place.
    #[error("the ext4 filesystem is damaged: {what} of {of}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// The structure that has it: an inode, a block.
        of: String,
    },
    /// A limit of this reader is exceeded.
    #[error("the ext4 filesystem has {what}")]
    TooLarge {
        /// What exceeds the limit, and the limit.
        what: String,
    },
    /// It is not wanted any more.
    #[error("the ext4 filesystem is not read to its end")]
    Stopped,
}

impl ReadError {
    pub(super) fn inode(what: &'static str, number: u32) -> Self {
        Self::Damaged { what, of: format!("inode {number}") }
    }

    pub(super) fn block(what: &'static str, number: u64) -> Self {
        Self::Damaged { what, of: format!("block {number}") }
    }
}
