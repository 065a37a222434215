//! Trees of files: copies between the host and a VM, and later changes to them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::VmKind;
use crate::name::Reference;
use crate::tool::{Effect, ResultShape, Tool};
use crate::tools::OpOutcome;

/// Why an entry of a tree was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// It matches a pattern of `exclude`.
    Excluded,
    /// It matches a `.gitignore` file of the tree.
    Ignored,
    /// It is a device, a named pipe or a socket.
    Special,
    /// It is not readable.
    Unreadable,
    /// It was deleted or became shorter during the copy; the missing rest is zeros.
    Changed,
}

/// How many were left out, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TreeSkips {
    /// Named by `exclude`; what is in a directory that was left out is not counted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub excluded: u64,
    /// Named by `.gitignore`; what is in a directory that was left out is not counted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ignored: u64,
    /// Devices, named pipes and sockets.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub special: u64,
    /// May not be read.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unreadable: u64,
    /// Went away or became shorter meanwhile.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub changed: u64,
}

impl TreeSkips {
    /// Counts one more.
    pub fn add(&mut self, why: SkipReason) {
        match why {
            SkipReason::Excluded => self.excluded += 1,
            SkipReason::Ignored => self.ignored += 1,
            SkipReason::Special => self.special += 1,
            SkipReason::Unreadable => self.unreadable += 1,
            SkipReason::Changed => self.changed += 1,
        }
    }

    /// Returns whether something is missing that should have been copied.
    pub const fn is_incomplete(&self) -> bool {
        self.unreadable > 0 || self.changed > 0
    }
}

/// Something that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SkippedEntry {
    /// Its path in the tree; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// Why.
    pub why: SkipReason,
}

/// What was copied, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TreeSummary {
    /// Files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub symlinks: u64,
    /// Further names of files with several.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hard_links: u64,
    /// Devices and named pipes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub specials: u64,
    /// Bytes of content; of a copy, without the holes of sparse files.
    pub bytes: u64,
    /// Symbolic links that name something outside of the tree; they were copied as links.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub links_out: u64,
    /// How many were left out, by reason.
    #[serde(default)]
    pub skipped: TreeSkips,
    /// The first of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_names: Vec<SkippedEntry>,
    /// The first paths that were copied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// The path that was copied last, where a copy broke off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
}

impl TreeSummary {
    /// Returns how many entries were copied.
    pub const fn entries(&self) -> u64 {
        self.files + self.directories + self.symlinks + self.hard_links + self.specials
    }
}

/// The reply of a copy: its operation, or with `dry_run` only the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CopyOutcome {
    /// The operation, unless it is a dry run.
    #[serde(flatten)]
    pub outcome: Option<OpOutcome<TreeCopied>>,
    /// What would be copied; of a dry run only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<TreeCopied>,
}

/// A copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TreeCopied {
    /// Where the copy is: on the host for `guest_copy_out`, in the VM for `guest_copy_in`.
    pub to: String,
    /// What was copied.
    #[serde(flatten)]
    pub summary: TreeSummary,
    /// Whether guest_export can tell later what changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tracked: bool,
    /// Why it cannot, where it was to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_tracked_why: Option<String>,
}

/// Copies a tree into a VM.
pub enum GuestCopyIn {}

/// Arguments of `guest_copy_in`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestCopyInParams {
    /// The VM to copy into: its name or id.
    pub vm: Reference<VmKind>,
    /// File or directory on the host, below one of `copy.roots` of system_info; a relative path is in `copy.scratch`.
    pub from: String,
    /// Absolute path of the copy in the VM; with a slash at its end: in that directory. Missing parents are made, an
    /// existing directory is added to.
    pub to: String,
    /// Who writes and owns the files in the VM: a name, a number or `uid:gid` (default: the owner of the directory that gets
    /// the copy).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Keep the owners' numbers of the host (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_owner: Option<bool>,
    /// What to leave out: patterns as in a `.gitignore` at the top of the tree, such as `node_modules/` or `*.o`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Leave out what the tree's `.gitignore` files name (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gitignore: Option<bool>,
    /// Whether files that are there may be replaced (default true); false refuses a `to` that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<bool>,
    /// Remember what was copied, so that guest_export can tell what changed since (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<bool>,
    /// Only say what would be copied (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// Seconds to wait until it is done (default 30, at most 45); 0 returns at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for GuestCopyIn {
    const NAME: &'static str = "guest_copy_in";
    const TITLE: &'static str = "Copy files from the host into the VM";
    const DESCRIPTION: &'static str = "Copies a file or a whole directory from the host into a VM; use it to bring a repository in. Modes, \
        times and links are kept. Host paths are only those below `copy.roots` of system_info. Later guest_export gives what changed as \
        a patch, guest_copy_out brings files back.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = GuestCopyInParams;
    type Output = CopyOutcome;
}

/// Copies a tree out of a VM.
pub enum GuestCopyOut {}

/// Arguments of `guest_copy_out`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestCopyOutParams {
    /// The VM to copy from: its name or id.
    pub vm: Reference<VmKind>,
    /// File or directory in the VM, an absolute path.
    pub from: String,
    /// Where the copy is to be on the host, below one of `copy.roots` of system_info; a relative path is in `copy.scratch`. With a slash at its end, in that directory. Missing parents are made.
    pub to: String,
    /// With whose rights the files are read in the VM: a name, a number or `uid:gid` (default root).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What to leave out: patterns as in a `.gitignore` at the top of the tree.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Leave out what the tree's `.gitignore` files name (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gitignore: Option<bool>,
    /// Whether files that are there may be replaced (default false: a `to` that exists is refused).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<bool>,
    /// Only say what would be copied (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// Seconds to wait until it is done (default 30, at most 45); 0 returns at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for GuestCopyOut {
    const NAME: &'static str = "guest_copy_out";
    const TITLE: &'static str = "Copy files from the VM to the host";
    const DESCRIPTION: &'static str = "Copies a file or a whole directory from a VM to the host; use it to bring results out. Host paths are \
        only those below `copy.roots` of system_info, and its `copy.scratch` is always allowed. Devices are left out.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = GuestCopyOutParams;
    type Output = CopyOutcome;
}

/// Shows what changed in a tree since it was copied in.
pub enum Export {}

/// Arguments of `export`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportParams {
    /// The tree: the path in the VM that guest_copy_in copied to.
    pub path: String,
    /// A file in the VM to write the patch to, besides; an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Bytes of the patch to show (default 32768, at most 48000); a larger one is written to a file in the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 48000))]
    pub max_bytes: Option<u64>,
}

/// The structured result of `export`; the patch is the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExportOutput {
    /// Files in the patch: changed, new and deleted.
    pub files: u64,
    /// Lines that were added.
    pub added_lines: u64,
    /// Lines that were removed.
    pub removed_lines: u64,
    /// The size of the whole patch, in bytes.
    pub patch_bytes: u64,
    /// Whether the text is the whole patch.
    pub whole: bool,
    /// The file in the VM that holds the whole patch, if it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch_file: Option<String>,
    /// Changes that are not in the patch; the first 50.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_in_patch: Vec<NotInPatch>,
    /// The number of changes that are not in the patch.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_in_patch_count: u64,
}

/// A change that cannot be shown as a difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NotInPatch {
    /// Its path in the tree.
    pub path: String,
    /// How it changed.
    pub change: TreeChange,
    /// Why it is not in the patch.
    pub why: String,
}

/// How a file differs from the copied one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TreeChange {
    /// It is new.
    Added,
    /// It was deleted.
    Deleted,
    /// Its content or mode has changed.
    Modified,
}

impl Tool for Export {
    const NAME: &'static str = "export";
    const TITLE: &'static str = "Show what changed in a tree of the VM";
    const DESCRIPTION: &'static str = "Gives what changed in a tree since guest_copy_in copied it into the VM, as a patch that `git apply` \
        takes on the host; use it to hand work over for review. git is not needed in the VM. Binary and very large files are only listed: guest_copy_out copies them.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = ExportParams;
    type Output = ExportOutput;
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}
