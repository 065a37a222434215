//! The sets of tools that an endpoint offers: `/mcp?tools=work,drives`. Every offered tool costs a model tokens, so the default
//! set has only the tools for work in VMs.

use std::fmt;
use std::str::FromStr;

use crate::tool::{Effect, ToolInfo};

/// A set of related tools, or a union of such sets. Parsed from and printed as words separated by commas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Toolset(u8);

/// The tools for work in VMs, in display order: those that an agent needs first come first.
const WORK: [&str; 35] = [
    "vm_create",
    "guest_run_command",
    "guest_file_write",
    "guest_file_read",
    "guest_file_edit",
    "guest_file_search",
    "guest_file_list",
    "guest_command_start",
    "guest_command_output",
    "guest_command_input",
    "guest_command_signal",
    "guest_command_list",
    "vm_list",
    "vm_inspect",
    "vm_start",
    "vm_stop",
    "vm_restart",
    "vm_delete",
    "vm_update",
    "vm_logs",
    "guest_copy_in",
    "guest_copy_out",
    "guest_export",
    "vm_publish",
    "vm_unpublish",
    "network_inspect",
    "guest_http_request",
    "guest_os_info",
    "op_get",
    "op_list",
    "op_cancel",
    "image_list",
    "system_info",
    "guest_mcp_list",
    "guest_mcp_call",
];

/// The sets by word, with the prefixes of their tools' names; the tools in [`ALWAYS`] are in every set.
const WORDS: [(&str, Toolset, &[&str]); 6] = [
    ("work", Toolset::WORK, &WORK),
    ("images", Toolset::IMAGES, &["image_", "template_", "build_", "asset_", "kernel_", "provider_"]),
    ("drives", Toolset::DRIVES, &["drive_", "checkpoint_", "vm_checkpoint", "vm_fork", "vm_rollback"]),
    (
        "admin",
        Toolset::ADMIN,
        &["settings_", "provider_", "prune", "network_", "token_", "audit_", "events_"],
    ),
    ("all", Toolset::ALL, &[""]),
    ("read-only", Toolset::READ_ONLY, &[]),
];

/// Tools for following long operations and inspecting the host: part of every set.
const ALWAYS: [&str; 5] = ["op_get", "op_list", "op_cancel", "system_info", "vm_list"];

impl Toolset {
    /// The tools for work in VMs. The default.
    pub const WORK: Self = Self(1);
    /// Images, templates, builds, and what they are made of.
    pub const IMAGES: Self = Self(2);
    /// Drives and checkpoints.
    pub const DRIVES: Self = Self(4);
    /// Settings, providers, access, and cleanup.
    pub const ADMIN: Self = Self(8);
    /// All tools, with the schemas of their results.
    pub const ALL: Self = Self(16);
    /// Restricts the other sets to read-only tools; alone, it contains all read-only tools.
    pub const READ_ONLY: Self = Self(32);
    /// The number of sets including all unions, for tables indexed by [`Toolset::index`].
    pub const COUNT: usize = 64;

    /// All possible sets, in the order of [`Toolset::index`].
    pub fn every() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u8).map(Self)
    }

    /// A unique number for each set.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether a tool is in the set.
    pub fn offers(self, tool: &ToolInfo) -> bool {
        if self.has(Self::READ_ONLY) && tool.effect != Effect::ReadOnly {
            return false;
        }
        let is_alone = self == Self::READ_ONLY;
        is_alone
            || ALWAYS.contains(&&*tool.name)
            || WORDS.iter().any(|(_, set, names)| {
                self.has(*set) && names.iter().any(|name| is_named(&tool.name, name, *set == Self::WORK))
            })
    }

    /// Whether tools are listed with the schemas of their results. These are three quarters of the list, and no model sees them.
    pub fn shows_results(self) -> bool {
        self.has(Self::ALL)
    }

    /// Whether another set has every tool of this one.
    pub fn is_within(self, other: Self) -> bool {
        let mut tools = crate::tools::host().into_iter().chain(crate::tools::guest_on_host());
        tools.all(|tool| !self.offers(&tool) || other.offers(&tool))
    }

    /// The position of a tool in the list.
    pub fn rank(tool: &str) -> usize {
        WORK.iter().position(|name| *name == tool).unwrap_or(WORK.len())
    }

    /// The smallest set that has a tool, as a word.
    pub fn with(tool: &ToolInfo) -> &'static str {
        let named = WORDS.iter().find(|(_, set, _)| *set != Self::READ_ONLY && set.offers(tool));
        named.map_or("all", |(word, ..)| word)
    }
}

fn is_named(tool: &str, name: &str, whole: bool) -> bool {
    if whole { tool == name } else { tool.starts_with(name) }
}

impl Default for Toolset {
    fn default() -> Self {
        Self::WORK
    }
}

impl fmt::Display for Toolset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<&str> =
            WORDS.iter().filter(|(_, set, _)| self.has(*set)).map(|(word, ..)| *word).collect();
        f.write_str(&words.join(","))
    }
}

/// A word that is not a set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown set of tools `{word}`; valid: work (the default), images, drives, admin, all, read-only, or several separated by commas"
)]
pub struct UnknownToolset {
    word: String,
}

impl FromStr for Toolset {
    type Err = UnknownToolset;

    fn from_str(text: &str) -> Result<Self, UnknownToolset> {
        let mut sets = 0;
        for word in text.split(',') {
            let known = WORDS.iter().find(|(known, ..)| *known == word.trim());
            let (_, set, _) =
                known.ok_or_else(|| UnknownToolset { word: word.chars().take(40).collect() })?;
            sets |= set.0;
        }
        Ok(Self(sets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> Vec<ToolInfo> {
        let mut tools = crate::tools::host();
        tools.extend(crate::tools::guest_on_host());
        tools.sort_by(|a, b| a.name.cmp(&b.name));
        tools
    }

    #[test]
    fn sets_are_read_and_printed() {
        for (text, printed) in [
            ("work", "work"),
            ("drives,work", "work,drives"),
            ("all", "all"),
            ("read-only", "read-only"),
            ("images, read-only", "images,read-only"),
        ] {
            assert_eq!(text.parse::<Toolset>().unwrap().to_string(), printed);
        }
        for text in ["", "works", "work,", "work;drives", "ALL"] {
            let error = text.parse::<Toolset>().unwrap_err().to_string();
            assert!(error.contains("work (the default), images"), "{error}");
        }
        let longest = "work,images,drives,admin,all,read-only".parse::<Toolset>().unwrap();
        assert_eq!(longest.index() + 1, Toolset::COUNT);
    }

    #[test]
    fn a_set_is_within_those_that_have_all_its_tools() {
        let set = |words: &str| words.parse::<Toolset>().unwrap();
        for (inner, outer) in [
            ("work", "work"),
            ("work", "all"),
            ("drives", "work,drives"),
            ("work,read-only", "work"),
            ("read-only", "all"),
        ] {
            assert!(set(inner).is_within(set(outer)), "{inner} {outer}");
        }
        for (inner, outer) in
            [("all", "work"), ("work", "drives"), ("work", "work,read-only"), ("read-only", "work")]
        {
            assert!(!set(inner).is_within(set(outer)), "{inner} {outer}");
        }
    }

    #[test]
    fn each_tool_is_in_a_set_besides_all_or_is_named_here() {
        let tools = whole();
        for name in WORK.iter().chain(&ALWAYS) {
            assert!(tools.iter().any(|tool| tool.name == *name), "there is no tool {name}");
        }
        // A shell does these as well, or they are the command line's own.
        let only_in_all: Vec<&str> =
            tools.iter().filter(|tool| Toolset::with(tool) == "all").map(|tool| &*tool.name).collect();
        assert_eq!(
            only_in_all,
            [
                "guest_file_copy",
                "guest_file_delete",
                "guest_file_mkdir",
                "guest_file_move",
                "guest_file_patch",
                "guest_file_stat",
                "guest_stream_open",
                "vm_history",
                "vm_pause",
                "vm_rename",
                "vm_resume",
                "vm_wait",
            ]
        );
    }

    #[test]
    fn read_only_changes_nothing() {
        for tool in whole() {
            let is_safe = tool.effect == Effect::ReadOnly;
            assert_eq!(Toolset::READ_ONLY.offers(&tool), is_safe, "{}", tool.name);
            let drives: Toolset = "drives,read-only".parse().unwrap();
            assert!(!drives.offers(&tool) || is_safe && Toolset::DRIVES.offers(&tool), "{}", tool.name);
        }
    }
}
