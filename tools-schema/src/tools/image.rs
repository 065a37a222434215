//! Images: read-only masters that drives are cloned from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{ImageId, ImageKind};
use crate::link::{ImageConfig, InitMode};
use crate::name::{Name, Reference};
use crate::size::ByteSize;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;
use crate::tools::plan::Creation;

/// The tiny image: a static shell. It is made on first use from the host's package archive.
pub const BUSYBOX: &str = "busybox";
/// The default image: a Debian for general work. Made like [`BUSYBOX`].
pub const DEBIAN: &str = "debian";
/// A Debian with little more than apt and a Python interpreter. Made like [`BUSYBOX`].
pub const DEBIAN_MINIMAL: &str = "debian-minimal";
/// The images that can be named before they exist: they are made on first use.
pub const BUILT_IN: [&str; 3] = [BUSYBOX, DEBIAN, DEBIAN_MINIMAL];

/// An image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ImageDetails {
    /// Its id; absent for a built-in image that was not made yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ImageId>,
    /// Its name.
    pub name: Name,
    /// What it was made from, such as `debian:bookworm`, `file:/path/rootfs.tar`.
    pub source: String,
    /// Whether it is here; a built-in image is made on first use.
    pub installed: bool,
    /// Whether it is what VMs get by default.
    pub default: bool,
    /// The distribution, such as `debian-12`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distro: Option<String>,
    /// What is PID 1 by default.
    pub init: InitMode,
    /// How it means to be run, where it is an OCI image: its environment and working directory are those of commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ImageConfig>,
    /// The architecture, such as `x86_64`.
    pub arch: String,
    /// The size of its filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// What it takes on the disk, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// SHA-256 of the filesystem, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// VMs and drives that were made from it and still exist.
    pub used_by: u64,
    /// Its file on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
}

/// Lists images.
pub enum ImageList {}

/// Arguments of `image_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageListParams {
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `image_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ImageListOutput {
    /// The images, by name; built-in ones that were not made yet are listed too.
    pub images: Vec<ImageDetails>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for ImageList {
    const NAME: &'static str = "image_list";
    const TITLE: &'static str = "List images";
    const DESCRIPTION: &'static str =
        "Lists the images that VMs can be created from; use it to choose `from` of vm_create.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = ImageListParams;
    type Output = ImageListOutput;
}

/// Shows one image.
pub enum ImageInspect {}

/// Arguments of `image_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageInspectParams {
    /// The image: its name or id.
    pub image: Reference<ImageKind>,
}

impl Tool for ImageInspect {
    const NAME: &'static str = "image_inspect";
    const TITLE: &'static str = "Inspect an image";
    const DESCRIPTION: &'static str = "Shows one image: source, distribution, size, checksum and what uses it; use it before you rely on or replace one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = ImageInspectParams;
    type Output = ImageDetails;
}

/// Deletes an image.
pub enum ImageDelete {}

/// Arguments of `image_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageDeleteParams {
    /// The image: its name or id.
    pub image: Reference<ImageKind>,
}

/// Result of `image_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ImageDeleteOutput {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: Name,
    /// What it took on the disk, in bytes.
    pub freed_bytes: u64,
}

impl Tool for ImageDelete {
    const NAME: &'static str = "image_delete";
    const TITLE: &'static str = "Delete an image";
    const DESCRIPTION: &'static str = "Deletes an image; use it when no VM is to be made from it any more. Refused, with who uses it, while VMs, \
        drives, templates or settings refer to it. A built-in image is made again on its next use.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = ImageDeleteParams;
    type Output = ImageDeleteOutput;
}

/// Makes an image.
pub enum ImageCreate {}

/// Arguments of `image_create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageCreateParams {
    /// The image's name; default: made from the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What it is made from: `debian`, `debian-minimal`, `busybox`, `image:NAME`, `template:NAME`; `oci:IMAGE` (such as `oci:python:3.12-slim` or
    /// `oci:REGISTRY/REPOSITORY@DIGEST`); `rootfs:PROVIDER@VERSION` (such as `rootfs:alpine@3.21`, downloaded if it is not here; or
    /// `rootfs:` and an asset's name); or `file:PATH` on the host: a directory, a tar archive (also .gz, .xz, .zst) or an ext4 image
    /// with a root filesystem, an OCI layout or archive, or what `docker save` wrote (`oci-layout:PATH#NAME`,
    /// `docker-archive:PATH#NAME` choose one of several); or `vm:NAME`, a VM's root drive as it is now.
    pub from: String,
    /// What is PID 1 by default (default agent; of a VM, what it has).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitMode>,
    /// Only say what would be done, and change nothing: the reply has a `plan` instead of an operation (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Any key: the same key and arguments give the same image within 24 h, not a second one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub idempotency_key: Option<String>,
}

impl Tool for ImageCreate {
    const NAME: &'static str = "image_create";
    const TITLE: &'static str = "Create an image";
    const DESCRIPTION: &'static str = "Makes an image from the distribution's packages, a directory, a tar archive or an ext4 \
        file on the host, or a VM that was prepared; use it when VMs need another root filesystem than the built-in ones.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    const OPEN_WORLD: bool = true;
    type Params = ImageCreateParams;
    type Output = Creation<ImageDetails>;
}

/// Saves an image to a file.
pub enum ImageSave {}

/// Arguments of `image_save`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSaveParams {
    /// The image: its name or id.
    pub image: Reference<ImageKind>,
    /// The file on the host, which does not exist yet: an absolute path in a place that system_info lists, or a name in your own folder.
    pub to: String,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// A saved image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageSaved {
    /// The file on the host.
    pub path: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The digest of the image's manifest, such as `sha256:…`.
    pub digest: String,
    /// What a layer cannot hold and was left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Tool for ImageSave {
    const NAME: &'static str = "image_save";
    const TITLE: &'static str = "Save an image to a file";
    const DESCRIPTION: &'static str = "Writes an image to a tar archive on the host; use it to take a prepared machine to another host or into Docker. \
        `docker load`, OCI tools and image_create with `oci-archive:PATH` read it.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = ImageSaveParams;
    type Output = OpOutcome<ImageSaved>;
}

/// Pushes an image to a registry.
pub enum ImagePush {}

/// Arguments of `image_push`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImagePushParams {
    /// The image: its name or id.
    pub image: Reference<ImageKind>,
    /// Where to, such as `registry.example.com/group/app:1.2`.
    pub to: String,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// A pushed image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImagePushed {
    /// The reference with the digest: `oci:` before it makes it the `from` of image_create.
    pub reference: String,
    /// The digest of the image's manifest, such as `sha256:…`.
    pub digest: String,
    /// Bytes that were sent; what the registry had is not.
    pub sent_bytes: u64,
    /// What a layer cannot hold and was left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Tool for ImagePush {
    const NAME: &'static str = "image_push";
    const TITLE: &'static str = "Push an image to a registry";
    const DESCRIPTION: &'static str = "Pushes an image to an OCI registry, with the host's credentials; use it to share a prepared machine. \
        An image under that tag is replaced.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    const OPEN_WORLD: bool = true;
    type Params = ImagePushParams;
    type Output = OpOutcome<ImagePushed>;
}
