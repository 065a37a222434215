//! The protocol between daemon and shim: one JSON object per line on the shim's control socket.
//!
//! A shim is as old as its VM's boot, so a daemon may have to talk to shims of earlier builds: [`wire`](super::wire) handles the
//! differences.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nexus_schema::ByteSize;
use nexus_schema::id::{BootId, VmId};
use serde::{Deserialize, Serialize};

use super::exit::Exit;
use super::plan::{LaunchPlan, SavedKind};

/// Maximum length of a line that either side accepts, in bytes.
pub(crate) const LINE_MAX: usize = 16 << 10;

/// Content of `plan.json`: the plan, and facts that the daemon already knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    /// What to launch.
    pub plan: LaunchPlan,
    /// Rate of the host's time stamp counter, if known.
    pub tsc_khz: Option<u32>,
}

/// Longest time of a [`Request::Hold`].
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(60);

/// A request of the daemon to a shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Return the identity of the shim and of its VMM.
    Status,
    /// Ask the guest, through the VMM, to shut down.
    Shutdown,
    /// End the VMM.
    Kill,
    /// Pause the guest's processors until `resume`, whatever happens to the daemon.
    Pause,
    /// Resume the guest's processors.
    Resume,
    /// Tell the guest that a drive has grown.
    ResizeDrive {
        /// Index among the plan's drives.
        index: usize,
        /// New size in bytes; the file already has it.
        bytes: u64,
    },
    /// Pause the guest's processors for a step of the daemon. The shim resumes them by itself after this time; a repeated request sets the
    /// time anew. Since generation 3.
    Hold {
        /// The time in milliseconds, at most [`HOLD_MAX`].
        ms: u32,
    },
    /// Change the limits of the guest's network interface; a direction without one has none. Since generation 4.
    Limit {
        /// Bytes per second to the guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rx: Option<ByteSize>,
        /// Bytes per second from the guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tx: Option<ByteSize>,
    },
    /// End `hold`. A pause by `pause` stays. Since generation 3.
    Release,
    /// Pause the guest as `hold` does, and write its state and memory to the two files that come with the request. The time of the hold
    /// starts anew with the answer. Since generation 4.
    Save {
        /// The time in milliseconds, at most [`HOLD_MAX`].
        hold_ms: u32,
    },
    /// Connect the guest's network interface, or disconnect it. Since generation 4.
    SetLink {
        /// Whether it is connected.
        up: bool,
    },
    /// Answer when the VMM has ended.
    Wait,
    /// Report why the VMM has paused the guest, now and at each change. Since generation 2.
    Watch,
}

/// A reply of a shim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// To `status`.
    Status(Status),
    /// Done, or passed on to the VMM.
    Done,
    /// Failed, with the reason.
    Refused(String),
    /// To `wait`.
    Ended(Exit),
    /// To `watch`: why the VMM has paused the guest; `None` if it has not.
    Stalled(Option<Stall>),
    /// To `save`.
    Saved(Saved),
}

/// A saved guest: what was written, and by which VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// SHA-256 of the file with the state of the guest's devices and processors, in hexadecimal.
    pub state_sha256: String,
    /// Length of that file.
    pub state_bytes: u64,
    /// SHA-256 of the memory, in hexadecimal: over each page of 4096 bytes that is not all zeros, in order, its offset (64 bits,
    /// little-endian) and its content.
    pub ram_sha256: String,
    /// Total length of these pages.
    pub ram_bytes: u64,
    /// Time that the state took, in milliseconds.
    pub state_ms: u64,
    /// Time that the memory took, in milliseconds.
    pub ram_ms: u64,
    /// How the memory was saved.
    pub kind: SavedKind,
    /// The VMM that wrote the state, which only the same VMM reads.
    pub qemu: SavedQemu,
}

/// The VMM that saved a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQemu {
    /// Its version, as it reports it.
    pub version: String,
    /// SHA-256 of its binary, in hexadecimal.
    pub binary_sha256: String,
}

/// Why a VMM has paused its guest by itself, or refuses its writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Stall {
    /// The host has no space for what the guest writes. If the VMM paused the guest for that, the shim resumes it when there is space.
    DiskFull {
        /// Index of the drive in the plan.
        drive: usize,
    },
}

/// A running shim and its VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The shim's generation. Shims of generation 1 do not send it.
    #[serde(default = "super::wire::unnumbered")]
    pub protocol: u32,
    pub pid: u32,
    pub start_time: u64,
    pub vm: VmId,
    pub boot_id: BootId,
    pub vmm: VmmInfo,
    pub vmm_start_time: u64,
}

/// The VMM process under a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmInfo {
    /// Its pid.
    pub pid: u32,
    /// Its version, as it reports it.
    pub version: String,
}

/// The report of a shim to the daemon that launched it: one line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Launched {
    /// The VMM runs and has accepted its configuration.
    Running(Status),
    /// The VMM does not run. `exit.json` was written if possible.
    Failed(Exit),
}

/// Identity of a shim's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShimIdentity {
    /// Its pid.
    pub pid: u32,
    /// Its start time, in clock ticks since the host's boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

/// An error between daemon and shim.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A file of the VM's directory cannot be used.
    #[error("{action} {path}")]
    File {
        /// The action, such as `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another shim runs in the directory.
    #[error("a VMM is already running in {directory}")]
    AlreadyRunning {
        /// The VM's directory.
        directory: PathBuf,
    },
    /// The shim itself could not be started.
    #[error("cannot start a shim from {binary}")]
    Spawn {
        /// The daemon's binary.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM did not start. Has how it ended, and the last output of the VMM and the guest.
    #[error("{}", launch_message(.driver, .exit, .vmm_log))]
    Launch {
        /// The driver's name.
        driver: &'static str,
        /// How it ended.
        exit: Exit,
        /// The end of the VMM's stderr.
        vmm_log: String,
        /// The end of the console.
        console: String,
    },
    /// The VMM did not start in time and was killed.
    #[error("the VMM {driver} did not start within {seconds} s")]
    LaunchTimeout {
        /// The driver's name.
        driver: &'static str,
        /// The timeout.
        seconds: u64,
    },
    /// The VMM or the shim refused a request.
    #[error("the VMM refused to {action}: {message}")]
    Refused {
        /// The request.
        action: &'static str,
        /// The reason.
        message: String,
    },
    /// The shim does not answer.
    #[error("cannot get the shim with pid {pid} to {action}")]
    Unanswered {
        /// The shim's pid.
        pid: u32,
        /// The request.
        action: &'static str,
        /// Why there is no answer.
        #[source]
        source: io::Error,
    },
}

fn launch_message(driver: &str, exit: &Exit, log: &str) -> String {
    let said = log.trim();
    if said.is_empty() || exit.message.contains(said) {
        format!("the VMM {driver} did not start: {}", exit.message)
    } else {
        format!("the VMM {driver} did not start: {}; its output: {said}", exit.message)
    }
}
