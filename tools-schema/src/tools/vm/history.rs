//! What happened to a VM.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::VmState;
use crate::id::{BootId, VmId, VmKind};
use crate::name::Reference;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// Shows the state changes of a VM.
pub enum VmHistory {}

/// Arguments of `vm_history`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmHistoryParams {
    /// The VM: its name or id. Both also work after the VM was deleted; the name then means the last VM that had it.
    pub vm: Reference<VmKind>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// One change of state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmTransition {
    /// The state before; absent for the creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<VmState>,
    /// The state after; absent for the deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<VmState>,
    /// Why.
    pub reason: String,
    /// When.
    pub at: Timestamp,
    /// Who asked for it, or `nexusd`.
    pub who: String,
    /// The boot that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
}

/// Result of `vm_history`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmHistoryOutput {
    /// The VM's id.
    pub id: VmId,
    /// The changes, newest first.
    pub transitions: Vec<VmTransition>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for VmHistory {
    const NAME: &'static str = "vm_history";
    const TITLE: &'static str = "Show a VM's history";
    const DESCRIPTION: &'static str = "Shows every change of a VM's state, newest first: from, to, why, when and who; use it to \
        find out what happened to a VM, also after it was deleted.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = VmHistoryParams;
    type Output = VmHistoryOutput;
}
