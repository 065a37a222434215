//! Drivers: how each VMM is started, talked to and understood. They run in the shim.
//!
//! ```text
//! Driver::prepare ──> Prepared { command line, .. } ──> the shim spawns it ──> BringUp::bring_up ──> Machine
//! ```
//! A driver never starts or reaps the process itself: that is the shim's, the same for all of them.

pub(crate) mod firecracker;
pub(crate) mod process;
pub(crate) mod qemu;
mod qmp;

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::ByteSize;

use super::control::{Job, Stall};
use super::exit::{self, MachineEnd};
use super::jail::JailError;
use super::plan::DriverKind;
use super::process::CommandLine;
use crate::os::confine::Confinement;
use crate::os::process::ProcessHandle;

/// How long a VMM may take from its start until it took its configuration.
pub(crate) const BRING_UP: Duration = Duration::from_secs(45);
/// How long a VMM may take to answer one request.
pub(crate) const REQUEST: Duration = Duration::from_secs(5);

/// What a driver can do; checked when a VM's spec is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// The most virtual CPUs.
    pub max_vcpus: u32,
    /// The least memory.
    pub min_memory: ByteSize,
    /// The most drives.
    pub max_drives: u32,
    /// Whether the guest's processors can be stopped and let go on.
    pub can_pause: bool,
    /// Whether the VMM can ask a guest to shut down that has no agent. Where it cannot, `ShimClient::shutdown` is accepted but
    /// usual guests do not react to it.
    pub can_ask_guest: bool,
}

/// Why a driver cannot run a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Too many or too few virtual CPUs.
    #[error("{asked} virtual CPUs: the driver takes 1 to {max}")]
    Vcpus {
        /// What was asked for.
        asked: u32,
        /// What there can be.
        max: u32,
    },
    /// Too little memory, or not whole mebibytes.
    #[error("{asked} of memory: the driver takes whole mebibytes, at least {min}")]
    Memory {
        /// What was asked for.
        asked: ByteSize,
        /// What there must be.
        min: ByteSize,
    },
    /// Too many drives.
    #[error("{asked} drives: the driver takes at most {max}")]
    Drives {
        /// What was asked for.
        asked: u32,
        /// What there can be.
        max: u32,
    },
}

impl Caps {
    /// What the driver can do.
    pub const fn of(driver: DriverKind) -> Self {
        match driver {
            DriverKind::Qemu => qemu::CAPS,
            DriverKind::Firecracker => firecracker::CAPS,
            DriverKind::Process => process::CAPS,
        }
    }

    /// Whether the driver can run a VM of this size.
    pub fn check(&self, vcpus: u32, memory: ByteSize, drives: u32) -> Result<(), Unsupported> {
        if vcpus == 0 || vcpus > self.max_vcpus {
            return Err(Unsupported::Vcpus { asked: vcpus, max: self.max_vcpus });
        }
        if memory < self.min_memory || ByteSize::mib(memory.as_mib()) != memory {
            return Err(Unsupported::Memory { asked: memory, min: self.min_memory });
        }
        if drives > self.max_drives {
            return Err(Unsupported::Drives { asked: drives, max: self.max_drives });
        }
        Ok(())
    }
}

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

/// The driver of a kind.
pub(crate) fn driver(kind: DriverKind) -> Box<dyn Driver> {
    match kind {
        DriverKind::Qemu => Box::new(qemu::Qemu),
        DriverKind::Process => Box::new(process::Process),
        DriverKind::Firecracker => Box::new(firecracker::Firecracker),
    }
}

/// An exit status in words, with the VMM's name.
fn ended_with(what: &str, status: ExitStatus) -> String {
    format!("{what} {}", exit::describe(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_against_caps() {
        for kind in [DriverKind::Qemu, DriverKind::Firecracker, DriverKind::Process] {
            let caps = Caps::of(kind);
            assert_eq!(caps.check(1, ByteSize::mib(512), 1), Ok(()));
            assert!(matches!(caps.check(0, ByteSize::mib(512), 1), Err(Unsupported::Vcpus { .. })));
            assert!(matches!(caps.check(33, ByteSize::mib(512), 1), Err(Unsupported::Vcpus { .. })));
            assert!(matches!(
                caps.check(1, ByteSize::bytes((512 << 20) + 1), 1),
                Err(Unsupported::Memory { .. })
            ));
            assert!(matches!(caps.check(1, ByteSize::mib(1), 1), Err(Unsupported::Memory { .. })));
            assert!(matches!(caps.check(1, ByteSize::mib(512), 100), Err(Unsupported::Drives { .. })));
        }
    }
}
