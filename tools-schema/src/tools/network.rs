//! The networks of VMs: their state, their logs, and their removal.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{VmId, VmKind};
use crate::name::{Name, Reference};
use crate::network::DenyReason;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::vm::{VmNetwork, VmState};

/// Shows networks.
pub enum NetworkInspect {}

/// Arguments of `network_inspect`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInspectParams {
    /// Only this VM: its name or id (default: all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
}

/// Result of `network_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkInspectOutput {
    /// The network that VMs in mode `nat` share.
    pub nat: NatNetwork,
    /// The networks of the VMs, by name.
    pub vms: Vec<InspectedNetwork>,
}

/// The network that VMs in mode `nat` share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NatNetwork {
    /// Whether VMs can have it on this host.
    pub available: bool,
    /// Why not, and what to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable_because: Option<String>,
    /// The process that keeps it, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its IPv4 addresses, once it was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// Its IPv6 addresses, once it was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet6: Option<String>,
    /// What keeps it from working as it should, such as rules of the host's firewall.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The network of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InspectedNetwork {
    /// The VM's id.
    pub id: VmId,
    /// The VM's name.
    pub name: Name,
    /// The VM's state.
    pub state: VmState,
    /// Its network.
    pub network: VmNetwork,
    /// What that means for who works in the VM.
    pub note: String,
}

impl Tool for NetworkInspect {
    const NAME: &'static str = "network_inspect";
    const TITLE: &'static str = "Show networks";
    const DESCRIPTION: &'static str = "Shows how VMs reach other machines: mode, addresses, what may be reached, what was counted, \
        the last connections that were refused, and how the network that `nat` shares is; use it when a connection does not work.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = NetworkInspectParams;
    type Output = NetworkInspectOutput;
}

/// Shows which connections of a VM were made and refused.
pub enum NetworkLog {}

/// Arguments of `network_log`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkLogParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Where to go on: `cursor` of the reply before (default: with the last lines).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// How many lines at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// How long to wait for a line where there is none, in seconds (default 0, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// Result of `network_log`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkLogOutput {
    /// The connections, oldest first.
    pub connections: Vec<LoggedConnection>,
    /// Where the next call goes on.
    pub cursor: String,
}

/// A connection in a VM's log: a line of JSON in its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LoggedConnection {
    /// When.
    pub at: Timestamp,
    /// What became of it.
    pub verdict: Verdict,
    /// `tcp`, `udp`, `icmp`, or `dns` for a name that was asked for.
    pub protocol: String,
    /// The name or the address that was asked for.
    pub host: String,
    /// The address, where it is known and another word than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The port; 0 where there is none.
    pub port: u16,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<DenyReason>,
}

/// The outcome of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was made.
    Allowed,
    /// The policy refused it.
    Denied,
    /// The policy allowed it, but it could not be made.
    Failed,
}

impl Verdict {
    /// Returns its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

impl Tool for NetworkLog {
    const NAME: &'static str = "network_log";
    const TITLE: &'static str = "Show a VM's connections";
    const DESCRIPTION: &'static str = "Shows which connections of a VM were refused by policy, and by the proxy also which were made, with time, \
        place and reason; use it to find out what a program wanted to reach. The last MiB of them is kept while the VM exists.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = NetworkLogParams;
    type Output = NetworkLogOutput;
}

/// Removes the network that VMs in mode `nat` share.
pub enum NetworkCleanup {}

/// Arguments of `network_cleanup`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkCleanupParams {}

/// Result of `network_cleanup`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkCleanupOutput {
    /// Whether there was a network of this instance.
    pub removed: bool,
}

impl Tool for NetworkCleanup {
    const NAME: &'static str = "network_cleanup";
    const TITLE: &'static str = "Remove the shared network";
    const DESCRIPTION: &'static str = "Removes bridge, devices and firewall rules of this Nexus from the host, and nothing else; use it before \
        Nexus is removed, or when they are damaged. It is refused while VMs run with them; the next VM in mode `nat` makes them again.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = NetworkCleanupParams;
    type Output = NetworkCleanupOutput;
}
