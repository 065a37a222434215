//! The guest's operating system.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, Tool};

/// Shows the guest's operating system.
pub enum OsInfo {}

/// Arguments of `os_info`: none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OsInfoParams {}

/// Result of `os_info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OsInfoOutput {
    /// The hostname.
    pub hostname: String,
    /// `PRETTY_NAME` of `os-release`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// `ID` of `os-release`, such as `debian`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os_id: Option<String>,
    /// `VERSION_ID` of `os-release`, such as `12`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// The kernel's release.
    pub kernel: String,
    /// The architecture, such as `x86_64`.
    pub arch: String,
    /// CPUs that are online.
    pub cpus: u32,
    /// Memory in all, in bytes.
    pub memory_total_bytes: u64,
    /// Memory that can still be used, in bytes.
    pub memory_available_bytes: u64,
    /// Size of the root filesystem, in bytes.
    pub disk_total_bytes: u64,
    /// What is free of it, in bytes.
    pub disk_available_bytes: u64,
    /// The load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Seconds since the boot.
    pub uptime_s: f64,
    /// The process that is PID 1.
    pub init: String,
    /// How far the image's own init is; absent where PID 1 is the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<SystemStatus>,
    /// How far the clock is ahead of the host's (negative: behind), in milliseconds; the host sets it right within seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_ms: Option<i64>,
    /// The shell that `run_command` uses, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// The package manager, such as `apt`, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package_manager: Option<String>,
    /// The version of the agent.
    pub agent: String,
}

/// How far the image's own init is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SystemStatus {
    /// Its state.
    pub state: SystemState,
    /// The units or services that failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}

/// The state of an init system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SystemState {
    /// It is still starting the system.
    Starting,
    /// Everything has started.
    Running,
    /// Everything has started, except for failed units.
    Degraded,
    /// It is shutting down.
    Stopping,
    /// The init does not report its state.
    Unknown,
}

impl SystemState {
    /// Returns the word for it on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Degraded => "degraded",
            Self::Stopping => "stopping",
            Self::Unknown => "unknown",
        }
    }
}

impl Tool for OsInfo {
    const NAME: &'static str = "os_info";
    const TITLE: &'static str = "Show the VM's operating system";
    const DESCRIPTION: &'static str = "Shows the VM's operating system, kernel, CPUs, memory, disk, load, shell and package manager, and how far its own init is; use it first when you do not know what a VM is.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = OsInfoParams;
    type Output = OsInfoOutput;
}
