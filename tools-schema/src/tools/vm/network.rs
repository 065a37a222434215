//! The network of a VM: the requested settings, and its state.

use std::net::{Ipv4Addr, Ipv6Addr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::network::{Bandwidth, DenyReason, NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule};
use crate::time::Timestamp;

/// What a VM is to reach. A plain word stands for the mode or the preset: `none`, `proxy`, `nat`, `internet`,
/// `open`, `packages`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkParams {
    /// `none`; `proxy`: HTTP(S) and SOCKS5 by the proxy in `http_proxy` etc.; `nat`: an interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<NetworkMode>,
    /// Without lists: `internet` (no host, private or link-local addresses), `open` (private networks too) or
    /// `packages` (registries).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<NetworkPreset>,
    /// Only these, if any: `api.example.org`, `*.example.net`, an address or CIDR, also with `:PORT` or `:PORT-PORT`; `*`: all of
    /// the preset. Addresses open private ranges, names do not. Replaces the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0, max = 128))]
    pub allow: Option<Vec<NetworkRule>>,
    /// Never these; overrides `allow`. Replaces the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0, max = 128))]
    pub deny: Option<Vec<NetworkRule>>,
    /// For `nat`: VMs with a group in common may talk to each other. Replaces the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0, max = 16))]
    pub groups: Option<Vec<Name>>,
    /// Bytes per second: {"rx":"10MiB","tx":"2MiB"}; {}: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub bandwidth: Option<Bandwidth>,
}

/// The schema of an argument whose description says what it has: models pay for each word.
fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object" })
}

/// The network of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmNetwork {
    /// How it reaches other machines.
    pub mode: NetworkMode,
    /// What it may reach where no entry says otherwise.
    #[serde(default)]
    pub preset: NetworkPreset,
    /// If it is not empty, only what it names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<NetworkRule>,
    /// Never what this names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<NetworkRule>,
    /// The groups that it is in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Name>,
    /// Its bandwidth limits, in bytes per second.
    #[serde(default, skip_serializing_if = "Bandwidth::is_empty")]
    pub bandwidth: Bandwidth,
    /// What the preset `packages` allows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub packages: Vec<NetworkRule>,
    /// Its interface in mode `nat`; absent before its first start with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<NetworkInterface>,
    /// How it reaches them until its next start, where that is another mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_next_start: Option<NetworkMode>,
    /// What went through it since the daemon started.
    #[serde(default)]
    pub counts: NetworkCounts,
    /// The last connections that were refused by policy, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub denied: Vec<DeniedConnection>,
}

/// A VM's network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkInterface {
    /// Its hardware address.
    pub mac: String,
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address, which no other network knows.
    pub ipv6: Ipv6Addr,
    /// The host's address towards it: its gateway and name server.
    pub gateway: Ipv4Addr,
    /// The device of the host that it is connected to, while the VM runs with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
}

/// What went through a VM's network since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkCounts {
    /// Connections that were made.
    pub allowed: u64,
    /// Connections that were refused by policy.
    pub denied: u64,
    /// Connections that were allowed and could not be made.
    pub failed: u64,
    /// Connections that are open now.
    pub open: u64,
    /// Bytes from the VM.
    pub sent_bytes: u64,
    /// Bytes to the VM.
    pub received_bytes: u64,
    /// Packets from the VM; only with an interface.
    #[serde(default)]
    pub sent_packets: u64,
    /// Packets to the VM; only with an interface.
    #[serde(default)]
    pub received_packets: u64,
}

/// A connection that was refused by policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeniedConnection {
    /// When.
    pub at: Timestamp,
    /// The name or the address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Why.
    pub reason: DenyReason,
    /// What to do next.
    pub hint: String,
}

impl From<NetworkPolicy> for VmNetwork {
    fn from(policy: NetworkPolicy) -> Self {
        let NetworkPolicy { mode, preset, allow, deny, groups, bandwidth, packages } = policy;
        Self { mode, preset, allow, deny, groups, bandwidth, packages, ..Self::default() }
    }
}

/// Accepts the form of older daemons: the mode alone.
pub(super) fn plain_or_whole<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<VmNetwork, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Said {
        Plain(NetworkMode),
        Whole(Box<VmNetwork>),
    }
    Ok(match Said::deserialize(deserializer)? {
        Said::Plain(mode) => VmNetwork { mode, ..VmNetwork::default() },
        Said::Whole(network) => *network,
    })
}
