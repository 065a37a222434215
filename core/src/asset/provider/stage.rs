//! The stages of a pipeline, as rows have them.

use nexus_schema::tools::asset::AssetKind;
use serde::{Deserialize, Serialize};

use super::template::Template;
use crate::asset::stream::{Compression, Sha256};

/// How much a download, and what it unpacks to, may have at most unless its stage says otherwise.
pub(crate) const MAX_DOWNLOAD: u64 = 4 << 30;
pub(crate) const MAX_UNPACKED: u64 = 16 << 30;

/// One stage. They stand in the order in which bytes go through them; an unknown stage or field is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub(crate) enum Stage {
    /// From a web server.
    Download(Download),
    /// From a file of the host.
    Open(Open),
    /// The bytes so far have a digest.
    Checksum(Checksum),
    /// What lists the digests is signed.
    Pgp(Pgp),
    /// From compressed to plain.
    Decompress(Decompress),
    /// From a tar archive to some of its files.
    Extract(Extract),
    /// Into the store.
    Store(Store),
    /// By the host's own package archive, whose chain of trust is its own.
    Apt(Apt),
}

/// From a web server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Download {
    pub(crate) url: Template,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bytes: Option<u64>,
}

/// From a file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Open {
    pub(crate) path: Template,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bytes: Option<u64>,
}

/// A digest: in the row itself, or in a document (as `name` there; a document of nothing but a digest needs none), or the one
/// that the caller gives, if one is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Checksum {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) document: Option<Template>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<Template>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) given: bool,
}

/// A document is signed by one of the provider's keys: with a signature of its own, or (without one) in clear text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pgp {
    pub(crate) document: Template,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) signature: Option<Template>,
}

/// From compressed to plain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Decompress {
    pub(crate) format: Format,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bytes: Option<u64>,
}

/// A compression; `auto` goes by the first bytes, and lets pass what is not compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Format {
    Xz,
    Gzip,
    Zstd,
    Auto,
}

impl Format {
    /// The compression that it stands for, given the first bytes.
    pub(crate) fn of(self, start: &[u8]) -> Compression {
        match self {
            Self::Xz => Compression::Xz,
            Self::Gzip => Compression::Gzip,
            Self::Zstd => Compression::Zstd,
            Self::Auto => match Compression::of_magic(start) {
                // A kernel's own affair.
                Some(Compression::Lz4Legacy) | None => Compression::Plain,
                Some(compression) => compression,
            },
        }
    }
}

/// From a tar archive to some of its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Extract {
    pub(crate) members: Vec<Member>,
}

/// One file of an archive: its whole path there, and its name here. Nothing else is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Member {
    pub(crate) path: Template,
    #[serde(rename = "as")]
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) executable: bool,
}

/// Into the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Store {}

/// By the host's own package archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Apt {
    pub(crate) take: Vec<Take>,
    /// Whose root filesystems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) distribution: Option<String>,
}

/// What is taken from the package archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Take {
    Kernel,
    Rootfs,
}

impl Take {
    /// What comes of it.
    pub(crate) const fn kind(self) -> AssetKind {
        match self {
            Self::Kernel => AssetKind::Kernel,
            Self::Rootfs => AssetKind::Rootfs,
        }
    }
}

/// A digest in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest(pub(crate) Sha256);

impl TryFrom<String> for Digest {
    type Error = crate::asset::stream::NotADigest;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0.to_string()
    }
}
