//! Streams that carry a tree of files.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tools::tree::TreeSummary;

/// A tree to unpack in the guest. Data is a tar stream, then `end`; the guest answers with [`super::Done`]. If the host disconnects earlier, the copy
/// is aborted: each file is either complete or unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeInOpening {
    /// The directory to unpack in, an absolute path.
    pub directory: String,
    /// The name of the tree there: the only name that entries may have at the top. Empty if the tree is the directory itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub top: String,
    /// Create the directory and its parents if they are missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub make: bool,
    /// Refuse a tree that already exists.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
    /// The owner of the files, whose rights are used for writing: a name, a number or `uid:gid`. If absent, root writes, and the files get the owner
    /// of the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The kind of the copied tree, if `directory` is the destination of a copy as in `cp` and `docker cp`: an existing directory is copied into, and
    /// the tree keeps its name from the stream; otherwise the tree gets the last name of `directory`. `top`, `make`, `fresh` and `track` are ignored
    /// then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrival: Option<TreeArrival>,
    /// The files belong to the user who writes them, even without `user`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
    /// Give the files the owners in the stream.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub same_owner: bool,
    /// Also create devices and named pipes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub specials: bool,
    /// Record the copied files, so that the tool `export` can find what changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<TreeTrack>,
    /// With the arrival of a file: if the copy is interrupted, keep the part that arrived, so that it can be resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<TreeResume>,
}

/// A copy of one file that can be resumed. The part that arrived is `.NAME.nexus-part` beside the destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeResume {
    /// The name that the file has in the stream.
    pub name: String,
    /// Keep this many bytes of the part; the stream holds the rest. Absent: nothing is copied, and the answer describes the part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
}

/// The beginning of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreePart {
    /// How many bytes.
    pub bytes: u64,
    /// Their SHA-256, in hexadecimal digits.
    pub sha256: String,
}

/// What is copied to a destination. In the stream it always has one name at the top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TreeArrival {
    /// A file, or a link.
    File,
    /// A directory.
    Directory,
    /// The contents of a directory (`SRC/.`).
    Contents,
}

/// What to record about a tree besides its files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeTrack {
    /// The patterns of what was left out, as in `.gitignore`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

/// A tree to pack in the guest. Data is a tar stream, then `end` and [`super::Done`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeOutOpening {
    /// What to pack, an absolute path.
    pub path: String,
    /// Follow a link at the end of the path.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub follow: bool,
    /// The name of the tree in the stream; if empty, names start with the tree's contents.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub top: String,
    /// The user whose rights are used for reading: a name, a number or `uid:gid`; absent for root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The patterns of what to leave out, as in `.gitignore`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Leave out what the tree's `.gitignore` files name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gitignore: bool,
    /// Also pack devices and named pipes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub specials: bool,
    /// Only report what would be packed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plan: bool,
    /// The host has this part of the one file that is to be packed: if the file still starts so, the stream holds only the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<TreePart>,
}

/// How the stream of a tree ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeEnded {
    /// What was copied.
    pub summary: TreeSummary,
    /// Whether it was recorded for `export`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tracked: bool,
    /// Why it was not recorded, if it should have been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_tracked_why: Option<String>,
    /// The part of an interrupted copy, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<TreePart>,
}
