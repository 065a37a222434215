//! Creates directories, copies files and moves them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, Tool};

/// Makes a directory.
pub enum FileMkdir {}

/// Arguments of `file_mkdir`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileMkdirParams {
    /// Absolute path in the VM.
    pub path: String,
    /// Make missing parents, and take a directory that is there already (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parents: Option<bool>,
    /// The permission bits in octal (default `0755`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^(0o)?[0-7]{1,5}$"))]
    pub mode: Option<String>,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Result of `file_mkdir`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileMkdirOutput {
    /// The directory's path.
    pub path: String,
    /// Whether it was not there before.
    pub created: bool,
}

impl Tool for FileMkdir {
    const NAME: &'static str = "file_mkdir";
    const TITLE: &'static str = "Make a directory in the VM";
    const DESCRIPTION: &'static str = "Makes a directory inside the VM; use it for empty ones, since `file_write` makes the parents of a file itself.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = FileMkdirParams;
    type Output = FileMkdirOutput;
}

/// Moves or renames a file.
pub enum FileMove {}

/// Arguments of `file_move`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileMoveParams {
    /// Absolute path of a file or a directory in the VM. A symbolic link is moved itself.
    pub from: String,
    /// The new path, with the new name.
    pub to: String,
    /// Replace a file that is there (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<bool>,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Result of `file_move`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileMoveOutput {
    /// Where it was.
    pub from: String,
    /// Where it is.
    pub to: String,
    /// Whether it had to be copied, because these are two filesystems.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub copied: bool,
}

impl Tool for FileMove {
    const NAME: &'static str = "file_move";
    const TITLE: &'static str = "Move a file in the VM";
    const DESCRIPTION: &'static str = "Moves or renames a file or a whole directory inside the VM; use it instead of `mv`. \
        Missing parents of `to` are made; what is at `to` is replaced only with `overwrite`.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = FileMoveParams;
    type Output = FileMoveOutput;
}

/// Copies a file or a tree.
pub enum FileCopy {}

/// Arguments of `file_copy`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileCopyParams {
    /// Absolute path of a file or a directory in the VM. Symbolic links are copied as links.
    pub from: String,
    /// The path of the copy, with its name.
    pub to: String,
    /// Copy a directory with all that is in it (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recursive: Option<bool>,
    /// Replace a file that is there (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<bool>,
    /// Act as this user, who then owns the copy: a name, a uid, `uid:gid`, or `image` for the image's user (default root, who
    /// keeps the owners).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Result of `file_copy`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileCopyOutput {
    /// What was copied.
    pub from: String,
    /// The copy.
    pub to: String,
    /// How many regular files were copied.
    pub files: u64,
    /// How many directories were made.
    pub directories: u64,
    /// How many symbolic links were copied as links.
    pub links: u64,
    /// How many devices, pipes, sockets and mounted filesystems were left out.
    pub skipped: u64,
    /// How many bytes the copied files hold.
    pub bytes: u64,
}

impl Tool for FileCopy {
    const NAME: &'static str = "file_copy";
    const TITLE: &'static str = "Copy a file in the VM";
    const DESCRIPTION: &'static str = "Copies a file, or with `recursive` a directory, inside the VM; use it instead of `cp -a`. Modes, \
        times and attributes are kept, links stay links, and the copy is there whole or not at all. Missing parents of `to` are made.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = FileCopyParams;
    type Output = FileCopyOutput;
}
