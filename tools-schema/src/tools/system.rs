//! The host: health, versions, capabilities.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::InstanceId;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// Shows the state of Nexus and its host.
pub enum SystemInfo {}

/// Arguments of `system_info`: none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SystemInfoParams {}

/// Result of `system_info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SystemInfoOutput {
    /// The daemon's version.
    pub version: String,
    /// The id of this installation.
    pub instance: InstanceId,
    /// When the daemon was started.
    pub started_at: Timestamp,
    /// The daemon's process id.
    pub pid: u32,
    /// The state directory.
    pub state_directory: String,
    /// The guest protocol generation.
    pub guest_protocol: u32,
    /// The version of the store's schema.
    pub schema_version: u32,
    /// VMs by state.
    pub vms: std::collections::BTreeMap<String, u64>,
    /// Operations under way.
    pub ops_running: u64,
    /// Bytes free where the state directory is.
    pub disk_free_bytes: u64,
    /// What takes how much room in the state directory.
    #[serde(default)]
    pub disk: Vec<DiskUse>,
    /// Where guest_copy_in and guest_copy_out may read and write on the host.
    #[serde(default)]
    pub copy: CopyPlaces,
    /// What this host can run.
    pub doctor: Doctor,
}

/// Places of the host for copies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CopyPlaces {
    /// The directories that the configuration allows (`copy_roots`).
    pub roots: Vec<String>,
    /// The client's own folder; always allowed.
    pub scratch: String,
}

/// What one sort of things takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskUse {
    /// What: `images`, `drives`, `assets`, `vms`, `builds` (logs), `cache`, `scratch`.
    pub what: String,
    /// How many there are.
    pub items: u64,
    /// What they take on the disk, in bytes; what copy-on-write copies share counts for each of them.
    pub bytes: u64,
}

/// What a host can run, and what it lacks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Doctor {
    /// Whether VMs can be run here.
    pub ok: bool,
    /// The driver that `auto` picks (`firecracker`, `qemu`), where one can be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// `kvm` or `tcg` (software emulation).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<String>,
    /// Why that one.
    pub why: String,
    /// Each thing that was looked at.
    pub checks: Vec<DoctorCheck>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DoctorCheck {
    /// What, such as `kvm` or `qemu-system-x86_64`.
    pub name: String,
    /// Its state.
    pub status: DoctorStatus,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// The result of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DoctorStatus {
    /// Good.
    Ok,
    /// Missing, but not needed on this host.
    Note,
    /// Something works less well without it.
    Warn,
    /// VMs cannot run without it.
    Fail,
}

impl Tool for SystemInfo {
    const NAME: &'static str = "system_info";
    const TITLE: &'static str = "Show the host's state";
    const DESCRIPTION: &'static str = "Shows the health of Nexus and its host: versions, VMs by state, what takes how much disk, which VMM is \
        used and why, and what is missing; use it when VMs cannot be created or started.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = SystemInfoParams;
    type Output = SystemInfoOutput;
}
