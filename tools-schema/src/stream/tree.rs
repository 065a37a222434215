//! Streams that carry a tree of files.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tools::tree::TreeSummary;

/// A tree to unpack in the guest. Data is a tar stream, then `end`; the guest answers with [`super::Done`]. If the host hangs up
/// before, the copy is broken off: each file is whole or as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeInOpening {
    /// The directory to unpack in, an absolute path.
    pub directory: String,
    /// The name of the tree there: the only one that entries may have at the top. Empty if the tree is the directory itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub top: String,
    /// Make the directory and its parents where they are missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub make: bool,
    /// Refuse a tree that is there already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
    /// Whose the files are, and by whose rights they are written: a name, a number or `uid:gid`. Absent: root writes, and the files
    /// belong to the owner of the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// How `directory` is meant as the destination of a copy, as `cp` and `docker cp` mean it, and what comes: a directory that is
    /// there is copied into, and the tree keeps the name that it has in the stream; else it gets the name that `directory` ends with.
    /// `top`, `make`, `fresh` and `track` say nothing then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrival: Option<TreeArrival>,
    /// The files belong to whoever writes them, also without `user`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
    /// Give the files to the owners that the stream says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub same_owner: bool,
    /// Make devices and named pipes, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub specials: bool,
    /// Remember what came, so that the tool `export` can tell what changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<TreeTrack>,
    /// With the arrival of a file: if the copy is interrupted, keep what came, and go on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<TreeResume>,
}

/// A copy of one file that a later one goes on with. What came of it is in `.NAME.nexus-part` beside its destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeResume {
    /// The name that the file has in the stream.
    pub name: String,
    /// Keep this many bytes of what came before; the stream holds the rest. Absent: nothing is copied, and the answer says what is there.
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

/// What comes to the destination of a copy. In the stream it has one name at the top in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TreeArrival {
    /// A file, or a link.
    File,
    /// A directory.
    Directory,
    /// What is in a directory (`SRC/.`).
    Contents,
}

/// What is to be remembered of a tree besides its files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeTrack {
    /// What was left out of it: patterns as in `.gitignore`.
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
    /// The name of the tree in the stream; empty if names start with what is in it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub top: String,
    /// By whose rights it is read: a name, a number or `uid:gid`; absent for root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What is left out: patterns as in `.gitignore`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Leave out what the tree's `.gitignore` files name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gitignore: bool,
    /// Pack devices and named pipes, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub specials: bool,
    /// Only say what would be packed.
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
    /// Whether it is remembered for `export`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tracked: bool,
    /// Why it is not, where it was to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_tracked_why: Option<String>,
    /// What is there of an interrupted copy, where that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<TreePart>,
}
