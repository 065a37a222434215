//! Checkpoints: a VM's memory and drives at one moment, to roll back to and to fork VMs from.

mod diff;

use std::collections::BTreeMap;

pub use diff::{
    ChangedPath, CheckpointDiff, CheckpointDiffOutput, CheckpointDiffParams, ComparedProcess, PathChange,
    ProcessChanges,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, CheckpointId, CheckpointKind, VmId, VmKind};
use crate::name::{Name, Reference};
use crate::size::ByteSize;
use crate::span::TimeSpan;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;
use crate::tools::vm::NetworkParams;

/// The most VMs that one `vm_fork` makes.
pub const FORKS_MAX: u32 = 16;

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointDetails {
    /// Its id.
    pub id: CheckpointId,
    /// Its name, unique among those of its VM.
    pub name: Name,
    /// The VM that it was taken of; it may be deleted since.
    pub vm_id: VmId,
    /// That VM's name when it was taken.
    pub vm_name: Name,
    /// The checkpoint that this VM came from when it was taken: checkpoints form a tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<CheckpointId>,
    /// Whether its VM goes on from it: it is the last one that was taken of it, or the one that it was rolled back to.
    pub current: bool,
    /// Who made it.
    pub owner: String,
    /// Its labels.
    pub tags: BTreeMap<String, String>,
    /// What can restore it: the driver and its version.
    pub restored_by: String,
    /// What is known to keep it from being restored on this host, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The VM's memory.
    pub memory: ByteSize,
    /// What its memory occupies on the host's disk, in bytes.
    pub memory_bytes: u64,
    /// If its memory is compressed since it was not used for a while: what it will occupy once it is used again, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpacked_bytes: Option<u64>,
    /// What its drives occupy there, in bytes; blocks shared with other drives count as well.
    pub disk_bytes: u64,
    /// Whether the guest's commands stood still and its filesystems were synced when it was taken. If not, restored VMs may run for some
    /// milliseconds with the random numbers of their parent.
    pub quiesced: bool,
    /// How long its VM stood still for it, in milliseconds.
    pub pause_ms: u64,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When it will be deleted; absent for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// Takes a checkpoint.
pub enum VmCheckpoint {}

/// Arguments of `vm_checkpoint`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCheckpointParams {
    /// The VM: its name or id. It must be ready, and made with `checkpoints: true`.
    pub vm: Reference<VmKind>,
    /// The checkpoint's name; made up when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Delete it so long from now, such as `2h` (default never).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// Only if this is the VM's boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for VmCheckpoint {
    const NAME: &'static str = "vm_checkpoint";
    const TITLE: &'static str = "Take a checkpoint of a VM";
    const DESCRIPTION: &'static str = "Saves a running VM's memory, processes and drives as they are now, while it goes on; use it before \
        something risky, then vm_rollback undoes it, or to fork prepared VMs from it with vm_fork. Only for VMs made with `checkpoints: true`.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = VmCheckpointParams;
    type Output = OpOutcome<CheckpointDetails>;
}

/// Lists checkpoints.
pub enum CheckpointList {}

/// Arguments of `checkpoint_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointListParams {
    /// Only those of this VM: its name or id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `checkpoint_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointListOutput {
    /// The checkpoints, oldest first: each comes after its parent.
    pub checkpoints: Vec<CheckpointDetails>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for CheckpointList {
    const NAME: &'static str = "checkpoint_list";
    const TITLE: &'static str = "List checkpoints";
    const DESCRIPTION: &'static str = "Lists checkpoints with their parents, their sizes on disk and what can restore them; use it to find one \
        to roll back to, to fork from or to delete.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = CheckpointListParams;
    type Output = CheckpointListOutput;
}

/// Deletes a checkpoint.
pub enum CheckpointDelete {}

/// Arguments of `checkpoint_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointDeleteParams {
    /// The checkpoint: its id, or its name if only one has it.
    pub checkpoint: Reference<CheckpointKind>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
}

/// Result of `checkpoint_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointDeleteOutput {
    /// Its id.
    pub id: CheckpointId,
    /// Its name.
    pub name: Name,
    /// What it occupied on the host's disk, in bytes.
    pub freed_bytes: u64,
}

impl Tool for CheckpointDelete {
    const NAME: &'static str = "checkpoint_delete";
    const TITLE: &'static str = "Delete a checkpoint";
    const DESCRIPTION: &'static str = "Deletes a checkpoint permanently; use it to free disk space on the host. Its VM, and VMs that were \
        forked from it, stay.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = CheckpointDeleteParams;
    type Output = CheckpointDeleteOutput;
}

/// Rolls a VM back.
pub enum VmRollback {}

/// Arguments of `vm_rollback`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmRollbackParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// A checkpoint of this VM: its name or id.
    pub checkpoint: Reference<CheckpointKind>,
    /// Keep the present as a checkpoint for an hour (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_current: Option<bool>,
    /// Only if this is the VM's boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
}

impl Tool for VmRollback {
    const NAME: &'static str = "vm_rollback";
    const TITLE: &'static str = "Roll a VM back to a checkpoint";
    const DESCRIPTION: &'static str = "Puts a VM back to one of its checkpoints: memory, processes and drives are as they were then; use it to \
        undo what went wrong. What happened since is lost, unless `keep_current` keeps it for an hour. Connections into the VM are closed.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = VmRollbackParams;
    type Output = OpOutcome<RestoreOutput>;
}

/// Forks VMs.
pub enum VmFork {}

/// Arguments of `vm_fork`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmForkParams {
    /// The VM to fork as it is now: its name or id. Give this, or `checkpoint`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// The checkpoint to fork from: its id, or its name if only one has it (or with `vm`, that VM's).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Reference<CheckpointKind>>,
    /// How many VMs to make, 1 to 16 (default 1, or as many as `names`): all of them, or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub count: Option<u32>,
    /// Their names; made up when not given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<Name>,
    /// Their labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Delete them so long from now, such as `2h` (default never).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// What they may reach (default: as the VM of the checkpoint then).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkParams>,
    /// Seconds to wait for its end (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for VmFork {
    const NAME: &'static str = "vm_fork";
    const TITLE: &'static str = "Fork VMs from a VM or a checkpoint";
    const DESCRIPTION: &'static str = "Makes VMs that go on from a checkpoint, or from a running VM as it is now: with its memory, processes \
        and drives, but with identity, addresses and random numbers of their own; use it to try several things from one prepared state. The \
        result says for each what was kept, renewed and closed, and what nobody can renew.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = VmForkParams;
    type Output = OpOutcome<RestoreOutput>;
}

/// Result of `vm_rollback` and `vm_fork`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreOutput {
    /// The VMs that go on from the checkpoint.
    pub vms: Vec<RestoredVm>,
    /// The checkpoint.
    pub from: CheckpointId,
    /// When it was taken.
    pub at: Timestamp,
    /// The checkpoint that keeps what a rollback took back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<CheckpointId>,
}

/// A VM that goes on from a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestoredVm {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Its boot: each restore has its own.
    pub boot_id: BootId,
    /// What it is to be trusted with.
    pub contract: RestoreContract,
    /// From the start of its VMM until its tools worked, in milliseconds.
    pub ready_ms: u64,
}

/// What a restore kept and renewed in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreContract {
    /// What is as at the checkpoint.
    pub kept: Vec<String>,
    /// What is new, before any command of the guest ran.
    pub renewed: Vec<String>,
    /// What ended.
    pub closed: Vec<String>,
    /// What nobody can renew: programs have to.
    pub not_renewed: Vec<String>,
    /// Whether the guest's commands stood still from the checkpoint until all was renewed.
    pub quiesced: bool,
    /// By how much the guest's clock was behind before it was set, in milliseconds.
    pub clock_behind_ms: i64,
}
