//! The guest link: the messages between a guest and its host on the host's vsock port 1024, one JSON object per line.
//!
//! Every exchange is one connection that the guest opens:
//!
//! ```text
//! guest                                  host
//!   hello  ─────────────────────────────>        the first one of a boot needs no token
//!          <───────────────────── configure      or `refused`
//!   ack    ─────────────────────────────>        applied, with the parts that failed
//!          <───────────────────── welcome        the guest is `ready` now
//!
//!   bye    ─────────────────────────────>        before it shuts down; has the token
//!          <───────────────────── welcome
//! ```
//! A guest that was restored from a checkpoint says hello with the checkpoint's token and the `resumed` of this restore, which its host alone knows; its
//! `configure` has `resume`, and its `ack` says what was renewed. A restarted agent says hello again with its token and is configured again. The source port of every connection must be below 1024, so only root in
//! the guest can use this port.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{BootId, CommandId, VmId};
use crate::name::Name;
use crate::network::DenyReason;

/// The protocol generation of this build.
pub const PROTOCOL: u32 = 1;
/// The oldest protocol generation that this build supports.
pub const PROTOCOL_MIN: u32 = 1;
/// The host's vsock port for hello and bye.
pub const HOST_PORT: u32 = 1024;
/// The host's vsock port for connections to other machines: see [`crate::egress`].
pub const EGRESS_PORT: u32 = 1025;
/// The guest's vsock port of its MCP server (JSON lines).
pub const MCP_PORT: u32 = 200;
/// The guest's vsock port for bulk and interactive streams.
pub const STREAM_PORT: u32 = 201;

/// The guest's vsock port on which a VMM's host tells the agent of a restored guest so, where no other way exists: a line with the nonce of the restore,
/// which the agent repeats. It then says hello with it.
pub const RESUME_PORT: u32 = 202;

/// The guest's vsock port on which a VMM's host keeps commands that stand still from waiting for a daemon that is gone: a line with a [`LeaseRequest`],
/// which the agent answers with a [`LeaseAnswer`].
pub const LEASE_PORT: u32 = 203;

/// The host's request on [`LEASE_PORT`]. What is told before a guest is saved is known to its own host and to what was saved. A restored guest has
/// another host, which never asks it to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseRequest {
    /// The guest is about to be paused, and perhaps saved.
    Hold {
        /// What a later request has to know. It replaces an earlier one; a new [`QUIESCE_REQUEST`] and the end of the quiet forget it.
        secret: String,
    },
    /// This is the guest that was told the secret, not one that was restored from what was saved of it: its commands may go on.
    GoOn {
        /// The same as before.
        secret: String,
        /// The host's time, in nanoseconds since 1970.
        time_unix_ns: u64,
    },
}

/// The answer to a [`LeaseRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseAnswer {
    /// Whether the guest knows the secret. If not, its commands go on already, or wait for a daemon.
    pub known: bool,
}

/// A guest's message on the hello port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestMessage {
    /// The agent has started.
    Hello(Hello),
    /// The configuration was applied.
    Ack(Ack),
    /// The guest is shutting down in order.
    Bye(Bye),
}

/// The host's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "one exists at a time, on the stack of one task")]
pub enum HostMessage {
    /// The configuration to apply.
    Configure(Configure),
    /// The exchange succeeded.
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
    /// The guest's protocol generation.
    pub protocol: u32,
    /// The oldest protocol generation that the guest supports.
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
    /// The token of this boot, on every hello except the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The nonce of the restore that this guest goes on after, if it was restored from a checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<String>,
    /// How the image starts.
    pub init: InitMode,
    /// `PRETTY_NAME` of the root filesystem's `os-release`, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// `/etc/nexus/image.yaml` of the root filesystem, if it has one.
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
    /// The protocol generation that both sides use from here on.
    pub protocol: u32,
    /// The secret of this boot, 32 bytes in hexadecimal; later messages contain it.
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
    /// Network interfaces to bring up; empty if the VM has none.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Name servers for `/etc/resolv.conf`; if empty, the file is not changed.
    #[serde(default)]
    pub dns: Vec<std::net::IpAddr>,
    /// Search domains for the same file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Environment variables of every command.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The default working directory of commands, created if missing; if absent, the home of the command's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The image's user, for calls that request it; if absent, root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_user: Option<String>,
    /// How long the guest waits for the image's own init to have started the system before it answers, in seconds; 0 to not wait. Older guests do not
    /// wait.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wait_for_init_s: u32,
    /// Filesystems of data drives to mount, in order.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Files to write before the VM is ready, in order; only at its first start.
    #[serde(default)]
    pub files: Vec<GuestFile>,
    /// The proxy for connections through [`EGRESS_PORT`]; absent if the host does not serve that port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyParams>,
    /// What a guest that was restored from a checkpoint has to renew before any of its commands runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    /// Whether the guest is saved once it is ready, and new VMs go on from there, each with [`ResumeKind::Warm`]: it starts no services, and its ack has
    /// a problem if the image has any.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub template: bool,
}

/// Why a guest was restored from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResumeKind {
    /// As another VM, which needs an identity of its own.
    Fork,
    /// As the same VM, at an earlier time.
    Rollback,
    /// As the same VM, which was suspended meanwhile.
    Wake,
    /// As a new VM: what was saved is a machine that nobody has used yet, once it was ready. See [`Configure::template`].
    Warm,
}

impl ResumeKind {
    /// The kind as it is on the wire, and in the environment of hooks.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Rollback => "rollback",
            Self::Wake => "wake",
            Self::Warm => "warm",
        }
    }
}

/// What a restored guest has to renew. Its clock, hostname, addresses and token are in the rest of [`Configure`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Why it was restored.
    pub kind: ResumeKind,
    /// Fresh random bytes of the host for the kernel's generator: 32, in base64.
    pub entropy_base64: String,
    /// The new machine id, 32 hexadecimal digits; absent to keep the present one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Whether to run the image's hooks in `/etc/nexus/fork.d`.
    #[serde(default)]
    pub run_hooks: bool,
}

/// What a restored guest renewed before it let its commands run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// What was renewed, as short phrases.
    pub renewed: Vec<String>,
    /// What could not be renewed, as messages. If there is any, its commands still stand still, and the host ends the VM.
    #[serde(default)]
    pub failed: Vec<String>,
    /// What it shares with others and cannot renew, with the reason.
    #[serde(default)]
    pub not_renewed: Vec<String>,
    /// By how much its clock was behind, in milliseconds.
    #[serde(default)]
    pub clock_behind_ms: i64,
}

/// The host's MCP request before a checkpoint: commands stop and filesystems are synced until [`THAW_REQUEST`]. Returns [`Quiesced`]. A guest that is
/// not asked to go on says hello after [`QUIET_MAX`] of its own time, and goes on once it is welcomed: a guest cannot know whether it was restored,
/// and one that was is not welcomed before it has renewed what it shares with others.
pub const QUIESCE_REQUEST: &str = "nexus/quiesce";

/// How long a guest's commands stand still before the guest asks whether they may go on, by the guest's own clock. A restored guest that does not prove in half of this time that it renewed
/// what it must is ended by its host.
pub const QUIET_MAX: std::time::Duration = std::time::Duration::from_secs(90);

/// The host's MCP request after a checkpoint; takes [`ClockParams`]: sets the clock, which stood still, and lets the commands go on.
pub const THAW_REQUEST: &str = "nexus/thaw";

/// The answer to [`QUIESCE_REQUEST`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesced {
    /// Whether all commands stand still.
    pub frozen: bool,
    /// Whether all filesystems were synced.
    pub synced: bool,
    /// The processes that stand still: at most [`PROCESSES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<GuestProcess>,
}

/// The host's MCP request for the processes of a guest, as [`Quiesced`] has them. Returns [`GuestProcesses`].
pub const PROCESSES_REQUEST: &str = "nexus/processes";

/// The most processes that a guest lists.
pub const PROCESSES_MAX: usize = 256;

/// The longest command line that a guest gives of a process, in bytes.
pub const COMMAND_LINE_MAX: usize = 160;

/// The answer to [`PROCESSES_REQUEST`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProcesses {
    /// At most [`PROCESSES_MAX`], with the lowest numbers.
    pub processes: Vec<GuestProcess>,
}

/// A process of a guest; those of its kernel are not listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProcess {
    /// Its number.
    pub pid: u32,
    /// Its command line, or its name if it has none; at most [`COMMAND_LINE_MAX`] bytes.
    pub command: String,
    /// When it started, in clock ticks since the guest's kernel did: with the number, its identity.
    pub started: u64,
    /// Its resident memory, in KiB.
    pub memory_kib: u64,
}

/// A data drive's ext4 filesystem to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The filesystem's label.
    pub label: String,
    /// The mount point, an absolute path; created if missing.
    pub path: String,
    /// Whether it is mounted read-only.
    #[serde(default)]
    pub read_only: bool,
}

/// The host's MCP request to check the sizes of all drives again, and to grow the filesystems on them; takes [`GrowParams`]. The answer's `problems`
/// lists what could not be grown, as messages.
pub const GROW_REQUEST: &str = "nexus/grow";

/// Parameters of [`GROW_REQUEST`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowParams {
    /// The size that a drive has now, in bytes. The guest's kernel hears of it by itself, perhaps a moment later than its agent. Older guests do not wait for
    /// that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
}

/// The `reason` of a `notifications/cancelled` to a guest if the caller is gone or no longer waits: the answer is not needed, but a command that the
/// call started continues. With any other reason the command is killed.
pub const CUT_OFF: &str = "nexus/cut-off";

/// The key under `_meta` of a call to a guest that holds the client's name.
pub const CLIENT_META: &str = "dev.nexus/client";
/// The key under `_meta` of a guest's question or log message that holds the id of the host's request that it belongs to.
pub const CALL_META: &str = "dev.nexus/call";

/// The key under `_meta` of the host's `initialize` that holds the name of its link, which is the same for each connection that it makes. A guest keeps
/// the calls of a named link for [`CALLS_KEPT`] after its connection was lost.
pub const LINK_META: &str = "dev.nexus/link";
/// The experimental capability of guests that do.
pub const KEEPS_CALLS: &str = "dev.nexus/calls";
/// The experimental capability of guests that take frames right behind the line that opens a TCP stream, so that they need not wait for its answer.
pub const EARLY_DATA: &str = "dev.nexus/early";
/// How long a guest keeps the calls of a link that is not connected.
pub const CALLS_KEPT: std::time::Duration = std::time::Duration::from_secs(30);

/// The host's MCP request on each later connection of a named link: which calls it still waits for; takes [`CallsParams`], returns [`CallsAnswer`]. The
/// answers that got lost with the earlier connection are sent again, those of calls that are under way come when they end, and the guest detaches from
/// calls that are not named.
pub const CALLS_REQUEST: &str = "nexus/calls";

/// Parameters of [`CALLS_REQUEST`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallsParams {
    /// The ids of requests that have no answer yet.
    pub ids: Vec<u64>,
}

/// The answer to [`CALLS_REQUEST`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallsAnswer {
    /// Those of the requests that will not be answered: the guest knows nothing of them.
    pub lost: Vec<u64>,
}

/// The host's MCP request to read a guest's clock, and to correct it; takes [`ClockParams`], returns [`ClockAnswer`]. An older guest answers with the
/// JSON-RPC error -32601, and its clock is not corrected.
pub const CLOCK_REQUEST: &str = "nexus/clock";

/// The host's MCP request that announces a change of the VM's network; takes [`ProxyParams`]. An older guest answers with the JSON-RPC error -32601,
/// and applies the change at its next start.
pub const PROXY_REQUEST: &str = "nexus/proxy";

/// The guest's MCP notification that a command has ended that no call was waiting for; has [`CommandEnded`] as parameters. The host ignores more of
/// them than it wants to know of.
pub const COMMAND_ENDED: &str = "nexus/command-ended";

/// Parameters of [`COMMAND_ENDED`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnded {
    /// The command.
    pub command_id: CommandId,
    /// Its exit status, as a shell reports it.
    pub status: u8,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
}

/// The host's MCP request that sets the hostname; takes [`HostnameParams`]. An older guest answers with the JSON-RPC error -32601, and has the
/// new hostname from its next start on.
pub const HOSTNAME_REQUEST: &str = "nexus/hostname";

/// Parameters of [`HOSTNAME_REQUEST`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostnameParams {
    /// The new hostname.
    pub hostname: String,
}

/// The host's MCP request that reports which connections of the guest's network interface were refused by policy; takes [`RefusedParams`]. The
/// results of commands list them. An older guest answers with the JSON-RPC error -32601.
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
    /// The name or the address of the destination.
    pub host: String,
    /// The port; 0 if there is none.
    pub port: u16,
    /// The reason of the refusal.
    pub reason: DenyReason,
    /// What to do next.
    pub hint: String,
    /// The allow list that the VM needs for this connection; empty if that does not help, or would be too long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

/// Parameters of [`PROXY_REQUEST`], and a part of [`Configure`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyParams {
    /// Whether the proxy listens, and commands get its variables.
    pub enabled: bool,
}

/// Parameters of [`CLOCK_REQUEST`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockParams {
    /// The host's time when it sent this, in nanoseconds since 1970-01-01T00:00:00Z.
    pub time_unix_ns: u64,
    /// How much to add to the guest's clock, in nanoseconds. A difference, because a delayed message would set a wrong time.
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
    /// The MAC address that identifies it.
    pub mac: String,
    /// Its addresses.
    pub addresses: Vec<InterfaceAddress>,
    /// The MTU in bytes, if it is not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The address and its prefix length, such as `10.90.0.2/32`.
    pub address: String,
    /// The default gateway of its family, if this interface leads to it. It need not be in the network of the prefix: the guest adds a route to it on
    /// the interface.
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
    /// The owner: a name, a uid, `uid:gid` or `image`; if absent, the owner of the directory. Older guests always use the owner of the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The guest applied its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The token of the configuration.
    pub token: String,
    /// What could not be applied, as messages; the VM becomes ready anyway.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What a restored guest renewed; present if the configuration has `resume`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
}

/// The guest is shutting down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    /// The token of this boot.
    pub token: String,
    /// What happens after the shutdown.
    pub reason: ByeReason,
    /// Whether the reason is a guess: the image's own init is shutting down and did not say which way. The way the machine ends shows it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guessed: bool,
}

/// The kind of a guest's shutdown.
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
