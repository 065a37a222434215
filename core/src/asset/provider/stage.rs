//! The stages of a pipeline, as rows have them.

use nexus_schema::tools::asset::AssetKind;
use serde::{Deserialize, Serialize};

use super::template::Template;
use crate::asset::stream::{Compression, Sha256};

/// The default limit of a download, packed or unpacked, unless its stage sets another.
pub(crate) const MAX_DOWNLOAD: u64 = 4 << 30;
pub(crate) const MAX_UNPACKED: u64 = 16 << 30;

/// One stage. Stages are listed in the order in which bytes pass them; an unknown stage or field is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub(crate) enum Stage {
    /// Downloads from a web server.
    Download(Download),
    /// Reads a file of the host.
    Open(Open),
    /// Checks the digest of the bytes so far.
    Checksum(Checksum),
    /// Checks the signature of the list of digests.
    Pgp(Pgp),
    /// Decompresses.
    Decompress(Decompress),
    /// Extracts files from a tar archive.
    Extract(Extract),
    /// Puts the result into the store.
    Store(Store),
    /// Builds a kernel from the result, which is the source of Linux.
    Build(Build),
    /// Uses the host's own package archive, with its own chain of trust.
    Apt(Apt),
}

/// Downloads from a web server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Download {
    pub(crate) url: Template,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bytes: Option<u64>,
}

/// Reads a file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Open {
    pub(crate) path: Template,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bytes: Option<u64>,
}

/// A digest: in the row itself, in a document (under `name`, which a document with only a digest does not need), or given by
/// the caller, if at all.
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

/// A document signed by one of the provider's keys: by a detached signature, or without one in clear text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pgp {
    pub(crate) document: Template,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) signature: Option<Template>,
}

/// Decompresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Decompress {
    pub(crate) format: Format,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bytes: Option<u64>,
}

/// A compression. `auto` detects it by the first bytes and passes uncompressed data through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Format {
    Xz,
    Gzip,
    Zstd,
    Auto,
}

impl Format {
    /// The compression to use, given the first bytes.
    pub(crate) fn of(self, start: &[u8]) -> Compression {
        match self {
            Self::Xz => Compression::Xz,
            Self::Gzip => Compression::Gzip,
            Self::Zstd => Compression::Zstd,
            Self::Auto => match Compression::of_magic(start) {
                // Only kernel images use it; it is not unpacked here.
                Some(Compression::Lz4Legacy) | None => Compression::Plain,
                Some(compression) => compression,
            },
        }
    }
}

/// Extracts files from a tar archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Extract {
    pub(crate) members: Vec<Member>,
}

/// One file of an archive: its full path there, and its name here. Nothing else is extracted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Member {
    pub(crate) path: Template,
    #[serde(rename = "as")]
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) executable: bool,
}

/// Puts the result into the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Store {}

/// The result is the source of Linux as a tar archive. `kernel_build` makes a kernel of it; it is no asset itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Build {}

/// Uses the host's own package archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Apt {
    pub(crate) take: Vec<Take>,
    /// The distribution whose root filesystems are made.
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
    /// The kind of the resulting asset.
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
