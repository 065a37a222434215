//! Drivers: how each VMM is started, talked to and understood. They run in the shim.
//!
//! ```text
//! Driver::prepare ──> Prepared { command line, .. } ──> the shim spawns it ──> BringUp::bring_up ──> Machine
//! ```
//! A driver is a folder here, with its [`Facts`] in the list [`DRIVERS`]. It never starts or reaps the process itself: that is the shim's,
//! the same for all of them.

mod facts;
mod firecracker;
mod process;
mod qemu;
mod qmp;

pub use facts::Caps;
pub(crate) use facts::{Closer, DRIVERS, Facts, Vmm, downloaded_programs, facts};

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use super::control::{Job, Stall};
use super::exit::{self, MachineEnd};
use super::jail::JailError;
use super::process::CommandLine;
use crate::os::confine::Confinement;
use crate::os::process::ProcessHandle;

/// How long a VMM may take from its start until it took its configuration.
pub(crate) const BRING_UP: Duration = Duration::from_secs(45);
/// How long a VMM may take to answer one request.
pub(crate) const REQUEST: Duration = Duration::from_secs(5);

/// What fails while a VMM is brought up or asked for something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriverError {
    #[error("start the vsock device")]
    Vsock {
        #[source]
        source: io::Error,
    },
    #[error("make a connection for the VMM")]
    Connection {
        #[source]
        source: io::Error,
    },
    #[error("connect to the network device {tap}")]
    Tap {
        tap: String,
        #[source]
        source: io::Error,
    },
    #[error("{what} did not answer {request}")]
    Unanswered {
        what: &'static str,
        request: String,
        #[source]
        source: io::Error,
    },
    #[error("{what} refused {request}: {message}")]
    Refused { what: &'static str, request: String, message: String },
    #[error("{what} ended while it was brought up")]
    Ended { what: &'static str },
    #[error("{what} was not up within {seconds} s")]
    Late { what: &'static str, seconds: u64 },
    #[error("make a jail for the VMM")]
    Jail {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{what} cannot do that")]
    Unsupported { what: &'static str },
}

fn jail_failed(source: JailError) -> DriverError {
    DriverError::Jail { source: Box::new(source) }
}

/// Makes VMMs of one kind.
pub(crate) trait Driver {
    /// Makes everything ready up to the command line. The working directory is the VM's.
    fn prepare(&self, job: &Job) -> Result<Prepared, DriverError>;
}

/// A VMM that is to be spawned.
pub(crate) struct Prepared {
    pub command: CommandLine,
    /// Descriptors that the VMM gets, from [`PASSED_FD`](super::process::PASSED_FD) on.
    pub passed: Vec<OwnedFd>,
    /// What goes into the VMM's log beside its stderr.
    pub more_log: Option<File>,
    /// Whether the VMM changes its user on the way: see [`VmmProcess::spawn`](super::process::VmmProcess::spawn).
    pub lifeline: bool,
    /// The walls of a jail around it; `None`: those of [`walls`](super::walls), or its own.
    pub walls: Option<Confinement>,
    /// Whether it becomes its VM's user, as its shim is to do.
    pub is_jailed: bool,
    pub bring_up: Box<dyn BringUp>,
}

/// A VMM that was spawned and is to be told what to run.
pub(crate) trait BringUp {
    /// Returns once the guest runs, or with an error when the VMM ended, refused or was too slow.
    fn bring_up(self: Box<Self>, process: &ProcessHandle) -> Result<Arc<dyn Machine>, DriverError>;
}

/// A VMM that runs a guest.
pub(crate) trait Machine: Send + Sync {
    /// The VMM's version, as it says itself.
    fn version(&self) -> &str;

    /// Asks the guest, as hardware would, to shut down. May take [`REQUEST`].
    fn shutdown(&self) -> Result<(), DriverError>;

    /// Stops the guest's processors or lets them go on. May take [`REQUEST`].
    fn set_paused(&self, paused: bool) -> Result<(), DriverError>;

    /// Lets the guest see that the drive at `index` of the plan is `bytes` long now. May take [`REQUEST`].
    fn resize_drive(&self, index: usize, bytes: u64) -> Result<(), DriverError>;

    /// What becomes readable when the VMM has something to tell.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Reads what it has to tell; false when it will tell nothing more. Does not block.
    fn take_events(&self) -> bool {
        false
    }

    /// Why the VMM has paused the guest by itself, where it tells. [`Machine::set_paused`] lets the guest go on.
    fn stall(&self) -> Option<Stall> {
        None
    }

    /// What the guest did to its machine, where the VMM tells.
    fn end(&self) -> Option<MachineEnd> {
        None
    }

    /// What the end of the VMM means, in words.
    fn ending(&self, status: ExitStatus) -> String;
}

/// An exit status in words, with the VMM's name.
fn ended_with(what: &str, status: ExitStatus) -> String {
    format!("{what} {}", exit::describe(status))
}
