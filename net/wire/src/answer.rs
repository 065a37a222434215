//! Answers and events of `nexus-net`.

use std::net::IpAddr;

use nexus_schema::id::VmId;
use nexus_schema::network::DenyReason;
use nexus_schema::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Instance, Mac};

/// The answer to a successful request; it is tagged with the request's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To `hello`.
    Hello(Hello),
    /// To `configure`.
    Configure(Configured),
    /// To `attach`.
    Attach(Attached),
    /// To `update`.
    Update(Updated),
    /// To `detach`.
    Detach(Detached),
    /// To `state`.
    State(Box<State>),
    /// To `retain`.
    Retain(Retained),
    /// To `cleanup`.
    Cleanup(Cleaned),
    /// To `watch`.
    Watch(Watching),
}

/// The process that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The protocol generation that it speaks.
    pub protocol: u32,
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
}

/// The instance is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configured {
    /// Name of the bridge.
    pub bridge: String,
    /// VMs that have a TAP from an earlier process. Each needs an `attach`, or a `retain` that removes it.
    #[serde(default)]
    pub found: Vec<VmId>,
    /// Number of things that were created or changed; 0 if the state was already correct.
    #[serde(default)]
    pub changes: u64,
}

/// The VM is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The persistent TAP, for the VMM to attach to: with virtio headers (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
    pub tap: String,
    /// Number of things that were created or changed; 0 if the state was already correct.
    #[serde(default)]
    pub changes: u64,
}

/// The VM's policy is changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Updated {
    /// Number of open connections that were cut.
    pub cut: u64,
    /// Number of things that were created or changed.
    #[serde(default)]
    pub changes: u64,
}

/// The VM is detached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Whether it was attached before.
    #[serde(default)]
    pub was_attached: bool,
}

/// The current state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The instance; none before `configure`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
    /// Name of the bridge, if it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The servers that the resolver forwards to.
    #[serde(default)]
    pub dns_servers: Vec<std::net::SocketAddr>,
    /// The attached VMs.
    #[serde(default)]
    pub vms: Vec<VmState>,
    /// Problems of the network, with hints.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// State of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// Its TAP.
    pub tap: String,
    /// Whether a VMM has the TAP open.
    pub is_in_use: bool,
    /// Its counters.
    pub counters: Counters,
    /// The last refused connections, newest first.
    #[serde(default)]
    pub denied: Vec<Denial>,
}

/// Counters of a VM since it was attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes that the VM sent, including frame headers.
    pub sent_bytes: u64,
    /// Bytes that it received.
    pub received_bytes: u64,
    /// Connections that were allowed.
    pub allowed: u64,
    /// Refused connections, packets of other protocols, and names.
    pub denied: u64,
    /// Frames that were dropped because their MAC or IP address is not the VM's.
    pub spoofed: u64,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// The VM.
    pub vm: VmId,
    /// Time of the refusal.
    pub at: Timestamp,
    /// What was refused.
    pub protocol: Protocol,
    /// The destination address, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The destination port; none for a name and for protocols without ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The name that was looked up, or with which the address was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The source MAC address of a spoofed frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The reason.
    pub reason: DenyReason,
}

/// The kind of refused traffic: a lookup, or a packet of a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// A lookup of a name.
    Dns,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// ARP.
    Arp,
    /// Another protocol, by its number in IP headers.
    Other(u8),
}

/// All other VMs are removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retained {
    /// The VMs whose network was removed.
    #[serde(default)]
    pub removed: Vec<VmId>,
}

/// The instance's network is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleaned {
    /// Number of removed interfaces.
    #[serde(default)]
    pub interfaces: u64,
}

/// The connection receives events from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {}

/// An event for watching clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Something was refused. For a VM with very many refusals not every one is sent; the counters have them all.
    Denied(Denial),
    /// The reader was too slow: this many events were dropped here.
    Missed(u64),
    /// Another program changed this process's state in the kernel, and it was repaired.
    Repaired {
        /// Number of things that were created or changed.
        changes: u64,
    },
}

/// The error of a failed request, which may be done in part. It can be repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct NetError {
    /// The kind of error.
    pub code: ErrorCode,
    /// What failed, on what, and why.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed or invalid.
    Invalid,
    /// `configure` must be sent first.
    NotConfigured,
    /// No VM with this id is attached.
    NoSuchVm,
    /// The kernel has no TAP devices.
    NoTun,
    /// The kernel has no nf_tables.
    NoNfTables,
    /// A privilege is missing.
    NotPermitted,
    /// An address or a subnet is in use by something else.
    InUse,
    /// The kernel refused an operation for another reason.
    Kernel,
}
