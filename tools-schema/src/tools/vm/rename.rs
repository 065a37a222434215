//! Another name for a VM.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::VmDetails;
use crate::id::{BootId, VmKind};
use crate::name::{Name, Reference};
use crate::tool::{Effect, Tool};

/// Renames a VM.
pub enum VmRename {}

/// Arguments of `vm_rename`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmRenameParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Its new name.
    pub name: Name,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for VmRename {
    const NAME: &'static str = "vm_rename";
    const TITLE: &'static str = "Rename a VM";
    const DESCRIPTION: &'static str = "Gives a VM another name, running or not; use it to free a name or to say what a VM is for. Its id, \
        commands, streams and published ports stay. A hostname that is the old name changes too, at once if the VM is ready, \
        else with its next start.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = VmRenameParams;
    type Output = VmDetails;
}
