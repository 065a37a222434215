//! The differences of two checkpoints, or of one and its VM as it is now.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{CheckpointId, CheckpointKind, VmKind};
use crate::name::Reference;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// Compares two checkpoints.
pub enum CheckpointDiff {}

/// Arguments of `checkpoint_diff`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointDiffParams {
    /// The checkpoint: its id or name.
    pub from: Reference<CheckpointKind>,
    /// The one to compare it with (default: its VM as it is now, which needs exec or lifecycle).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Reference<CheckpointKind>>,
    /// The VM whose checkpoints the names mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// Only what is at or below this absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How many files to list at most (default 200, at most 500); all are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// Also show how small text files changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub text: bool,
}

impl Tool for CheckpointDiff {
    const NAME: &'static str = "checkpoint_diff";
    const TITLE: &'static str = "Compare checkpoints";
    const DESCRIPTION: &'static str = "Says which files and processes changed between two checkpoints, or from one until now; use it to see \
        what a command did, before vm_rollback.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = CheckpointDiffParams;
    type Output = CheckpointDiffOutput;
}

/// Result of `checkpoint_diff`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointDiffOutput {
    /// The checkpoint `from`.
    pub from: CheckpointId,
    /// When it was taken.
    pub from_at: Timestamp,
    /// The checkpoint `to`; absent for the VM as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<CheckpointId>,
    /// When that was taken, or copied.
    pub to_at: Timestamp,
    /// Whether `from` is the newer one: what is shown as removed was added in between.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub backwards: bool,
    /// How many files are only in `to`.
    pub added: u64,
    /// How many are in both, and not the same.
    pub changed: u64,
    /// How many are only in `from`.
    pub removed: u64,
    /// The files, in the order of their paths; a renamed one is removed and added.
    pub files: Vec<ChangedPath>,
    /// Whether more files changed than are listed: narrow it with `path`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_cut: bool,
    /// How text files changed, as a unified diff.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<String>,
    /// Whether the diff leaves out text files.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub diff_is_cut: bool,
    /// Which processes came and went; absent if one side does not know its processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<ProcessChanges>,
    /// What was not compared, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A file that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangedPath {
    /// What happened to it.
    pub change: PathChange,
    /// Its path in the guest; bytes that are no printable text are written as `\xNN`.
    pub path: String,
    /// What it is: `file`, `directory`, `symlink`, `device`, `fifo` or `socket`; with a change of type, what it became.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its size in `from`, in bytes; only of regular files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_bytes: Option<u64>,
    /// Its size in `to`, in bytes; only of regular files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_bytes: Option<u64>,
    /// What of it changed: `type`, `content`, `target`, `device`, `mode`, `owner`, `attributes` or `time`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub what: Vec<String>,
}

/// What happened to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathChange {
    /// It is only in `to`.
    Added,
    /// It is in both.
    Changed,
    /// It is only in `from`.
    Removed,
}

/// The differences of the processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProcessChanges {
    /// Those that are only in `to`.
    pub started: Vec<ComparedProcess>,
    /// Those that are only in `from`.
    pub ended: Vec<ComparedProcess>,
    /// The memory of all processes in `from`, in KiB; shared memory counts for each.
    pub old_memory_kib: u64,
    /// The same in `to`.
    pub new_memory_kib: u64,
    /// Whether there are more processes than were compared or are listed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_cut: bool,
}

/// A process that came or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ComparedProcess {
    /// Its number in the guest.
    pub pid: u32,
    /// Its command line, or its name; shortened.
    pub command: String,
    /// Its memory, in KiB.
    pub memory_kib: u64,
}
