//! Kernels of one's own: built from the source of Linux, and published for other hosts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::AssetKindTag;
use crate::name::{Name, Reference};
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;
use crate::tools::asset::{AssetSummary, Verified};

/// Builds a kernel.
pub enum KernelBuild {}

/// Arguments of `kernel_build`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelBuildParams {
    /// Which version of Linux, or how it begins (`6.12` is the newest 6.12.x); default: the newest that a source has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where the source comes from: `debian` (the package linux-source of the host's own archive) or a provider of sources such
    /// as `kernel-org`; default: the first of them that has the version and can be verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The text of a kernel configuration, whole or only the options that are not off; default: that of Nexus for microVMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1048576))]
    pub config: Option<String>,
    /// The architecture; only that of the host can be built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// A name for the asset; default: made from the version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Compile it in a VM without a network that is made for it, instead of by the host's compiler (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_vm: Option<bool>,
    /// Build nothing: only say which sources have the version, whether they are signed, and what the host lacks (default false).
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

/// A source of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KernelSource {
    /// Where it comes from, such as `debian` or `kernel-org`.
    pub provider: String,
    /// Its version of Linux, if it has what was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its address, or its package with the package's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// What vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// A newer version of the same series, if the source lists one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newer: Option<String>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Result of `kernel_build`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct KernelBuilt {
    /// Whether a kernel was built, or could be: a source can be used and the host lacks nothing.
    pub ok: bool,
    /// The sources that were asked, the one that is used first.
    pub sources: Vec<KernelSource>,
    /// The programs and libraries that the host lacks to build it, by their packages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// Whether it had been built before.
    #[serde(default)]
    pub cached: bool,
    /// The kernel, once it is built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asset: Option<AssetSummary>,
    /// The log of the build on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
}

impl Tool for KernelBuild {
    const NAME: &'static str = "kernel_build";
    const TITLE: &'static str = "Build a kernel";
    const DESCRIPTION: &'static str = "Builds a kernel from signed source and adds it to the assets; use it for a configuration or version that \
        providers lack, or with `check` to see beforehand whether a version exists, is signed and can be built. A repeated call goes on where \
        an interrupted one ended, and builds nothing twice.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    const OPEN_WORLD: bool = true;
    type Params = KernelBuildParams;
    type Output = OpOutcome<KernelBuilt>;
}

/// Publishes kernels.
pub enum KernelPublish {}

/// Arguments of `kernel_publish`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelPublishParams {
    /// The directory on the host, an absolute path; made if it does not exist. A web server of it is a mirror of the provider.
    pub directory: String,
    /// The file on the host with the secret PGP key that signs, armored and without a passphrase; an absolute path.
    pub key: String,
    /// The kernels: names or ids of assets that have everything built in; default: all that kernel_build made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 0))]
    pub kernels: Vec<Reference<AssetKindTag>>,
    /// The provider whose layout is written (default `anvil`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// A published kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PublishedKernel {
    /// The asset.
    pub name: Name,
    /// Its version.
    pub version: String,
    /// The packed file, below the directory.
    pub file: String,
    /// SHA-256 of the packed file, in hexadecimal.
    pub sha256: String,
    /// The length of the packed file in bytes.
    pub size_bytes: u64,
}

/// Result of `kernel_publish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KernelPublished {
    /// The directory.
    pub directory: String,
    /// The kernels in it that this call wrote.
    pub kernels: Vec<PublishedKernel>,
    /// The public key to set as `keys` of the provider, a file in the directory.
    pub public_key: String,
    /// The fingerprint of the key.
    pub fingerprint: String,
}

impl Tool for KernelPublish {
    const NAME: &'static str = "kernel_publish";
    const TITLE: &'static str = "Publish kernels";
    const DESCRIPTION: &'static str = "Lays kernels out in a directory of the host as the provider `anvil` reads them: packed with xz, with a signed list of \
        checksums of the packed and unpacked files; use it to give your kernels to other hosts. What the directory had of the same versions is \
        replaced.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = KernelPublishParams;
    type Output = OpOutcome<KernelPublished>;
}
