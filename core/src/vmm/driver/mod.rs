//! Drivers: how each VMM is started and controlled. They run in the shim.
//!
//! ```text
//! Driver::prepare ──> Prepared { command line, .. } ──> the shim spawns it ──> BringUp::bring_up ──> Machine
//! ```
//! Each driver is a module here, with its [`Facts`] in the list [`DRIVERS`]. A driver never starts or reaps the process itself: the shim does
//! that in the same way for all of them.

mod facts;
mod firecracker;
mod process;
mod qemu;
mod qmp;

pub use facts::Caps;
pub(crate) use facts::{Closer, DRIVERS, Facts, Vmm, downloaded_programs, facts};

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::network::Bandwidth;

use super::control::{Job, Saved, Stall};
use super::exit::{self, MachineEnd};
use super::jail::JailError;
use super::process::CommandLine;
use crate::os::confine::Confinement;
use crate::os::process::ProcessHandle;

/// Timeout of a VMM from its start until it has accepted its configuration.
pub(crate) const BRING_UP: Duration = Duration::from_secs(45);
/// Timeout of a request to a VMM.
pub(crate) const REQUEST: Duration = Duration::from_secs(5);
/// Timeout of a VMM to write the state of a paused guest.
pub(crate) const STATE: Duration = Duration::from_secs(30);
/// Timeout of a pause: the VMM may write and sync what the guest has written before.
pub(crate) const PAUSE: Duration = Duration::from_secs(30);

/// An error of a VMM's start or of a request to it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriverError {
    #[error("start the vsock device")]
    Vsock {
        #[source]
        source: io::Error,
    },
    #[error("make the guest's memory")]
    Memory {
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
    #[error("{what} ended during its start")]
    Ended { what: &'static str },
    #[error("{what} did not start within {seconds} s")]
    Late { what: &'static str, seconds: u64 },
    #[error("make a jail for the VMM")]
    Jail {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{what} cannot do that")]
    Unsupported { what: &'static str },
    #[error("{action}")]
    Saving {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{action} of the saved guest {path}")]
    Restoring {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what} cannot {action} this VM: {why}")]
    NoCheckpoints { what: &'static str, action: &'static str, why: &'static str },
}

fn jail_failed(source: JailError) -> DriverError {
    DriverError::Jail { source: Box::new(source) }
}

/// Prepares VMMs of one kind.
pub(crate) trait Driver {
    /// Prepares everything up to the command line. The working directory is the VM's.
    fn prepare(&self, job: &Job) -> Result<Prepared, DriverError>;
}

/// A VMM that is ready to be spawned.
pub(crate) struct Prepared {
    pub command: CommandLine,
    /// Descriptors to pass to the VMM, numbered from [`PASSED_FD`](super::process::PASSED_FD) on.
    pub passed: Vec<OwnedFd>,
    /// Pipe whose content goes into the VMM's log in addition to its stderr.
    pub more_log: Option<LogPipe>,
    /// Whether the VMM changes its user during its start: see [`VmmProcess::spawn`](super::process::VmmProcess::spawn).
    pub lifeline: bool,
    /// Confinement of a jail; `None`: the one of [`walls`](super::walls), or the VMM's own.
    pub walls: Option<Confinement>,
    /// Whether it changes to the VM's user, as its shim then has to do.
    pub is_jailed: bool,
    pub bring_up: Box<dyn BringUp>,
}

/// A VMM's own log, and who listens to it.
pub(crate) struct LogPipe {
    pub pipe: File,
    pub listener: LogListener,
}

/// Called with each piece of a log that was read.
pub(crate) type LogListener = Box<dyn FnMut(&[u8]) + Send>;

impl Read for LogPipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.pipe.read(buffer)?;
        (self.listener)(&buffer[..read]);
        Ok(read)
    }
}

impl AsFd for LogPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// A spawned VMM that is not configured yet.
pub(crate) trait BringUp {
    /// Configures the VMM and starts the guest. Fails if the VMM ends, refuses a request or is too slow.
    fn bring_up(self: Box<Self>, process: &ProcessHandle) -> Result<Arc<dyn Machine>, DriverError>;
}

/// The new, empty files that a guest is saved to.
#[derive(Debug)]
pub(crate) struct SaveFiles {
    /// For the state of its devices and processors.
    pub state: File,
    /// For its memory.
    pub ram: File,
}

/// A VMM that runs a guest.
pub(crate) trait Machine: Send + Sync {
    /// Returns the VMM's version, as it reports it.
    fn version(&self) -> &str;

    /// Asks the guest to shut down, as hardware would. May take [`REQUEST`].
    fn shutdown(&self) -> Result<(), DriverError>;

    /// Pauses or resumes the guest's processors. May take [`PAUSE`].
    fn set_paused(&self, paused: bool) -> Result<(), DriverError>;

    /// Tells the guest that the drive at `index` of the plan is now `bytes` long. May take [`REQUEST`].
    fn resize_drive(&self, index: usize, bytes: u64) -> Result<(), DriverError>;

    /// Changes the limits of the guest's network interface, where [`Caps::limits_bandwidth`]. May take [`REQUEST`].
    fn limit(&self, _bandwidth: Bandwidth) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { what: "this VMM" })
    }

    /// Prepares for [`Machine::save`] while the guest still runs, with what takes time. Fails if this machine cannot be saved.
    fn prepare_save(&self) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { what: "this VMM" })
    }

    /// Writes a paused guest to files. It stays paused, and can be resumed. `is_wanted` is asked from time to time; once it is not, this
    /// fails. May take [`STATE`] and as long as the memory takes to be written.
    fn save(&self, _files: &SaveFiles, _is_wanted: &dyn Fn() -> bool) -> Result<Saved, DriverError> {
        Err(DriverError::Unsupported { what: "this VMM" })
    }

    /// Connects the guest's network interface, or disconnects it. May take [`REQUEST`].
    fn set_link(&self, _up: bool) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { what: "this VMM" })
    }

    /// Returns a descriptor that becomes readable when the VMM has sent events.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Reads the VMM's events. Returns false if no more will come. Does not block.
    fn take_events(&self) -> bool {
        false
    }

    /// Returns why the VMM has paused the guest by itself, or refuses its writes, if it reports that. [`Machine::set_paused`] resumes the
    /// guest; if the VMM does not pause, it ends the report until the next refused write.
    fn stall(&self) -> Option<Stall> {
        None
    }

    /// Returns how the guest ended its machine, if the VMM reports it.
    fn end(&self) -> Option<MachineEnd> {
        None
    }

    /// Describes the end of the VMM.
    fn ending(&self, status: ExitStatus) -> String;
}

/// Describes an exit status, with the VMM's name.
fn ended_with(what: &str, status: ExitStatus) -> String {
    format!("{what} {}", exit::describe(status))
}
