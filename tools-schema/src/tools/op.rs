//! Operations: long work that survives its client.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ToolError;
use crate::id::OpId;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;

/// The state of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OpState {
    /// It is running.
    Running,
    /// It succeeded.
    Succeeded,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl OpState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// Returns the state as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::str::FromStr for OpState {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(())
    }
}

/// The last step of an operation that had nothing to change.
pub const ALREADY: &str = "nothing to do";

/// The progress of an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OpProgress {
    /// What it is doing, such as `downloading kernel`.
    pub step: String,
    /// Units done in this step; bytes for transfers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<u64>,
    /// Units in all in this step, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

/// An operation in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OpSummary {
    /// Its id.
    pub op_id: OpId,
    /// The tool that started it.
    pub tool: String,
    /// Its state.
    pub state: OpState,
    /// How far it is.
    pub progress: OpProgress,
    /// The id of the thing that it makes or works on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_id: Option<String>,
    /// The name of that thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_name: Option<String>,
    /// How it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ToolError>,
    /// Who started it.
    pub owner: String,
    /// When it was started.
    pub started_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// Waits for an operation.
pub enum OpGet {}

/// Arguments of `op_get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpGetParams {
    /// The operation's id.
    pub op_id: OpId,
    /// Seconds to wait for its end (default 30, at most 45); 0 returns at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for OpGet {
    const NAME: &'static str = "op_get";
    const TITLE: &'static str = "Get an operation";
    const DESCRIPTION: &'static str = "Waits for a long operation and returns its progress, and its result once `done` is true; \
        use it after a call came back with `done: false`. Call it again until it is done.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = OpGetParams;
    type Output = OpOutcome<serde_json::Map<String, serde_json::Value>>;
}

/// Lists operations.
pub enum OpList {}

/// Arguments of `op_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpListParams {
    /// Only operations in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<OpState>,
    /// How many rows at most (default 20, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `op_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OpListOutput {
    /// The operations, newest first.
    pub ops: Vec<OpSummary>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for OpList {
    const NAME: &'static str = "op_list";
    const TITLE: &'static str = "List operations";
    const DESCRIPTION: &'static str = "Lists long operations, newest first, with state, progress and error; use it to find work that is still running.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = OpListParams;
    type Output = OpListOutput;
}

/// Cancels an operation.
pub enum OpCancel {}

/// Arguments of `op_cancel`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpCancelParams {
    /// The operation's id.
    pub op_id: OpId,
}

impl Tool for OpCancel {
    const NAME: &'static str = "op_cancel";
    const TITLE: &'static str = "Cancel an operation";
    const DESCRIPTION: &'static str = "Cancels a long operation and removes what it has made so far; use it when its result is no \
        longer wanted. An operation that has ended is left alone.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = OpCancelParams;
    type Output = OpSummary;
}
