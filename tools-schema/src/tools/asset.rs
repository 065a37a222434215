//! Assets: verified files that were downloaded or imported.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{AssetId, AssetKindTag};
use crate::name::{Name, Reference};
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;

/// A sort of asset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AssetKind {
    /// A kernel with its modules.
    Kernel,
    /// A root filesystem, or a package from which one is made.
    Rootfs,
    /// A VMM binary.
    Vmm,
}

impl AssetKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Rootfs, Self::Vmm];

    /// Returns the kind as it is on the wire and in the store.
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
    /// It has the given checksum.
    Checksum,
    /// It cannot be verified; the caller accepted it.
    None,
}

impl Verified {
    /// All ways of verification.
    pub const ALL: [Self; 3] = [Self::Signature, Self::Checksum, Self::None];

    /// Returns the word as it is on the wire and in the store.
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
    /// The VMM drivers that it suits: `qemu`, `firecracker`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<String>,
    /// Why it suits no driver here, where it does not, such as: too old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsuitable: Option<String>,
}

/// A file of an installed asset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AssetFile {
    /// Its path in the asset's directory.
    pub name: String,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
    /// Its length in bytes.
    pub size_bytes: u64,
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
    /// `next_cursor` of the page before.
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
    const DESCRIPTION: &'static str = "Lists kernels, root filesystems and VMM programs: those installed and those that providers \
        have for download; use it to see what VMs can be made of and which versions there are.";
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
    /// Where it comes from: a provider that asset_list names, such as `debian` (kernels of the host's own package archive,
    /// and root filesystems that are made of its packages, as in `debian@bookworm`), `ubuntu` (root filesystems), `anvil`, `alpine` or `firecracker`, also with a version, as in `alpine@3.21`; `url:ADDRESS` (any file of a web server, with
    /// `sha256` or `unverified`); or `file:PATH` (a file on the host). Compressed files are unpacked. Default: `debian` for
    /// kernels, `alpine` for root filesystems, `firecracker` for VMMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Which version, or how it begins (`3.21` is the newest 3.21.x); default: the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A name of your choice; default: made from provider and version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The SHA-256 that the file must have, in hexadecimal: as it is downloaded, or unpacked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Accept a file that cannot be verified (default false); it stays marked as unverified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unverified: Option<bool>,
    /// Download nothing: only say whether the version exists and suits the VMM drivers (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<bool>,
    /// Make it what VMs get by default (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub make_default: Option<bool>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for AssetDownload {
    const NAME: &'static str = "asset_download";
    const TITLE: &'static str = "Download an asset";
    const DESCRIPTION: &'static str = "Downloads and verifies a kernel, root filesystem or VMM program from a provider, a web \
        server or a file on the host; use it to have another one than the default, or `check` to see beforehand whether a version \
        exists and suits. What is installed already is not downloaded again. VMs are made of a root filesystem with \
        `from: rootfs:PROVIDER@VERSION`.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    const OPEN_WORLD: bool = true;
    type Params = AssetDownloadParams;
    type Output = OpOutcome<AssetSummary>;
}

/// Checks the files of assets.
pub enum AssetVerify {}

/// Arguments of `asset_verify`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AssetVerifyParams {
    /// The asset: its name or id; default: all that are installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asset: Option<Reference<AssetKindTag>>,
    /// Only assets of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<AssetKind>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// Result of `asset_verify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AssetVerifyOutput {
    /// Whether every file is what it was when it was installed.
    pub ok: bool,
    /// Each asset that was checked, damaged ones first.
    pub assets: Vec<AssetCheck>,
}

/// An asset whose files were checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AssetCheck {
    /// Its id.
    pub id: AssetId,
    /// Its name.
    pub name: Name,
    /// What it is.
    pub kind: AssetKind,
    /// Whether its files are what they were.
    pub ok: bool,
    /// How many bytes were read.
    pub bytes: u64,
    /// What is wrong, a sentence for each file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

impl Tool for AssetVerify {
    const NAME: &'static str = "asset_verify";
    const TITLE: &'static str = "Verify assets";
    const DESCRIPTION: &'static str = "Hashes the files of installed assets again and says which are damaged; use it when a VM does not boot and nothing says why, or after trouble with the disk. Remove and download a damaged one again.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = AssetVerifyParams;
    type Output = OpOutcome<AssetVerifyOutput>;
}

/// Shows one asset.
pub enum AssetInspect {}

/// Arguments of `asset_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AssetInspectParams {
    /// The asset: its name or id.
    pub asset: Reference<AssetKindTag>,
}

/// Result of `asset_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AssetDetails {
    /// The asset.
    pub asset: AssetSummary,
    /// Where it came from: an address, a file of the host, or a package.
    pub origin: String,
    /// SHA-256 of what was downloaded, in hexadecimal, where that was another file than what is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download_sha256: Option<String>,
    /// Its files, the main one first.
    pub files: Vec<AssetFile>,
    /// Who installed it.
    pub owner: String,
    /// The names of the VMs that need it.
    pub used_by: Vec<String>,
}

impl Tool for AssetInspect {
    const NAME: &'static str = "asset_inspect";
    const TITLE: &'static str = "Inspect an asset";
    const DESCRIPTION: &'static str = "Shows one installed asset: its files with their checksums, where it came from, how it was \
        verified and which VMs need it; use it before you rely on or remove one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = AssetInspectParams;
    type Output = AssetDetails;
}

/// Removes an asset.
pub enum AssetRemove {}

/// Arguments of `asset_remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AssetRemoveParams {
    /// The asset: its name or id.
    pub asset: Reference<AssetKindTag>,
}

/// Result of `asset_remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AssetRemoveOutput {
    /// Its id.
    pub id: AssetId,
    /// Its name.
    pub name: Name,
    /// What it was.
    pub kind: AssetKind,
    /// Whether it was what VMs get by default; then another one is, or the built-in default is in force again.
    pub was_default: bool,
    /// How many bytes its files had.
    pub freed_bytes: u64,
}

impl Tool for AssetRemove {
    const NAME: &'static str = "asset_remove";
    const TITLE: &'static str = "Remove an asset";
    const DESCRIPTION: &'static str = "Removes an installed asset with its files; use it when it is damaged or not needed any more. \
        One that VMs need is refused. Images that were made of it stay.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = AssetRemoveParams;
    type Output = AssetRemoveOutput;
}
