//! What can be wrong with an archive: its sources, signatures, indexes and packages.

use std::io;

use crate::asset::stream::OverLimit;

/// What is wrong with an entry of apt's configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceProblem {
    /// A malformed line or stanza.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// An address of a kind that is not supported.
    #[error("addresses of the kind {0}: are not supported, only http:, https: and mirror+file:")]
    Scheme(String),
    /// A repository without `dists/`.
    #[error("a flat repository has no signed distribution")]
    Flat,
    /// Another distributor's packages.
    #[error("its packages come from {0:?}, not from a distribution that is known")]
    ThirdParty(String),
    /// Packages that are only installed on request.
    #[error("it is marked NotAutomatic")]
    NotAutomatic,
    /// Not for this machine.
    #[error("it has no packages for {0}")]
    Architecture(&'static str),
}

/// What is wrong with a signature.
#[derive(Debug, thiserror::Error)]
pub enum SignatureProblem {
    /// It cannot be parsed.
    #[error("it cannot be read")]
    Malformed(#[source] Box<pgp::errors::Error>),
    /// No valid signature; what was found instead.
    #[error("none of {count} signatures is valid: {}", .reasons.join("; "))]
    NoneGood {
        /// How many there are.
        count: usize,
        /// What is wrong with each.
        reasons: Vec<String>,
    },
}

/// What is wrong with an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexProblem {
    /// A field is missing or malformed.
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
    /// It does not list a needed file.
    #[error("it does not list {0}")]
    NotListed(String),
    /// It is out of date.
    #[error("it expired on {0}")]
    Expired(String),
    /// It claims to be made in the future.
    #[error("it is dated {0}, in the future")]
    FromTheFuture(String),
    /// A path that leaves the archive.
    #[error("path {0:?} leaves the archive")]
    UnsafePath(String),
    /// Its compressed form is damaged, or a line has no end.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// What is wrong with a package.
#[derive(Debug, thiserror::Error)]
pub enum PackageProblem {
    /// The outer archive is malformed.
    #[error("its ar archive is malformed: {0}")]
    Ar(&'static str),
    /// It has no data member of a known kind.
    #[error("it has no data.tar of a known compression")]
    NoData,
    /// Its data cannot be read.
    #[error("its data cannot be read")]
    Data(#[source] io::Error),
    /// A path that leaves the tree.
    #[error("its entry {0:?} leaves the tree")]
    UnsafePath(String),
    /// A chosen entry is no regular file.
    #[error("its entry {0:?} is not a regular file")]
    NotAFile(String),
    /// A chosen entry is missing.
    #[error("it has no file {0}")]
    NoMember(String),
    /// Too much in it.
    #[error("{what} is larger than the {limit} bytes that are allowed")]
    TooLarge {
        /// What is too large.
        what: String,
        /// How many bytes it may have.
        limit: u64,
    },
}

impl From<PackageProblem> for io::Error {
    fn from(problem: PackageProblem) -> Self {
        Self::other(problem)
    }
}

impl PackageProblem {
    /// The problem for a failed read of a package's data, while reading `what`.
    pub(crate) fn of_read(error: io::Error, what: &str) -> Self {
        match OverLimit::in_error(&error) {
            Some(OverLimit { limit }) => Self::TooLarge { what: what.into(), limit },
            None => Self::Data(error),
        }
    }
}
