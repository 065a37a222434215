//! Drives: writable disks, cloned from images or other drives, or empty.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, DriveId, DriveKind, ImageId, VmId, VmKind};
use crate::name::{Name, Reference};
use crate::size::ByteSize;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::plan::Creation;

/// A drive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriveDetails {
    /// Its id.
    pub id: DriveId,
    /// Its name.
    pub name: Name,
    /// Its size.
    pub size: ByteSize,
    /// What it takes on the host's disk, in bytes; what it shares with its image counts too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// What is wrong with it, if anything is known to be, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Whether guests may not write to it.
    pub read_only: bool,
    /// The VM that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_to: Option<DriveUse>,
    /// Whether it is deleted together with the VM that it was made for.
    pub deleted_with_vm: bool,
    /// The image that it was cloned from, while that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<ImageId>,
    /// The drive that it was cloned from, while that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<DriveId>,
    /// Its file on the host.
    pub path: String,
    /// Who made it.
    pub owner: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Where a drive is in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DriveUse {
    /// The VM.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: Name,
    /// Whether it is that VM's root drive.
    pub root: bool,
    /// Where the guest mounts it; the root drive is at `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
}

/// Creates a drive.
pub enum DriveCreate {}

/// Arguments of `drive_create`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveCreateParams {
    /// Its name; default: made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What it is cloned from: anything that `from` of vm_create and image_create takes, such as `image:NAME`, `template:NAME`,
    /// `oci:IMAGE`, `rootfs:PROVIDER@VERSION`, `file:PATH` (the image is made first if it is not here), or `drive:NAME` (whose
    /// VM must not run). Default: an empty ext4 filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Its size, such as `10G`; default: 8GiB, or as large as what it is cloned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// Whether guests may not write to it (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// Only say what would be done, and change nothing: the reply has a `plan` instead of an operation (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Any key: the same key and arguments give the same drive within 24 h, not a second one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub idempotency_key: Option<String>,
}

impl Tool for DriveCreate {
    const NAME: &'static str = "drive_create";
    const TITLE: &'static str = "Create a drive";
    const DESCRIPTION: &'static str = "Creates a drive: a copy-on-write clone of an image or of another drive, or an empty \
        filesystem; use it for data that outlives a VM, then drive_attach it to one.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    const OPEN_WORLD: bool = true;
    type Params = DriveCreateParams;
    type Output = Creation<DriveDetails>;
}

/// Lists drives.
pub enum DriveList {}

/// Arguments of `drive_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveListParams {
    /// Only those of this VM: its name or id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// Only those that a VM has, or only those that none has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached: Option<bool>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `drive_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriveListOutput {
    /// The drives, by name.
    pub drives: Vec<DriveDetails>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for DriveList {
    const NAME: &'static str = "drive_list";
    const TITLE: &'static str = "List drives";
    const DESCRIPTION: &'static str = "Lists drives with their sizes and the VMs that use them; use it to find one to attach, clone or delete.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = DriveListParams;
    type Output = DriveListOutput;
}

/// Shows one drive.
pub enum DriveInspect {}

/// Arguments of `drive_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveInspectParams {
    /// The drive: its name or id.
    pub drive: Reference<DriveKind>,
}

impl Tool for DriveInspect {
    const NAME: &'static str = "drive_inspect";
    const TITLE: &'static str = "Inspect a drive";
    const DESCRIPTION: &'static str = "Shows one drive: size, disk space used, what it was cloned from and its VM; use it before \
        you resize, detach or delete one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = DriveInspectParams;
    type Output = DriveDetails;
}

/// Attaches a drive to a VM.
pub enum DriveAttach {}

/// Arguments of `drive_attach`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveAttachParams {
    /// The drive: its name or id.
    pub drive: Reference<DriveKind>,
    /// The VM: its name or id. It must not run.
    pub vm: Reference<VmKind>,
    /// Whether the VM starts from it (default: true if the VM has no drive yet).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<bool>,
    /// Where the guest mounts it, an absolute path (default `/mnt/NAME`; not for a root drive).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
    /// Only if this is the last boot of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for DriveAttach {
    const NAME: &'static str = "drive_attach";
    const TITLE: &'static str = "Attach a drive to a VM";
    const DESCRIPTION: &'static str = "Attaches a drive to a stopped VM; use it to bring data into a VM or to move it \
        from one VM to another. The guest mounts it at its next start.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = DriveAttachParams;
    type Output = DriveDetails;
}

/// Detaches a drive from its VM.
pub enum DriveDetach {}

/// Arguments of `drive_detach`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveDetachParams {
    /// The drive: its name or id. Its VM must not run.
    pub drive: Reference<DriveKind>,
    /// Only if this is the last boot of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for DriveDetach {
    const NAME: &'static str = "drive_detach";
    const TITLE: &'static str = "Detach a drive from its VM";
    const DESCRIPTION: &'static str = "Detaches a drive from a stopped VM; use it to keep a drive when its VM is deleted, or \
        to attach it elsewhere. The drive and its data stay.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = DriveDetachParams;
    type Output = DriveDetails;
}

/// Makes a drive larger.
pub enum DriveResize {}

/// Arguments of `drive_resize`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveResizeParams {
    /// The drive: its name or id.
    pub drive: Reference<DriveKind>,
    /// Its new size, such as `20G`; drives only grow.
    pub size: ByteSize,
}

/// Result of `drive_resize`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriveResizeOutput {
    /// The drive.
    pub drive: DriveDetails,
    /// Whether all of it can be used now; else the guest finds the rest at its VM's next start.
    pub in_effect: bool,
}

impl Tool for DriveResize {
    const NAME: &'static str = "drive_resize";
    const TITLE: &'static str = "Grow a drive";
    const DESCRIPTION: &'static str = "Grows a drive and the filesystem on it, also while its VM is running; use it when a guest runs out of disk space.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = DriveResizeParams;
    type Output = DriveResizeOutput;
}

/// Deletes a drive.
pub enum DriveDelete {}

/// Arguments of `drive_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveDeleteParams {
    /// The drive: its name or id. No VM may have it.
    pub drive: Reference<DriveKind>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
}

/// Result of `drive_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriveDeleteOutput {
    /// The drive's id.
    pub id: DriveId,
    /// Its name.
    pub name: Name,
}

impl Tool for DriveDelete {
    const NAME: &'static str = "drive_delete";
    const TITLE: &'static str = "Delete a drive";
    const DESCRIPTION: &'static str = "Deletes a drive and all data on it permanently; use it to free disk space on the host. Refused while a VM uses it.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = DriveDeleteParams;
    type Output = DriveDeleteOutput;
}
