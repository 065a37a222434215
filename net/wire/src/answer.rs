//! What `nexus-net` answers and tells.

use std::net::IpAddr;

use nexus_schema::id::VmId;
use nexus_schema::network::DenyReason;
use nexus_schema::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Instance, Mac};

/// The answer to a request that was done; each carries the request's name.
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

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The generation that it speaks.
    pub protocol: u32,
    /// Its process.
    pub pid: u32,
    /// Its version.
    pub version: String,
}

/// The instance is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configured {
    /// The bridge.
    pub bridge: String,
    /// VMs that a predecessor left with a TAP: each wants an `attach`, or to be removed by `retain`.
    #[serde(default)]
    pub found: Vec<VmId>,
    /// How many things were made or changed; 0 if all was as it should be.
    #[serde(default)]
    pub changes: u64,
}

/// The VM has its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The persistent TAP, for the VMM to attach to: with virtio headers (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
    pub tap: String,
    /// How many things were made or changed; 0 if all was as it should be.
    #[serde(default)]
    pub changes: u64,
}

/// The VM's policy is this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Updated {
    /// How many open connections were cut.
    pub cut: u64,
    /// How many things were made or changed.
    #[serde(default)]
    pub changes: u64,
}

/// The VM has no network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Whether it had one.
    #[serde(default)]
    pub was_attached: bool,
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The instance; none before `configure`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
    /// The bridge, if it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The servers that the resolver forwards to.
    #[serde(default)]
    pub dns_servers: Vec<std::net::SocketAddr>,
    /// The VMs that are attached.
    #[serde(default)]
    pub vms: Vec<VmState>,
    /// What keeps the network from working as it should, with what to do.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// One VM.
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
    /// What was counted.
    pub counters: Counters,
    /// The last connections that were refused, the newest first.
    #[serde(default)]
    pub denied: Vec<Denial>,
}

/// What was counted of a VM since it was attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes that the VM sent, frames and all.
    pub sent_bytes: u64,
    /// Bytes that it was sent.
    pub received_bytes: u64,
    /// Connections that were let through.
    pub allowed: u64,
    /// Connections, packets of other protocols and names that were refused.
    pub denied: u64,
    /// Frames that were dropped for a MAC or IP address that is not the VM's.
    pub spoofed: u64,
}

/// Something that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// The VM.
    pub vm: VmId,
    /// When.
    pub at: Timestamp,
    /// What it was.
    pub protocol: Protocol,
    /// Where to, if it was an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The port there; none for a name and for protocols without ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The name that was asked for, or under which the address was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The sender's MAC address, where the frame was forged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Why.
    pub reason: DenyReason,
}

/// What was refused: a lookup, or a packet of a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// A name that was looked up.
    Dns,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// ARP.
    Arp,
    /// Another one, by its number in IP headers.
    Other(u8),
}

/// What else is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retained {
    /// The VMs whose network was removed.
    #[serde(default)]
    pub removed: Vec<VmId>,
}

/// Nothing is left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleaned {
    /// How many interfaces were removed.
    #[serde(default)]
    pub interfaces: u64,
}

/// Events follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {}

/// What is told to those who watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Something was refused. Of a VM that tries very often not each one is told; the counters have them all.
    Denied(Denial),
    /// The reader was too slow: so many events are missing here.
    Missed(u64),
    /// Others changed what is ours in the kernel, and it was put right.
    Repaired {
        /// How many things were made or changed.
        changes: u64,
    },
}

/// A request that failed. What could be done of it is done; it may be repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct NetError {
    /// Which kind.
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
    /// The request is none, or says something that cannot be.
    Invalid,
    /// `configure` is to be asked first.
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
    /// The kernel refused something else.
    Kernel,
}
