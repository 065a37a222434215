//! The driver `process`: runs the guest binary as an ordinary process instead of a VMM. It serves the same sockets.

use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_schema::{ByteSize, DriverKind};

use super::{BRING_UP, BringUp, Caps, Driver, DriverError, Facts, Machine, Prepared, ended_with};
use crate::os::paths::vm_files;
use crate::os::process::ProcessHandle;
use crate::vmm::control::Job;
use crate::vmm::process::CommandLine;

const WHAT: &str = "the guest process";

pub(super) static FACTS: Facts = Facts {
    kind: DriverKind::Process,
    caps: CAPS,
    sockets: &[],
    dials: true,
    vmm: None,
    make: || Box::new(Process),
};

const CAPS: Caps = Caps {
    max_vcpus: 32,
    min_memory: ByteSize::mib(16),
    max_drives: 8,
    has_interface: false,
    takes_open_tap: false,
    limits_bandwidth: false,
    can_pause: true,
    pauses_on_full_disk: false,
    checkpoint: false,
    saves_vsock: false,
    fork: false,
    keeps_connections: false,
    can_ask_guest: false,
};

struct Process;

impl Driver for Process {
    fn prepare(&self, job: &Job) -> Result<Prepared, DriverError> {
        Ok(Prepared {
            command: command(job),
            passed: Vec::new(),
            more_log: None,
            lifeline: false,
            walls: None,
            is_jailed: false,
            bring_up: Box::new(Process),
        })
    }
}

fn command(job: &Job) -> CommandLine {
    CommandLine { program: job.plan.binary.clone(), arguments: vec!["--unix".into(), ".".into()] }
}

impl BringUp for Process {
    fn bring_up(self: Box<Self>, process: &ProcessHandle) -> Result<Arc<dyn Machine>, DriverError> {
        let deadline = Instant::now() + BRING_UP;
        loop {
            if Path::new(vm_files::VSOCK).exists() {
                let vmm = ProcessHandle::open_identified(process.pid(), process.start_time());
                let vmm = vmm.map_err(|source| DriverError::Connection { source })?;
                return Ok(Arc::new(Running { process: vmm.ok_or(DriverError::Ended { what: WHAT })? }));
            }
            let ended = process.wait_ended(Duration::from_millis(1));
            if ended.map_err(|source| DriverError::Connection { source })? {
                return Err(DriverError::Ended { what: WHAT });
            }
            if Instant::now() > deadline {
                return Err(DriverError::Late { what: WHAT, seconds: BRING_UP.as_secs() });
            }
        }
    }
}

struct Running {
    process: ProcessHandle,
}

impl Machine for Running {
    fn version(&self) -> &str {
        "process"
    }

    fn shutdown(&self) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { what: WHAT })
    }

    /// Stops and continues the guest's process. Its commands are processes of their own and run on.
    fn set_paused(&self, paused: bool) -> Result<(), DriverError> {
        self.process.set_stopped(paused).map_err(|source| DriverError::Connection { source })
    }

    fn resize_drive(&self, _: usize, _: u64) -> Result<(), DriverError> {
        Err(DriverError::Unsupported { what: WHAT })
    }

    fn ending(&self, status: ExitStatus) -> String {
        ended_with(WHAT, status)
    }
}
