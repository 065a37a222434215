//! Searches for text in files.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, ResultShape, Tool};

/// Searches files.
pub enum FileSearch {}

/// The form of the matches in the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SearchShow {
    /// The matching lines, with their numbers.
    #[default]
    Lines,
    /// Only the names of the files.
    Files,
    /// The names of the files, and how many lines match in each.
    Counts,
}

/// Arguments of `file_search`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSearchParams {
    /// Absolute path of a directory or a file in the VM.
    pub path: String,
    /// A regular expression (Rust's syntax, as in ripgrep), for one line.
    pub pattern: String,
    /// Take `pattern` as plain text (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub literal: bool,
    /// Take upper and lower case for the same (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_case: bool,
    /// Only files that match one of these: `*.rs`, `src/**`; with `!` before it, files to leave out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub globs: Vec<String>,
    /// How many lines to show before and after each (default 0, at most 20).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 20))]
    pub context: Option<u32>,
    /// What to show (default lines).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show: Option<SearchShow>,
    /// How many lines or files to show (default 100, at most 1000); all are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub limit: Option<u32>,
    /// Search hidden files and those of `.gitignore` too (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
    /// Act as this user: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The structured result of `file_search`; the matches are the text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileSearchOutput {
    /// The number of matching lines; if only files are shown, of matching files.
    pub matches: u64,
    /// The number of files with matches.
    pub files: u64,
    /// How many files were searched.
    pub searched: u64,
    /// The number of lines or files that are shown: the first by path.
    pub shown: u64,
    /// How many symbolic links were not followed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub links: u64,
    /// How many files and directories could not be read.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unreadable: u64,
    /// Whether the search reached its timeout before it was complete.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Tool for FileSearch {
    const NAME: &'static str = "file_search";
    const TITLE: &'static str = "Search files in the VM";
    const DESCRIPTION: &'static str = "Searches files inside the VM for lines that match a regular expression, as ripgrep does; use it \
        instead of `grep -r`. Leaves out binary and hidden files and what `.gitignore` names, unless `all`. The first lines by path are \
        shown, all are counted.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = FileSearchParams;
    type Output = FileSearchOutput;
}
