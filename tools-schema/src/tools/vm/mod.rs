//! VMs: create, list, inspect, wait, start, stop, restart, pause, resume, delete, update, rename, logs, history.

mod delete;
mod file;
mod history;
mod network;
mod pause;
mod publish;
mod rename;
mod restart;
mod run;
mod update;
mod wait;
mod words;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, CheckpointId, DriveId, ImageId, VmId, VmKind};
use crate::link::{ImageConfig, ImageMetadata, InitMode};
use crate::name::{Name, Reference};
use crate::size::ByteSize;
use crate::span::TimeSpan;
use crate::time::Timestamp;
use crate::tool::{Effect, ResultShape, Tool};
use crate::tools::OpOutcome;
use crate::tools::plan::Creation;

pub use self::delete::{DeletedVm, UndeletedVm, VmDelete, VmDeleteOutput, VmDeleteParams};
pub use self::file::VmFile;
pub use self::history::{VmHistory, VmHistoryOutput, VmHistoryParams, VmTransition};
pub use self::network::{DeniedConnection, NetworkCounts, NetworkInterface, NetworkParams, VmNetwork};
pub use self::pause::{VmPause, VmPauseParams, VmResume, VmResumeParams};
pub use self::publish::{
    PublishedPort, VmPublish, VmPublishParams, VmUnpublish, VmUnpublishOutput, VmUnpublishParams,
};
pub use self::rename::{VmRename, VmRenameParams};
pub use self::restart::{VmRestart, VmRestartParams};
pub use self::run::VmRun;
pub use self::update::{VmUpdate, VmUpdateParams};
pub use self::wait::{VmWait, VmWaitOutput, VmWaitParams};
pub use self::words::{DriverChoice, IdleAction, NextStep, VmState};

/// Creates a VM.
pub enum VmCreate {}

/// Arguments of `vm_create`; all of them have defaults.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCreateParams {
    /// The VM's name; made up when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What its root drive is made from: an image's name or `image:NAME`, `template:NAME`, or `file:PATH` on the host. Built in:
    /// `debian` (default: apt, Python with pip, git, curl), `debian-minimal` and `busybox` (tiny, boots fastest); made on first
    /// use. Or `rootfs:alpine@3.21` (PROVIDER@VERSION), downloaded if it is not here, or `oci:python:3.12-slim` of a registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Kernel: an installed asset's name or id, or `file:PATH` on the host (default: the distribution's).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Virtual CPUs, 1 to 32 (default 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 32))]
    pub vcpus: Option<u32>,
    /// Memory, 64MiB to 1TiB (default 1GiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Size of the root drive, sparse (default 8GiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ByteSize>,
    /// Which VMM to use (default auto).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<DriverChoice>,
    /// What is PID 1: `agent` (default, fastest) or `system` (the image's own init, such as systemd).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitMode>,
    /// What it may reach (default: the internet by a proxy, `{"mode": "proxy", "preset": "internet"}`; or `nat`, `none`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkParams>,
    /// The hostname inside; default: the VM's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Environment variables of every command in the VM.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Files to write before it is first ready: absolute path to content, or to an object with mode and owner.
    /// Missing directories are made. At most 1 MiB together; for more use guest_copy_in.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, VmFile>,
    /// Labels for finding it again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Refuse deletion until vm_update unprotects it (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protected: Option<bool>,
    /// Start it at once (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<bool>,
    /// Delete it so long from now, such as `2h` (default never); a protected one is only stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// Stop it once it was idle so long: no command, call, stream or connection (default never).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// What idle_stop does; `suspend` needs `checkpoints`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_action: Option<IdleAction>,
    /// Allow checkpoints of it (default: with firecracker).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<bool>,
    /// A shell line to run in it; then the VM is deleted, and `run` of the result has output and exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// Change nothing: the reply has a `plan` of what would be done (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// Seconds to wait until it is ready (default 30, at most 45); 0 returns at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Any key: the same key and arguments give the same VM within 24 h, not a second one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub idempotency_key: Option<String>,
}

impl Tool for VmCreate {
    const NAME: &'static str = "vm_create";
    const TITLE: &'static str = "Create a VM";
    const DESCRIPTION: &'static str = "Creates a new Linux microVM and starts it; use it whenever you need a machine of your \
        own to run commands, build, test or try something without touching the host. With no arguments you get Debian \
        with 1 vCPU, 1 GiB of memory, an 8 GiB disk and the internet by a proxy. It waits until the VM is ready; if \
        `done` is false, call op_get with the op_id. Then work inside with guest_run_command, guest_file_write and the other \
        guest_ tools, giving the VM's name as `vm`. The first VM on a host takes about a minute more.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = VmCreateParams;
    type Output = Creation<VmDetails>;
}

/// A VM in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmSummary {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Its state.
    pub state: VmState,
    /// Why it is in that state, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The image that its root drive was made from.
    pub image: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// When it was created.
    pub created_at: Timestamp,
    /// The current or last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// When it will be deleted; absent for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Whether deletion is refused.
    pub protected: bool,
    /// Its labels.
    pub tags: BTreeMap<String, String>,
}

/// Everything about a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmDetails {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Its state.
    pub state: VmState,
    /// Why it is in that state, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who made it.
    pub owner: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// The VMM that runs it.
    pub driver: String,
    /// The VMM's version, once it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_version: Option<String>,
    /// `kvm` or `tcg` (software emulation), once it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<String>,
    /// What is PID 1.
    pub init: InitMode,
    /// The network.
    #[serde(deserialize_with = "network::plain_or_whole")]
    pub network: VmNetwork,
    /// A note on the network, such as that there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_note: Option<String>,
    /// The image of its root drive.
    pub image: VmImage,
    /// The kernel.
    pub kernel: String,
    /// Its drives.
    pub drives: Vec<VmDrive>,
    /// What the running guest reported of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<VmGuest>,
    /// The process and its files, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<VmProcess>,
    /// What it uses of the host; only in the result of `vm_inspect`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<VmUsage>,
    /// The current or last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// The vsock context id.
    pub cid: u32,
    /// How a person gets into it.
    #[serde(default)]
    pub connect: VmConnect,
    /// Its ports that are published on the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<PublishedPort>,
    /// The console's file on the host.
    pub console_log: String,
    /// Where the time of the last boot went, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<VmTimings>,
    /// Whether deletion is refused.
    pub protected: bool,
    /// Its labels.
    pub tags: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was started last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it will be deleted, or stopped if it is protected; absent for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// How long it may be idle before it is stopped or suspended; absent for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// What happens to it then; absent for `stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_action: Option<IdleAction>,
    /// When it will be stopped or suspended if it stays idle; absent while something is under way in it, or if it is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop_at: Option<Timestamp>,
    /// The VM that it was forked from, while that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<VmId>,
    /// The checkpoint that it goes on from: the last one that was taken of it, or the one that it was restored from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_id: Option<CheckpointId>,
    /// How the command of `run` ended, in the result of the vm_create that had one; the VM is deleted then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<VmRun>,
    /// Counts every change of state.
    pub generation: u64,
}

/// What a VM uses of its host. Its network is counted in `network.counts`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmUsage {
    /// The CPU time that its VMM has used in this boot, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
    /// The memory that its VMM occupies, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// What its drives occupy on the host's disk, in bytes; blocks shared with images count as well.
    pub disk_bytes: u64,
}

/// How a person gets into a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmConnect {
    /// A command line for a shell on the host that opens a terminal in the VM.
    pub shell: String,
}

/// The image of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmImage {
    /// Its id; absent if the image was deleted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ImageId>,
    /// Its name.
    pub name: String,
    /// The distribution, such as `debian-12`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distro: Option<String>,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// How it means to be run, where it says so: user, entry point, command, working directory and environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ImageConfig>,
    /// What it was derived from, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lineage: Vec<String>,
}

/// A drive of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmDrive {
    /// Its id.
    pub id: DriveId,
    /// Its name.
    pub name: Name,
    /// Whether it is the root drive.
    pub root: bool,
    /// Where the guest mounts it; the root drive is at `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// Its size.
    pub size: ByteSize,
    /// Its file on the host.
    pub path: String,
}

/// What a guest reported of itself at its hello.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmGuest {
    /// The protocol generation that is spoken with it.
    pub protocol: u32,
    /// The version of the guest binary.
    pub build: String,
    /// The kernel's release.
    pub kernel: String,
    /// `PRETTY_NAME` of its operating system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// What its image says of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageMetadata>,
    /// What of its configuration could not be applied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// The process of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmProcess {
    /// The VMM's process id.
    pub pid: u32,
    /// The process id of the shim that is its parent.
    pub shim_pid: u32,
    /// The Unix socket of its vsock device.
    pub vsock_socket: String,
    /// The directory of the VM on the host.
    pub directory: String,
    /// The walls around the VMM, in `vm_inspect`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub walls: Option<VmWalls>,
}

/// The walls around a VMM, as the host's kernel tells of its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmWalls {
    /// The host's user that it runs as.
    pub uid: u32,
    /// Whether it can never gain privileges.
    pub no_new_privileges: bool,
    /// Whether it has any of root's capabilities.
    pub capabilities: bool,
    /// Whether its system calls are filtered.
    pub seccomp: bool,
    /// Whether it sees a root directory of its own.
    pub own_root: bool,
    /// The namespaces that it does not share with the daemon, such as `net`.
    pub namespaces: Vec<String>,
    /// The limits of its control group, by the kernel's names.
    #[serde(default)]
    pub limits: BTreeMap<String, String>,
}

/// Where the time of a boot went, each step in milliseconds after the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmTimings {
    /// Drives, initramfs and plan.
    pub plan_ms: u64,
    /// Until the VMM process runs.
    pub spawn_ms: u64,
    /// Until the guest's hello (kernel and agent).
    pub boot_ms: u64,
    /// From the start of the kernel to the hello, by the guest's own clock.
    pub guest_uptime_ms: u64,
    /// Until the configuration was applied.
    pub configure_ms: u64,
    /// Until the MCP link stood.
    pub link_ms: u64,
    /// All of it.
    pub total_ms: u64,
}

/// Lists VMs.
pub enum VmList {}

/// Arguments of `vm_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmListParams {
    /// Only VMs in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<VmState>,
    /// Only VMs with all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `vm_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmListOutput {
    /// The VMs, by name.
    pub vms: Vec<VmSummary>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for VmList {
    const NAME: &'static str = "vm_list";
    const TITLE: &'static str = "List VMs";
    const DESCRIPTION: &'static str = "Lists the VMs with their state, image and size; use it to see what exists before you create or reuse one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = VmListParams;
    type Output = VmListOutput;
}

/// Arguments that name one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmInspectParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// With what concerns its host alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verbose: Option<bool>,
}

/// Shows one VM.
pub enum VmInspect {}

impl Tool for VmInspect {
    const NAME: &'static str = "vm_inspect";
    const TITLE: &'static str = "Inspect a VM";
    const DESCRIPTION: &'static str = "Shows one VM: state, why, boot id, addresses, drives, image, guest; use it when a VM misbehaves or could not reach something: \
        `network` has what was refused and why.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = VmInspectParams;
    type Output = VmDetails;
}

/// Starts a VM.
pub enum VmStart {}

/// Arguments of `vm_start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStartParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Give a suspended VM's memory up and start it from its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold: Option<bool>,
    /// Seconds to wait until it is ready (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for VmStart {
    const NAME: &'static str = "vm_start";
    const TITLE: &'static str = "Start a VM";
    const DESCRIPTION: &'static str = "Starts a VM that does not run, and waits until its tools work; use it to bring a stopped VM back with its disk as it was. A suspended VM is woken, a running one left alone.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = VmStartParams;
    type Output = OpOutcome<VmDetails>;
}

/// Stops a VM.
pub enum VmStop {}

/// Arguments of `vm_stop`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStopParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// Cut its power instead (default false). Unwritten data is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// Seconds to wait until it is down (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for VmStop {
    const NAME: &'static str = "vm_stop";
    const TITLE: &'static str = "Stop a VM";
    const DESCRIPTION: &'static str = "Shuts a VM down cleanly: commands end, disks are synced, and one that does not go down in time is killed; \
        use it when you are done with a VM but want to keep its disk. A stopped VM is left alone.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = VmStopParams;
    type Output = OpOutcome<VmDetails>;
}

/// Reads a VM's console.
pub enum VmLogs {}

/// Arguments of `vm_logs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmLogsParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// `cursor` of the reply before (default: the end).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// How many bytes at most (default 32768, at most 48000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 48000))]
    pub max_bytes: Option<u32>,
    /// Seconds to wait for something new if there is nothing (default 0, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// As it came, with escape sequences.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
}

/// The structured result of `vm_logs`; the log itself is the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmLogsOutput {
    /// The console's text; bytes that are not UTF-8 are replaced.
    pub text: String,
    /// The `cursor` of the next call.
    pub cursor: String,
    /// Bytes that were lost because the log was rotated before they were read.
    pub lost_bytes: u64,
}

impl Tool for VmLogs {
    const NAME: &'static str = "vm_logs";
    const TITLE: &'static str = "Read a VM's console";
    const DESCRIPTION: &'static str = "Reads what a VM printed on its console (kernel messages, init, panics); use it when a VM \
        does not come up or went down by itself. Without `cursor` it shows the end; the returned one reads on, and `wait_s` waits for more.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = VmLogsParams;
    type Output = VmLogsOutput;
}
