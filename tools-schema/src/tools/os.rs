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
    /// The shell that `run_command` uses, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// The package manager, such as `apt`, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package_manager: Option<String>,
    /// The version of the agent.
    pub agent: String,
}

impl Tool for OsInfo {
    const NAME: &'static str = "os_info";
    const TITLE: &'static str = "Show the VM's operating system";
    const DESCRIPTION: &'static str = "Shows the VM's operating system, kernel, CPUs, memory, disk, load, shell and package \
        manager; use it first when you do not know what a VM is.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = OsInfoParams;
    type Output = OsInfoOutput;
}
