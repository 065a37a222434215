//! Who may do what: the scopes of access tokens, and the scope that each tool needs.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A right of an access token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Look, and change nothing. Every token has it.
    Read,
    /// Work inside VMs: commands, files, streams.
    Exec,
    /// Create, start, stop, change and delete VMs and drives.
    Lifecycle,
    /// Make and delete images, templates, builds and assets.
    Images,
    /// Publish ports, and open what VMs may reach.
    Network,
    /// Settings, providers, prune, the audit log, and the VMs and tokens of all callers.
    Admin,
    /// Do what cannot be undone without a confirmation.
    WaiveConfirmation,
}

impl Scope {
    /// All scopes.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Exec,
        Self::Lifecycle,
        Self::Images,
        Self::Network,
        Self::Admin,
        Self::WaiveConfirmation,
    ];

    /// The scope as it is on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Exec => "exec",
            Self::Lifecycle => "lifecycle",
            Self::Images => "images",
            Self::Network => "network",
            Self::Admin => "admin",
            Self::WaiveConfirmation => "waive_confirmation",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A word that is not a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown scope `{word}`; valid: read, exec, lifecycle, images, network, admin, waive_confirmation")]
pub struct UnknownScope {
    word: String,
}

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(word: &str) -> Result<Self, UnknownScope> {
        let plain = word.trim().replace('-', "_");
        let known = Self::ALL.into_iter().find(|scope| scope.as_str() == plain);
        known.ok_or_else(|| UnknownScope { word: word.chars().take(40).collect() })
    }
}

/// A set of scopes. [`Scope::Read`] is in every set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// All scopes.
    pub const ALL: Self = Self(0x7f);

    /// Whether a scope is in the set.
    pub const fn has(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }

    /// Whether all scopes of this set are in another.
    pub const fn is_within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// The scopes that are in this set and not in another.
    pub fn beyond(self, other: Self) -> impl Iterator<Item = Scope> {
        self.iter().filter(move |scope| !other.has(*scope))
    }

    /// The scopes in both sets.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The scopes in the set.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.has(*scope))
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(Scope::Read.bit(), |set, scope| set | scope.bit()))
    }
}

impl Serialize for Scopes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for Scopes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<Scope>::deserialize(deserializer).map(|scopes| scopes.into_iter().collect())
    }
}

/// The tools that need more than [`Scope::Read`], by the scope that they need. All others need that one.
const NEEDS: [(Scope, &[&str]); 5] = [
    (
        Scope::Exec,
        &[
            "guest_command_input",
            "guest_command_signal",
            "guest_command_start",
            "guest_copy_in",
            "guest_copy_out",
            "guest_export",
            "guest_file_copy",
            "guest_file_delete",
            "guest_file_edit",
            "guest_file_mkdir",
            "guest_file_move",
            "guest_file_patch",
            "guest_file_write",
            "guest_http_request",
            "guest_mcp_call",
            "guest_mcp_list",
            "guest_run_command",
            "guest_stream_open",
        ],
    ),
    (
        Scope::Lifecycle,
        &[
            "checkpoint_delete",
            "drive_attach",
            "drive_create",
            "drive_delete",
            "drive_detach",
            "drive_resize",
            "vm_checkpoint",
            "vm_create",
            "vm_delete",
            "vm_fork",
            "vm_pause",
            "vm_rename",
            "vm_restart",
            "vm_resume",
            "vm_rollback",
            "vm_start",
            "vm_stop",
            "vm_update",
        ],
    ),
    (
        Scope::Images,
        &[
            "asset_download",
            "asset_remove",
            "asset_verify",
            "build_start",
            "image_create",
            "image_delete",
            "image_push",
            "image_save",
            "template_create",
            "template_delete",
            "template_update",
        ],
    ),
    (Scope::Network, &["vm_publish", "vm_unpublish"]),
    (
        Scope::Admin,
        &[
            "audit_list",
            "kernel_build",
            "kernel_publish",
            "network_cleanup",
            "network_firewall",
            "provider_inspect",
            "provider_remove",
            "provider_set",
            "prune",
            "settings_history",
            "settings_rollback",
            "settings_set",
        ],
    ),
];

/// The tools that need [`Scope::Read`] only: those that change nothing, and those that concern nothing but the caller's own work.
const READ: &[&str] = &[
    "vm_wait",
    "asset_inspect",
    "asset_list",
    "build_inspect",
    "build_list",
    "build_logs",
    "checkpoint_diff",
    "checkpoint_list",
    "drive_inspect",
    "drive_list",
    "events_wait",
    "guest_command_list",
    "guest_command_output",
    "guest_file_list",
    "guest_file_read",
    "guest_file_search",
    "guest_file_stat",
    "guest_os_info",
    "image_inspect",
    "image_list",
    "network_inspect",
    "network_log",
    "op_cancel",
    "op_get",
    "op_list",
    "provider_list",
    "settings_get",
    "system_info",
    "template_inspect",
    "template_list",
    "token_create",
    "token_list",
    "token_revoke",
    "vm_history",
    "vm_inspect",
    "vm_list",
    "vm_logs",
];

/// The scope that a tool needs, by its name on the host's endpoint. A tool that is in no table needs [`Scope::Admin`]; a test
/// keeps the tables whole.
pub fn scope_of(tool: &str) -> Scope {
    let rows = NEEDS.iter().chain([&(Scope::Read, READ)]);
    let found = rows.into_iter().find(|(_, tools)| tools.contains(&tool));
    found.map_or(Scope::Admin, |(scope, _)| *scope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tool::Effect;
    use crate::tools;

    #[test]
    fn every_tool_needs_exactly_one_scope() {
        let all: Vec<_> = tools::host().into_iter().chain(tools::guest_on_host()).collect();
        let rows: Vec<&str> = NEEDS.iter().flat_map(|(_, tools)| *tools).chain(READ).copied().collect();
        for tool in &all {
            let count = rows.iter().filter(|row| **row == tool.name).count();
            assert_eq!(count, 1, "{} is {count} times in the tables of access.rs", tool.name);
        }
        for row in &rows {
            assert!(all.iter().any(|tool| tool.name == *row), "there is no tool {row}");
        }
        assert_eq!(scope_of("no_such_tool"), Scope::Admin);
        // What changes something and needs no more than to read concerns only what is the caller's own.
        let own: Vec<_> = all
            .iter()
            .filter(|tool| scope_of(&tool.name) == Scope::Read && tool.effect != Effect::ReadOnly)
            .map(|tool| tool.name.as_str())
            .collect();
        assert_eq!(own, ["op_cancel", "token_create", "token_revoke"]);
    }

    #[test]
    fn sets_of_scopes_compare_and_parse() {
        let set: Scopes = [Scope::Exec].into_iter().collect();
        assert!(set.has(Scope::Read) && !set.has(Scope::Admin) && set.is_within(Scopes::ALL));
        assert!(!Scopes::ALL.is_within(set));
        assert_eq!(Scopes::ALL.beyond(set).count(), 5);
        assert_eq!(serde_json::to_string(&set).unwrap(), r#"["read","exec"]"#);
        assert_eq!(serde_json::from_str::<Scopes>(r#"["exec"]"#).unwrap(), set);
        assert_eq!(Scope::ALL.into_iter().collect::<Scopes>(), Scopes::ALL);
        assert_eq!("waive-confirmation".parse(), Ok(Scope::WaiveConfirmation));
        assert!("root".parse::<Scope>().unwrap_err().to_string().contains("unknown scope `root`"));
    }
}
