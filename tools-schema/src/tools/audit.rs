//! The audit log: every call that was allowed or denied.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, VmId, VmKind};
use crate::name::Reference;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// A call, as it is in the log: who, what and how it ended, and nothing of what it contained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// Its number.
    pub seq: u64,
    /// When it started.
    pub at: Timestamp,
    /// Who called: `uid:N`, `token:` and an id, or `unknown`.
    pub caller: String,
    /// The tool, or `stream` for an open stream, or `connect` for a refused request.
    pub tool: String,
    /// The VM that it was about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// The boot that answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// `ok`, or the error's code.
    pub outcome: String,
    /// What allowed or denied it: `owner` for the daemon's user, a scope, or why it was denied.
    pub rule: String,
    /// The trace that it belongs to: `traceparent` of its `_meta`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Bytes of its arguments, or to the guest.
    pub bytes_in: u64,
    /// Bytes of its result, or from the guest.
    pub bytes_out: u64,
}

/// Lists calls.
pub enum AuditList {}

/// Arguments of `audit_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditListParams {
    /// Only calls about this VM; the id of a deleted one, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// Only calls of this caller, such as `uid:0` or `token:` and an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    /// Only calls of this tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// Only calls that ended so: `ok`, an error's code, or `denied` for those that were not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Only calls that started at this time or later (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Only calls that started before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Only calls after this number, oldest first: `last` of an earlier reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// With after: how long to wait for a call if there is none, in seconds (default 0, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `audit_list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditListOutput {
    /// The calls, newest first; with `after` oldest first.
    pub calls: Vec<AuditEntry>,
    /// The number of the newest call in the log that this reply took into account: `after` of the next call.
    pub last: u64,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for AuditList {
    const NAME: &'static str = "audit_list";
    const TITLE: &'static str = "List calls";
    const DESCRIPTION: &'static str = "Lists calls, newest first: who called which tool for which VM, and whether it was allowed; use it to find out who \
        did what. It never shows arguments or results. A call is listed within a fraction of a second.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = AuditListParams;
    type Output = AuditListOutput;
}
