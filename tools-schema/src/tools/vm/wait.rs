//! Waiting for something about a VM, so that nobody polls.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::VmState;
use crate::id::{BootId, CommandId, VmId, VmKind};
use crate::name::{Name, Reference};
use crate::tool::{Effect, Tool};

/// Waits for a VM.
pub enum VmWait {}

/// Arguments of `vm_wait`: the VM and at most one thing to wait for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmWaitParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Until it is in this state (default: ready, if nothing else is given).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<VmState>,
    /// Until a server in it listens on this TCP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
    /// Until this absolute path exists in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Until this command in it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<CommandId>,
    /// How long this call waits, in seconds (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Only while this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

/// Result of `vm_wait`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmWaitOutput {
    /// Whether it has come to pass. While false, call again.
    pub done: bool,
    /// The VM's id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Its state now.
    pub state: VmState,
    /// Why it is in that state, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The current or last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// How long this call waited, in milliseconds.
    pub waited_ms: u64,
    /// What a shell says of the command's end, if that was waited for and is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// What is missing, while it is not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
}

impl Tool for VmWait {
    const NAME: &'static str = "vm_wait";
    const TITLE: &'static str = "Wait for a VM";
    const DESCRIPTION: &'static str = "Waits until a VM is in a state, a server in it listens on a port, a file in it exists, or a command in it has \
        ended; use it instead of asking again and again. With `done: false` it was not in time: call it again. A VM that goes down meanwhile \
        fails the call, unless a state is waited for.";
    const EFFECT: Effect = Effect::ReadOnly;
    const OPEN_WORLD: bool = true;
    type Params = VmWaitParams;
    type Output = VmWaitOutput;
}
