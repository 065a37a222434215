//! What daemon and shim say to each other: one JSON object per line on the shim's control socket.
//!
//! A shim is as old as its VM's boot, so a daemon meets shims of earlier builds: [`wire`](super::wire) writes and reads what
//! differs between them.

use std::io;
use std::path::PathBuf;

use nexus_schema::id::{BootId, VmId};
use serde::{Deserialize, Serialize};

use super::exit::Exit;
use super::plan::LaunchPlan;

/// The longest line that either side takes, in bytes.
pub(crate) const LINE_MAX: usize = 16 << 10;

/// `plan.json`: the plan, and what the shim shall not have to find out again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    /// What to launch.
    pub plan: LaunchPlan,
    /// The rate of the host's time stamp counter, where one is known.
    pub tsc_khz: Option<u32>,
}

/// What the daemon asks of a shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Who are you, and whom do you hold?
    Status,
    /// Ask the guest, through the VMM, to shut down.
    Shutdown,
    /// End the VMM.
    Kill,
    /// Stop the guest's processors.
    Pause,
    /// Let them go on.
    Resume,
    /// Let the guest see that a drive has grown.
    ResizeDrive {
        /// Its place among the plan's drives.
        index: usize,
        /// Its new size in bytes; its file has it already.
        bytes: u64,
    },
    /// Answer when the VMM has ended.
    Wait,
    /// Answer with what keeps the guest from running, now and at each change. Since generation 2.
    Watch,
}

/// What a shim answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// To `status`.
    Status(Status),
    /// It was done, or the VMM was asked.
    Done,
    /// It could not be done.
    Refused(String),
    /// To `wait`.
    Ended(Exit),
    /// To `watch`: what keeps the guest from running; `None` when nothing does.
    Stalled(Option<Stall>),
}

/// Why a VMM has paused its guest by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Stall {
    /// The host has no room for what the guest writes. The shim lets it go on when there is room.
    DiskFull {
        /// The drive's place in the plan.
        drive: usize,
    },
}

/// One live shim and its VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The generation that the shim speaks. Shims of generation 1 do not say it.
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
    /// Its version, as it says itself.
    pub version: String,
}

/// The one line that a shim sends to the daemon that launched it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Launched {
    /// The VMM runs and took its configuration.
    Running(Status),
    /// It does not; `exit.json` is written where that was possible.
    Failed(Exit),
}

/// Which process a shim is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShimIdentity {
    /// Its pid.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

/// What fails between daemon and shim.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A file of the VM's directory cannot be used.
    #[error("{action} {path}")]
    File {
        /// What was tried, such as `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another shim lives in the directory.
    #[error("a VMM already runs in {directory}")]
    AlreadyRunning {
        /// The VM's directory.
        directory: PathBuf,
    },
    /// The shim itself could not be started.
    #[error("start a shim from {binary}")]
    Spawn {
        /// The daemon's binary.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM did not come up. How it ended, and the last that it and its guest wrote.
    #[error("{}", launch_message(.driver, .exit, .vmm_log))]
    Launch {
        /// The driver's word.
        driver: &'static str,
        /// How it ended.
        exit: Exit,
        /// The end of what the VMM wrote to stderr.
        vmm_log: String,
        /// The end of the console.
        console: String,
    },
    /// The VMM is not up in time. It was ended.
    #[error("the VMM {driver} was not up within {seconds} s")]
    LaunchTimeout {
        /// The driver's word.
        driver: &'static str,
        /// The time it had.
        seconds: u64,
    },
    /// The VMM did not do what was asked.
    #[error("the VMM refused to {action}: {message}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// What it said.
        message: String,
    },
    /// The shim does not answer.
    #[error("ask the shim with pid {pid} to {action}")]
    Unanswered {
        /// The shim's pid.
        pid: u32,
        /// What was asked.
        action: &'static str,
        /// Why there is no answer.
        #[source]
        source: io::Error,
    },
}

fn launch_message(driver: &str, exit: &Exit, log: &str) -> String {
    let said = log.trim();
    if said.is_empty() || exit.message.contains(said) {
        format!("the VMM {driver} did not come up: {}", exit.message)
    } else {
        format!("the VMM {driver} did not come up: {}; it said: {said}", exit.message)
    }
}
