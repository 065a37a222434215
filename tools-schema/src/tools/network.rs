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
    /// Its bridge on the host, once it was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
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
    const DESCRIPTION: &'static str = "Shows how VMs reach other machines: mode, addresses, what may be reached, counts, the last refused connections and the state of `nat`; use it when a connection does not work.";
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

/// Opens the host's own firewall for VMs in mode `nat`.
pub enum NetworkFirewall {}

/// Arguments of `network_firewall`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkFirewallParams {
    /// Remove the rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<bool>,
    /// Only show what would change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
}

/// Result of `network_firewall`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkFirewallOutput {
    /// Whether Nexus keeps its rules in such chains, also in those that are added later.
    pub enabled: bool,
    /// The bridge that the rules name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The chains that drop packets that no rule accepts.
    pub chains: Vec<FirewallChain>,
}

/// A chain of the host's firewall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FirewallChain {
    /// Its table, with its family: `ip filter`.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Which packets it sees.
    pub hook: FirewallHook,
    /// The program that probably created it: `docker`, `ufw`, `firewalld`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The chain that has the rules, if it is another one, such as `DOCKER-USER`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules_in: Option<String>,
    /// Whether it has Nexus's rules.
    pub open: bool,
    /// Why the rules could not be added, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Which packets a chain sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FirewallHook {
    /// Forwarded packets.
    Forward,
    /// Packets to the host itself.
    Input,
}

impl Tool for NetworkFirewall {
    const NAME: &'static str = "network_firewall";
    const TITLE: &'static str = "Open the host's firewall for VMs";
    const DESCRIPTION: &'static str = "Adds rules for VMs in mode `nat` to chains of the host's firewall (Docker, UFW, firewalld, nftables, \
        iptables) that drop their packets, and keeps them there; use it when `network_inspect` warns of such a chain. Each VM's policy still \
        applies.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = NetworkFirewallParams;
    type Output = NetworkFirewallOutput;
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
