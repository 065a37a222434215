//! Files changed in part: by exact replacement, or by a patch.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, ResultShape, Tool};

/// Replaces text in files.
pub enum FileEdit {}

/// One replacement.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    /// Absolute path in the VM.
    pub path: String,
    /// The text to replace, exactly as it is in the file.
    pub old: String,
    /// What to put in its place.
    pub new: String,
    /// How often `old` must be there (default 1); all are replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub expect_count: Option<u64>,
    /// Replace `old` however often it is there, at least once (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replace_all: bool,
    /// The SHA-256 of the file before this call, in hexadecimal; another one is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect_sha256: Option<String>,
}

/// Arguments of `file_edit`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileEditParams {
    /// The replacements, in one file or in several, in order.
    pub edits: Vec<Edit>,
    /// Only show the diff (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A file that was changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ChangedFile {
    /// Its path.
    pub path: String,
    /// How many lines were added.
    pub added: u64,
    /// How many lines were removed.
    pub removed: u64,
    /// The SHA-256 of its new content, in hexadecimal; absent if it was deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Whether it was not there before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub created: bool,
    /// Whether it was deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// The structured result of `file_edit` and `file_patch`; the diff is the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileChangeOutput {
    /// The files.
    pub files: Vec<ChangedFile>,
    /// How many replacements were made, or hunks applied.
    pub changes: u64,
    /// Whether this was a dry run, so that nothing was written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Whether the diff is longer than what is shown.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub diff_is_cut: bool,
}

impl Tool for FileEdit {
    const NAME: &'static str = "file_edit";
    const TITLE: &'static str = "Edit files in the VM";
    const DESCRIPTION: &'static str = "Replaces exact text in files inside the VM, all edits or none; use it to change a file \
        without writing it whole. Each `old` must be there exactly once, unless `expect_count` or `replace_all` says otherwise: give \
        enough of the lines around it. Mode, owner and line endings stay. Answers with the diff.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = FileEditParams;
    type Output = FileChangeOutput;
}

/// Applies a patch.
pub enum FilePatch {}

/// Arguments of `file_patch`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FilePatchParams {
    /// The directory in the VM that the names in the patch are relative to; nothing outside of it is changed.
    pub path: String,
    /// A unified diff of one or more files, as `diff -u` and `git diff` write it.
    pub patch: String,
    /// How many leading parts of its names to leave out (default: 1 where they begin with `a/` and `b/`, else 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strip: Option<u32>,
    /// Only show the diff (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Tool for FilePatch {
    const NAME: &'static str = "file_patch";
    const TITLE: &'static str = "Patch files in the VM";
    const DESCRIPTION: &'static str = "Applies a unified diff to files inside the VM, all of it or nothing; use it for changes of \
        many places at once. Hunks may have moved, but their lines must be as the patch says. Files are created, deleted and renamed too.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = FilePatchParams;
    type Output = FileChangeOutput;
}
