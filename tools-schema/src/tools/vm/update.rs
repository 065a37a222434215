//! Changes of a VM's properties.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{IdleAction, NetworkParams, VmDetails};
use crate::id::{BootId, VmKind};
use crate::name::{Name, Reference};
use crate::span::TimeSpan;
use crate::tool::{Effect, Tool};

/// Changes a VM.
pub enum VmUpdate {}

/// Arguments of `vm_update`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdateParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Labels to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Labels to take away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_tags: Vec<String>,
    /// Refuse deletion (true) or allow it again (false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protected: Option<bool>,
    /// Its new name, as by vm_rename.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What it may reach from now on. What is not given stays as it is; connections that are no longer allowed are cut. A VM that runs
    /// without an interface has `nat` from its next start on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkParams>,
    /// Delete it so long from now, such as `2h`; 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// Stop it once it was idle so long; 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// Whether idle_stop stops or suspends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_action: Option<IdleAction>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
}

impl VmUpdateParams {
    /// No change of a VM.
    pub const fn of(vm: Reference<VmKind>) -> Self {
        Self {
            vm,
            tags: BTreeMap::new(),
            remove_tags: Vec::new(),
            protected: None,
            name: None,
            network: None,
            ttl: None,
            idle_stop: None,
            idle_action: None,
            if_boot_id: None,
            confirm: None,
        }
    }
}

impl Tool for VmUpdate {
    const NAME: &'static str = "vm_update";
    const TITLE: &'static str = "Update a VM";
    const DESCRIPTION: &'static str = "Changes a VM's labels, protection, name, lifetime, or what it may reach; use it to mark VMs that must be \
        kept or found again, or when a connection was refused by policy.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = VmUpdateParams;
    type Output = VmDetails;
}
