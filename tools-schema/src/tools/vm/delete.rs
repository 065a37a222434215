//! The end of VMs.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ToolError;
use crate::id::{BootId, VmId, VmKind};
use crate::name::{Name, Reference};
use crate::tool::{Effect, Tool};

/// Deletes VMs.
pub enum VmDelete {}

/// Arguments of `vm_delete`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDeleteParams {
    /// The VM: its name or id. Or give tags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// Instead of vm: all VMs that have all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Delete it even if it runs: its power is cut first (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
}

/// Result of `vm_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmDeleteOutput {
    /// Always true: a deletion is over when the call returns, and there is no operation to ask for.
    pub done: bool,
    /// The VMs that are gone.
    pub deleted: Vec<DeletedVm>,
    /// With tags: the VMs that could not be deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<UndeletedVm>,
}

/// A VM that is gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeletedVm {
    /// Its id.
    pub id: VmId,
    /// Its name, which is free again.
    pub name: Name,
    /// The drives that were deleted with it.
    pub drives: Vec<Name>,
}

/// A VM that could not be deleted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct UndeletedVm {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Why.
    pub error: ToolError,
}

impl Tool for VmDelete {
    const NAME: &'static str = "vm_delete";
    const TITLE: &'static str = "Delete VMs";
    const DESCRIPTION: &'static str = "Deletes a VM, or all VMs with some labels, with the drives that were made for them; use it when \
        nothing on their disks is needed any more. A running VM is refused unless `force` is true, a protected one always. This cannot be \
        undone.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = VmDeleteParams;
    type Output = VmDeleteOutput;
}
