//! The guest link: what a guest and its host say to each other on the host's vsock port 1024, one JSON object a line.
//!
//! Every exchange is one connection that the guest opens:
//!
//! ```text
//! guest                                  host
//!   hello  ─────────────────────────────>        the boot's first one needs no token
//!          <───────────────────── configure      or `refused`
//!   ack    ─────────────────────────────>        applied, or what could not be applied
//!          <───────────────────── welcome        the guest is `ready` now
//!
//!   bye    ─────────────────────────────>        before it goes down; carries the token
//!          <───────────────────── welcome
//! ```
//! A guest whose agent was restarted says hello again with its token and is configured anew. The source port of every
//! connection must be below 1024, so that only root in the guest can speak here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{BootId, VmId};
use crate::name::Name;
use crate::network::DenyReason;

/// The generation of this protocol that this build speaks.
pub const PROTOCOL: u32 = 1;
/// The oldest generation that this build understands.
pub const PROTOCOL_MIN: u32 = 1;
/// The host's vsock port for hello and bye.
pub const HOST_PORT: u32 = 1024;
/// The host's vsock port for connections to other machines: see [`crate::egress`].
pub const EGRESS_PORT: u32 = 1025;
/// The guest's vsock port of its MCP server (JSON lines).
pub const MCP_PORT: u32 = 200;
/// The guest's vsock port for bulk and interactive streams.
pub const STREAM_PORT: u32 = 201;

/// What a guest says on the hello port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "one exists at a time, on the stack of one task")]
pub enum GuestMessage {
    /// The agent is up.
    Hello(Hello),
    /// The configuration was applied.
    Ack(Ack),
    /// The guest goes down in an orderly way.
    Bye(Bye),
}

/// What the host answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "one exists at a time, on the stack of one task")]
pub enum HostMessage {
    /// The configuration to apply.
    Configure(Configure),
    /// All is well.
    Welcome {},
    /// The guest is not accepted.
    Refused {
        /// Why.
        reason: String,
    },
}

/// The first message of an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// The generation that the guest speaks.
    pub protocol: u32,
    /// The oldest generation that the guest understands.
    pub min_protocol: u32,
    /// The version of the guest binary.
    pub build: String,
    /// The running kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// The architecture, as `uname -m` prints it.
    pub arch: String,
    /// The kernel's own id of this boot (`/proc/sys/kernel/random/boot_id`).
    pub kernel_boot_id: String,
    /// Milliseconds from the start of the kernel to this hello.
    pub uptime_ms: u64,
    /// The token of this boot, on every hello but the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// How the image starts.
    pub init: InitMode,
    /// `PRETTY_NAME` of the root filesystem's `os-release`, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// `/etc/nexus/image.yaml` of the root filesystem, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageMetadata>,
}

/// What is PID 1 in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InitMode {
    /// The small init of nexus-guest; nothing else is started.
    #[default]
    Agent,
    /// The image's own init (systemd, OpenRC, BusyBox), with the agent beside it.
    System,
}

/// `/etc/nexus/image.yaml`: what an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ImageMetadata {
    /// The image's name.
    pub name: String,
    /// The build that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build_id: Option<String>,
    /// The distribution, such as `debian-12`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distro: Option<String>,
    /// What is to be PID 1.
    #[serde(default)]
    pub init: InitMode,
    /// How it means to be run. Only in the file: a guest does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub config: Option<Box<ImageConfig>>,
}

/// How an image means to be run, as the configuration of an OCI image says it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ImageConfig {
    /// Environment variables; commands in VMs of this image have them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The working directory; commands in VMs of this image start there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The user; commands run as root all the same when nothing else is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The program that is to be started; nothing is by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Its arguments, or a command where there is no entry point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
}

/// The host's configuration for one boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Configure {
    /// The generation that both sides speak from here on.
    pub protocol: u32,
    /// The secret of this boot, 32 bytes in hexadecimal; later messages carry it.
    pub token: String,
    /// The VM's id.
    pub vm: VmId,
    /// The VM's name.
    pub name: Name,
    /// The host's id of this boot.
    pub boot_id: BootId,
    /// The hostname to set.
    pub hostname: String,
    /// The host's time, in nanoseconds since 1970-01-01T00:00:00Z.
    pub time_unix_ns: u64,
    /// Network interfaces to bring up; empty where the VM has none.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Name servers for `/etc/resolv.conf`; empty leaves the file alone.
    #[serde(default)]
    pub dns: Vec<std::net::IpAddr>,
    /// Where short names are looked for, for the same file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Environment variables of every command.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where commands start when they do not say, made if it is missing; their user's home where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The user that the image names, for calls that ask to act as that one; root where it names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_user: Option<String>,
    /// How long the guest waits for the image's own init to have started the system before it answers, in seconds; 0 for not at
    /// all. Guests that do not know it do not wait.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wait_for_init_s: u32,
    /// Filesystems of data drives to mount, in order.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Files to write before the VM is ready, in order; those of its first start only.
    #[serde(default)]
    pub files: Vec<GuestFile>,
    /// The way to other machines by [`EGRESS_PORT`]; absent where the host serves no such port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyParams>,
}

/// A data drive's ext4 filesystem to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The filesystem's label.
    pub label: String,
    /// Where to, an absolute path; made if it is missing.
    pub path: String,
    /// Whether it is mounted read-only.
    #[serde(default)]
    pub read_only: bool,
}

/// The MCP request of the host by which a guest looks again how large its drives are, and grows the filesystems on them.
/// The answer's `problems` is a list of what could not be grown, in words.
pub const GROW_REQUEST: &str = "nexus/grow";

/// The `reason` of a `notifications/cancelled` to a guest whose caller is gone, or waits no longer: nobody wants the answer, but
/// a command that the call started goes on. With any other reason it is killed.
pub const CUT_OFF: &str = "nexus/cut-off";

/// The key under `_meta` of a call to a guest that says who calls: the client's name.
pub const CLIENT_META: &str = "dev.nexus/client";

/// The MCP request of the host by which it looks at a guest's clock, and sets it right; takes [`ClockParams`], answers with
/// [`ClockAnswer`]. A guest that does not know it answers with the JSON-RPC error -32601, and keeps the time of its boot.
pub const CLOCK_REQUEST: &str = "nexus/clock";

/// The MCP request of the host by which it says that a VM's network has changed; takes [`ProxyParams`]. A guest that does not know it
/// answers with the JSON-RPC error -32601, and learns of it at its next start.
pub const PROXY_REQUEST: &str = "nexus/proxy";

/// The MCP request of the host by which it says that the hostname has changed; takes [`HostnameParams`]. A guest that does not know it
/// answers with the JSON-RPC error -32601, and has the new one from its next start on.
pub const HOSTNAME_REQUEST: &str = "nexus/hostname";

/// Parameters of [`HOSTNAME_REQUEST`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostnameParams {
    /// The new hostname.
    pub hostname: String,
}

/// The MCP request of the host by which it says which connections of the guest's network interface were refused by policy; takes
/// [`RefusedParams`]. The results of commands name them. A guest that does not know it answers with the JSON-RPC error -32601.
pub const REFUSED_REQUEST: &str = "nexus/refused";

/// Parameters of [`REFUSED_REQUEST`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedParams {
    /// The connections, oldest first.
    pub connections: Vec<Refusal>,
}

/// A connection that was refused by policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The name or the address.
    pub host: String,
    /// The port; 0 where there is none.
    pub port: u16,
    /// Why.
    pub reason: DenyReason,
    /// What to do next.
    pub hint: String,
    /// What the VM's allow list has to be for this connection; empty where that does not help, or is too long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

/// Parameters of [`PROXY_REQUEST`], and a part of [`Configure`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyParams {
    /// Whether programs are to be told of a proxy, which listens then.
    pub enabled: bool,
}

/// Parameters of [`CLOCK_REQUEST`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockParams {
    /// The host's time when it sent this, in nanoseconds since 1970-01-01T00:00:00Z.
    pub time_unix_ns: u64,
    /// How much to add to the guest's clock, in nanoseconds. Not a time: a message that comes late does no harm so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_ns: Option<i64>,
}

/// The answer to [`CLOCK_REQUEST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockAnswer {
    /// The guest's time when it answered, in nanoseconds since 1970-01-01T00:00:00Z.
    pub time_unix_ns: u64,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its MAC address, by which it is found.
    pub mac: String,
    /// Its addresses.
    pub addresses: Vec<InterfaceAddress>,
    /// The MTU in bytes, where it is not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The address and its prefix length, such as `10.90.0.2/32`.
    pub address: String,
    /// The default gateway of its family, if it is this interface. It need not be in the network that the prefix length says: the
    /// guest finds it on the interface itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<std::net::IpAddr>,
}

/// One file to write at boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFile {
    /// Absolute path in the guest.
    pub path: String,
    /// The content, in base64.
    pub content_base64: String,
    /// The permission bits.
    pub mode: u32,
    /// Whose it is: a name, a uid, `uid:gid` or `image`; the owner of its directory where it is absent. Guests that do not know it
    /// leave it to that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The guest applied its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The token of the configuration.
    pub token: String,
    /// What could not be applied, in words; the VM is ready all the same.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// The guest goes down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    /// The token of this boot.
    pub token: String,
    /// What comes next.
    pub reason: ByeReason,
    /// Whether the reason is a guess: the image's own init goes down and did not say which way. How the machine ends tells.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guessed: bool,
}

/// Why a guest goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ByeReason {
    /// It powers off: the VM is stopped.
    Poweroff,
    /// It reboots: the VM is started again.
    Reboot,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}
