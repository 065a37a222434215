//! Files in the guest: read, written, listed and deleted here, changed in part in [`change`], created, copied and moved in [`places`], and searched
//! in [`search`].

mod change;
mod places;
mod search;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use change::{ChangedFile, Edit, FileChangeOutput, FileEdit, FileEditParams, FilePatch, FilePatchParams};
pub use places::{
    FileCopy, FileCopyOutput, FileCopyParams, FileMkdir, FileMkdirOutput, FileMkdirParams, FileMove,
    FileMoveOutput, FileMoveParams,
};
pub use search::{FileSearch, FileSearchOutput, FileSearchParams, SearchShow};

use crate::time::Timestamp;
use crate::tool::{Effect, ResultShape, Tool};
use crate::tools::ContentEncoding;

/// The type of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharDevice,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

/// A file and its attributes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileEntry {
    /// Its path: absolute in `file_stat`, relative to the listed directory in `file_list`. Bytes that are not UTF-8 are replaced.
    pub path: String,
    /// What it is (a link itself, not what it points to).
    #[serde(rename = "type")]
    pub kind: FileType,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The permission bits in octal, such as `0644`.
    pub mode: String,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// When its content last changed.
    pub modified_at: Timestamp,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Whether `path` or `target` is not exact because it is not UTF-8.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
    /// The bytes of `path` in base64, where it is not UTF-8. The tools take a path as `base64:` and all its bytes so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
}

/// Reads a file.
pub enum FileRead {}

/// Arguments of `file_read`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileReadParams {
    /// Absolute path in the VM.
    pub path: String,
    /// Where to start, in bytes (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// How many bytes at most (default 32768; at most 48000 as text, 720896 as base64).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 720_896))]
    pub limit: Option<u64>,
    /// How the content is shown (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// Read by lines instead of bytes: the number of the first, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub from_line: Option<u64>,
    /// How many lines at most, within `limit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub lines: Option<u64>,
    /// Put each line's number before it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub numbered: bool,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The structured result of `file_read`; the content is the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileReadOutput {
    /// The file's size in bytes.
    pub size_bytes: u64,
    /// The offset of the content in the file.
    pub offset: u64,
    /// The number of bytes that were read.
    pub read_bytes: u64,
    /// Whether the end of the file was reached.
    pub eof: bool,
    /// Whether bytes that are not UTF-8 were replaced.
    pub lossy: bool,
    /// The number of the first line, if the file was read by lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_line: Option<u64>,
    /// The number of lines, if the file was read by lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<u64>,
}

impl Tool for FileRead {
    const NAME: &'static str = "file_read";
    const TITLE: &'static str = "Read a file in the VM";
    const DESCRIPTION: &'static str = "Reads a file inside the VM, whole, from `offset` for `limit` bytes, or by lines \
        (`from_line`, `lines`, `numbered`); use it to look at a file without a command. Text by default; `encoding: \"base64\"` gives the exact bytes.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = FileReadParams;
    type Output = FileReadOutput;
}

/// Writes a file.
pub enum FileWrite {}

/// Parses permission bits in octal, such as `0644` or `0o755`; `None` if they are invalid.
pub fn parse_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let is_digits = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    let mode = is_digits.then(|| u32::from_str_radix(digits, 8).ok())?;
    mode.filter(|mode| *mode <= 0o7777)
}

/// Arguments of `file_write`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileWriteParams {
    /// Absolute path in the VM.
    pub path: String,
    /// The content, at most 2 MiB.
    pub content: String,
    /// How `content` is encoded (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// The permission bits in octal, such as `0755`; default: those of the file it replaces, else `0644`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^(0o)?[0-7]{1,5}$"))]
    pub mode: Option<String>,
    /// Make missing parent directories (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_parents: Option<bool>,
    /// Add to the end instead of replacing (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<bool>,
    /// For files larger than one call: an id of your choice. `content` is one piece of the file, which gets its place with `commit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_id: Option<String>,
    /// Where the piece belongs, in bytes (default: behind those before it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// This piece is the last: put the file in its place (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub commit: bool,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Result of `file_write`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileWriteOutput {
    /// The file's path.
    pub path: String,
    /// How many bytes were written.
    pub written_bytes: u64,
    /// The file's size now, in bytes.
    pub size_bytes: u64,
    /// Whether the file was not there before.
    pub created: bool,
    /// Whether it is not in its place yet, because `commit` is to come; `size_bytes` is what came so far.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending: bool,
}

impl Tool for FileWrite {
    const NAME: &'static str = "file_write";
    const TITLE: &'static str = "Write a file in the VM";
    const DESCRIPTION: &'static str = "Writes a file inside the VM in one step, never half; use it to create or replace files, or with `append` to add to one. Missing parent directories are made. \
        `encoding: \"base64\"` for binary content, `upload_id` for files up to 1 GiB in pieces.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = FileWriteParams;
    type Output = FileWriteOutput;
}

/// Deletes a file.
pub enum FileDelete {}

/// Arguments of `file_delete`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileDeleteParams {
    /// Absolute path in the VM. A symbolic link itself is deleted, not what it points to.
    pub path: String,
    /// Delete a directory with all that is in it (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recursive: Option<bool>,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Result of `file_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileDeleteOutput {
    /// The path that is gone.
    pub path: String,
    /// How many files and directories were deleted.
    pub deleted: u64,
}

impl Tool for FileDelete {
    const NAME: &'static str = "file_delete";
    const TITLE: &'static str = "Delete a file in the VM";
    const DESCRIPTION: &'static str = "Deletes a file or an empty directory inside the VM, or with `recursive` a whole tree; use \
        it to clean up. Mount points and the root directory are refused.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = FileDeleteParams;
    type Output = FileDeleteOutput;
}

/// Lists a directory.
pub enum FileList {}

/// Arguments of `file_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileListParams {
    /// Absolute path of a directory in the VM.
    pub path: String,
    /// How deep to look: 1 is the directory itself (default 1, at most 16).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub depth: Option<u32>,
    /// List the whole tree, up to 100 levels deep (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recursive: bool,
    /// List only what matches: `*.rs` by name at any depth, `src/**/*.{c,h}` by path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub glob: Option<String>,
    /// Names only, as an indented tree, 2000 at once (default true; false with the tools `all`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compact: bool,
    /// How many entries at most (default 200, compact 2000; at most 2000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2000))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Result of `file_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileListOutput {
    /// The directory.
    pub path: String,
    /// What is in it, by path; empty where it is compact.
    pub entries: Vec<FileEntry>,
    /// The same compactly: a name a line, indented by its depth, `/` behind directories, ` -> ` and where they point behind links.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<String>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for FileList {
    const NAME: &'static str = "file_list";
    const TITLE: &'static str = "List a directory in the VM";
    const DESCRIPTION: &'static str = "Lists a directory inside the VM, sorted by path; use it to find your way \
        around. `recursive` shows the whole tree, `compact: false` types, sizes, modes and owners too, `glob` finds files by name. Links are shown and not followed.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = FileListParams;
    type Output = FileListOutput;
}

/// Shows one file's attributes.
pub enum FileStat {}

/// Arguments of `file_stat`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileStatParams {
    /// Absolute path in the VM.
    pub path: String,
    /// Show what a symbolic link points to instead of the link (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follow: Option<bool>,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Tool for FileStat {
    const NAME: &'static str = "file_stat";
    const TITLE: &'static str = "Stat a file in the VM";
    const DESCRIPTION: &'static str = "Shows type, size, mode, owner and time of one file inside the VM; use it to check that a file exists before you touch it.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = FileStatParams;
    type Output = FileEntry;
}
