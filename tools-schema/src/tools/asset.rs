//! Assets: verified files from outside.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::AssetId;
use crate::name::Name;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;

/// A sort of asset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AssetKind {
    /// A kernel with its modules.
    Kernel,
    /// A root filesystem, or a package that one is made of.
    Rootfs,
    /// A VMM binary.
    Vmm,
}

impl AssetKind {
    /// Every kind there is.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Rootfs, Self::Vmm];

    /// The kind as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Rootfs => "rootfs",
            Self::Vmm => "vmm",
        }
    }
}

impl std::str::FromStr for AssetKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|k| k.as_str() == text).ok_or(())
    }
}

/// How an asset was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verified {
    /// A trusted signature covers it.
    Signature,
    /// It has the checksum that was given.
    Checksum,
    /// Nothing vouches for it but the one who named it.
    None,
}

impl Verified {
    /// Every way there is.
    pub const ALL: [Self; 3] = [Self::Signature, Self::Checksum, Self::None];

    /// The word as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Signature => "signature",
            Self::Checksum => "checksum",
            Self::None => "none",
        }
    }
}

/// An asset, installed or available.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AssetSummary {
    /// Its id, once installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<AssetId>,
    /// Its name, such as `debian-6-1-0-40-cloud-amd64`.
    pub name: Name,
    /// What it is.
    pub kind: AssetKind,
    /// Where it comes from, such as `debian` or `file`.
    pub provider: String,
    /// Its version.
    pub version: String,
    /// The architecture, such as `x86_64`.
    pub arch: String,
    /// Whether it is here.
    pub installed: bool,
    /// Whether it is what VMs get by default.
    pub default: bool,
    /// SHA-256 of the file as stored, in hexadecimal, once installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Its size in bytes (of the download, while not installed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// How it was verified, once installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// Its file on the host, once installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// When it was installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installed_at: Option<Timestamp>,
}

/// Lists assets.
pub enum AssetList {}

/// Arguments of `asset_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AssetListParams {
    /// Only assets of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<AssetKind>,
    /// Also ask the providers what could be downloaded (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<bool>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// Where to go on: `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `asset_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AssetListOutput {
    /// The assets, installed ones first.
    pub assets: Vec<AssetSummary>,
    /// Providers that could not be asked, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for AssetList {
    const NAME: &'static str = "asset_list";
    const TITLE: &'static str = "List assets";
    const DESCRIPTION: &'static str = "Lists kernels and other verified files: those installed and those that can be \
        downloaded; use it to see which kernels a VM can boot.";
    const EFFECT: Effect = Effect::ReadOnly;
    const OPEN_WORLD: bool = true;
    type Params = AssetListParams;
    type Output = AssetListOutput;
}

/// Downloads or imports an asset.
pub enum AssetDownload {}

/// Arguments of `asset_download`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AssetDownloadParams {
    /// What it is.
    pub kind: AssetKind,
    /// Where it comes from: `debian` (the host's own package archive) or `file:PATH` (a file on the host). Default: debian.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Which version; default: the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A name of your choice; default: made from provider and version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The SHA-256 that the file must have, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Make it what VMs get by default (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub make_default: Option<bool>,
    /// How long to wait for its end, in seconds (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for AssetDownload {
    const NAME: &'static str = "asset_download";
    const TITLE: &'static str = "Download an asset";
    const DESCRIPTION: &'static str = "Downloads and verifies a kernel from a provider, or imports one from a file on the host; \
        use it to have another kernel than the default. What is installed already is not downloaded again.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    const OPEN_WORLD: bool = true;
    type Params = AssetDownloadParams;
    type Output = OpOutcome<AssetSummary>;
}
