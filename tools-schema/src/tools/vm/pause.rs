//! Pausing a VM, and resuming it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::VmDetails;
use crate::id::{BootId, VmKind};
use crate::name::Reference;
use crate::tool::{Effect, Tool};

/// Pauses a VM.
pub enum VmPause {}

/// Resumes a paused VM.
pub enum VmResume {}

/// Arguments of `vm_pause`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPauseParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Suspend it: its memory goes to the disk and no VMM runs; the next call wakes it. Needs `checkpoints: true` (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

/// Arguments of `vm_resume`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmResumeParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for VmPause {
    const NAME: &'static str = "vm_pause";
    const TITLE: &'static str = "Pause a VM";
    const DESCRIPTION: &'static str = "Pauses a ready VM: its processors stop, while its memory, processes and connections stay; use it to \
        free the host's processors for a while. Calls under way wait, new ones are refused with `vm_paused` until \
        vm_resume or vm_start. It stays paused when nexusd restarts. Firecracker cuts connections into the VM, not calls. `suspend` frees its memory, too.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = VmPauseParams;
    type Output = VmDetails;
}

impl Tool for VmResume {
    const NAME: &'static str = "vm_resume";
    const TITLE: &'static str = "Resume a paused VM";
    const DESCRIPTION: &'static str = "Resumes a paused VM where it stopped, or wakes a suspended one, and sets its clock; use it after vm_pause. Calls that waited go on, with \
        their deadlines extended by the pause. A VM that is ready is left alone.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = VmResumeParams;
    type Output = VmDetails;
}
