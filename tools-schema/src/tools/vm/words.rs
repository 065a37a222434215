//! Enumerations about VMs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::driver::DriverKind;

/// The state of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its drives are being made.
    Creating,
    /// It was never started.
    Created,
    /// Its VMM was launched, and the kernel is booting.
    Starting,
    /// The kernel is running, and the agent has said hello.
    Running,
    /// The agent has applied its configuration: tools work.
    Ready,
    /// It is running, but its agent does not answer.
    Unreachable,
    /// Its processors are paused.
    Paused,
    /// It is shutting down, or falling asleep.
    Stopping,
    /// No VMM runs it: its memory is on the disk, and a call wakes it.
    Suspended,
    /// It shut down in order.
    Stopped,
    /// It ended without a shutdown.
    Crashed,
    /// It could not be created or started.
    Failed,
}

impl VmState {
    /// All states.
    pub const ALL: [Self; 12] = [
        Self::Creating,
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Ready,
        Self::Unreachable,
        Self::Paused,
        Self::Stopping,
        Self::Suspended,
        Self::Stopped,
        Self::Crashed,
        Self::Failed,
    ];

    /// Returns the state as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ready => "ready",
            Self::Unreachable => "unreachable",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Suspended => "suspended",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Failed => "failed",
        }
    }

    /// What to do next about a VM in this state: a tool of the default set that does what its state calls for, or waits for it.
    pub const fn next(self) -> NextStep {
        let (tool, force) = match self {
            Self::Creating => ("vm_inspect", false),
            Self::Created | Self::Stopped | Self::Crashed | Self::Failed => ("vm_start", false),
            // It waits until the VM is ready.
            Self::Starting | Self::Running => ("vm_start", false),
            // It wakes the VM.
            Self::Suspended => ("vm_start", false),
            // It resumes the VM.
            Self::Paused => ("vm_start", false),
            Self::Ready => ("guest_run_command", false),
            Self::Unreachable => ("vm_restart", true),
            // It waits until the VM is down.
            Self::Stopping => ("vm_stop", false),
        };
        NextStep { tool, force }
    }

    /// Returns whether a VMM process may exist in this state.
    pub const fn may_run(self) -> bool {
        match self {
            Self::Starting
            | Self::Running
            | Self::Ready
            | Self::Unreachable
            | Self::Paused
            | Self::Stopping => true,
            Self::Creating
            | Self::Created
            | Self::Suspended
            | Self::Stopped
            | Self::Crashed
            | Self::Failed => false,
        }
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for VmState {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(())
    }
}

/// What to do next about a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextStep {
    /// The tool to call with the VM as `vm`.
    pub tool: &'static str,
    /// Whether to pass `force: true`.
    pub force: bool,
}

/// What happens to a VM that was idle for as long as it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IdleAction {
    /// It is stopped.
    #[default]
    Stop,
    /// It is suspended: the next call wakes it.
    Suspend,
}

impl IdleAction {
    /// Returns the action as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Suspend => "suspend",
        }
    }
}

impl std::str::FromStr for IdleAction {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Stop, Self::Suspend].into_iter().find(|action| action.as_str() == text).ok_or(())
    }
}

/// Which VMM to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DriverChoice {
    /// Firecracker where the hardware allows it, else QEMU.
    #[default]
    Auto,
    /// Firecracker (needs hardware KVM).
    Firecracker,
    /// QEMU's microvm machine (KVM, or software emulation).
    Qemu,
}

impl DriverChoice {
    /// Returns the driver, if it is requested by name.
    pub const fn kind(self) -> Option<DriverKind> {
        match self {
            Self::Auto => None,
            Self::Firecracker => Some(DriverKind::Firecracker),
            Self::Qemu => Some(DriverKind::Qemu),
        }
    }
}
