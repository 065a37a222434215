//! Changes of a VM's properties.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{NetworkParams, VmDetails};
use crate::id::VmKind;
use crate::name::{Name, Reference};
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
    /// Its new name. A hostname that is the old name changes with the VM's next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What it may reach from now on. What is not given stays as it is; connections that are no longer allowed are cut. A VM that runs
    /// without an interface has `nat` from its next start on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkParams>,
}

impl Tool for VmUpdate {
    const NAME: &'static str = "vm_update";
    const TITLE: &'static str = "Update a VM";
    const DESCRIPTION: &'static str = "Changes a VM's labels, its protection against deletion, its name, or what it may reach; use it to mark VMs that must be \
        kept or found again, or when a connection was refused by policy. A change of `network` takes effect at once, \
        but for `nat` in a VM that runs without it: `until_next_start` in the reply says so.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = VmUpdateParams;
    type Output = VmDetails;
}
