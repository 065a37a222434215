//! Starting a VM anew.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::VmDetails;
use crate::id::{BootId, VmKind};
use crate::name::Reference;
use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;

/// Shuts a VM down and starts it.
pub enum VmRestart {}

/// Arguments of `vm_restart`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmRestartParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Cut its power instead (default false). Unwritten data is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// Seconds to wait until it is ready (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for VmRestart {
    const NAME: &'static str = "vm_restart";
    const TITLE: &'static str = "Restart a VM";
    const DESCRIPTION: &'static str = "Shuts a VM down and starts it again; use it when a VM is unreachable (with `force`) or needs a boot. \
        Commands end, the disk stays.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = VmRestartParams;
    type Output = OpOutcome<VmDetails>;
}
