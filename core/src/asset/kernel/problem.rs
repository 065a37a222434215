//! What is wrong with a kernel.

use std::io;

use crate::asset::stream::OverLimit;

/// What is wrong with a kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelProblem {
    /// Neither an ELF file nor a bzImage, nor an image of arm64.
    #[error("it is neither an ELF file nor a bzImage, nor an Image of arm64")]
    UnknownFormat,
    /// A header that points outside the file or is inconsistent.
    #[error("its header is malformed: {0}")]
    Malformed(&'static str),
    /// A payload with an unsupported compression.
    #[error("its payload is compressed with {0}, which is not supported")]
    Compression(&'static str),
    /// The payload cannot be unpacked.
    #[error("its payload is damaged")]
    Damaged(#[source] io::Error),
    /// Its unpacked length differs from its header.
    #[error("it unpacks to {found} bytes instead of {expected}")]
    Length {
        /// What the header says.
        expected: u64,
        /// What came out.
        found: u64,
    },
    /// Too large.
    #[error("it is larger than the {limit} bytes that are allowed")]
    TooLarge {
        /// How many bytes it may have.
        limit: u64,
    },
    /// An ELF file, but no kernel for this machine.
    #[error("it is no kernel for {0}: {1}")]
    WrongElf(&'static str, &'static str),
    /// A module needed for booting is neither in the package nor built in.
    #[error("module {0} is neither among its modules nor built in")]
    NoModule(String),
    /// A module cannot be read.
    #[error("module {module} cannot be read: {problem}")]
    Module {
        /// The module.
        module: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Modules that depend on each other.
    #[error("its modules have a dependency cycle at {0}")]
    Circle(String),
    /// Its `kernel.json` cannot be parsed.
    #[error("its kernel.json cannot be read")]
    Facts(#[source] serde_json::Error),
}

impl KernelProblem {
    /// The problem for a failed read of a kernel's payload.
    pub(crate) fn of_read(error: io::Error) -> Self {
        match OverLimit::in_error(&error) {
            Some(OverLimit { limit }) => Self::TooLarge { limit },
            None => Self::Damaged(error),
        }
    }
}
