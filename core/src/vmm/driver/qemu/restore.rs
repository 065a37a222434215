//! Restores of a saved guest: a QEMU without a kernel gets the memory, then the state through a pipe, and goes on.
//!
//! ```text
//! prepare: memory filled, pipe made ─> QEMU starts with -incoming defer -S ─> load: migrate-incoming, cont ─> relink
//! ```
//! The guest's memory is a copy of the saved one. QEMU opens its memory for writing, and a guest that has broken out of its VMM could
//! change what other guests go on from.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

use super::pipe::{STATE_MAX, feed};
use super::save::without_memory;
use crate::vmm::driver::DriverError;
use crate::vmm::driver::qmp::Monitor;
use crate::vmm::plan::{Restore, SavedKind};
use crate::vmm::ram;

const WHAT: &str = "qemu";
/// Interval at which QEMU is asked whether it has loaded the state, if it says nothing by itself.
const ASK_AGAIN: Duration = Duration::from_millis(5);

/// The options of a QEMU that waits for a state, instead of those for the kernel.
pub(super) const OPTIONS: [&str; 3] = ["-incoming", "defer", "-S"];

/// The state of a guest that a QEMU is to load.
#[derive(Debug)]
pub(super) struct Incoming {
    state: Vec<u8>,
    pipe: OwnedFd,
    /// The number of the pipe's other end in QEMU.
    number: i32,
    nonce: String,
}

impl Incoming {
    /// Fills the memory of a new VM, and makes the pipe for the state. Returns its reading end, to be passed to QEMU as descriptor `number`.
    pub(super) fn prepare(
        restore: &Restore,
        memory: &File,
        number: i32,
    ) -> Result<(Self, OwnedFd), DriverError> {
        if restore.kind == SavedKind::Private {
            let why = "its memory was saved in parts, which this version does not support";
            return Err(DriverError::NoCheckpoints { what: WHAT, action: "restore", why });
        }
        let state = read_state(&restore.state).map_err(failed("read the state", &restore.state))?;
        fill(&restore.ram, memory).map_err(failed("read the memory", &restore.ram))?;
        let (theirs, pipe) = pipe_with(PipeFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(failed("make a pipe for the state", &restore.state))?;
        Ok((Self { state, pipe, number, nonce: restore.nonce.clone() }, theirs))
    }

    /// Loads the state and lets the guest go on, then calls `relink` with the nonce for the guest's agent. Only this thread may read from the
    /// monitor meanwhile.
    pub(super) fn load(
        self,
        monitor: &Monitor,
        deadline: Instant,
        relink: impl FnOnce(&str) -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let Self { state, pipe, number, nonce } = self;
        monitor.ask(deadline, "migrate-set-capabilities", &without_memory())?;
        monitor.ask(deadline, "migrate-incoming", &json!({ "uri": format!("fd:{number}") }))?;
        // If QEMU ends because of the state, what it says is more use than the broken pipe.
        let fed = feed(pipe, &state, deadline);
        loop {
            let answer = monitor.ask(deadline, "query-status", &Value::Null)?;
            if answer.get("status").and_then(Value::as_str) != Some("inmigrate") {
                break;
            }
            if Instant::now() >= deadline {
                return Err(DriverError::Unanswered {
                    what: WHAT,
                    request: "migrate-incoming".into(),
                    source: io::ErrorKind::TimedOut.into(),
                });
            }
            monitor.linger_alone(ASK_AGAIN);
        }
        fed.map_err(|source| DriverError::Unanswered {
            what: WHAT,
            request: "migrate-incoming".into(),
            source,
        })?;
        // Here QEMU locks the drives.
        monitor.ask(deadline, "cont", &Value::Null)?;
        relink(&nonce)
    }
}

fn read_state(path: &Path) -> io::Result<Vec<u8>> {
    let mut state = Vec::new();
    File::open(path)?.take(STATE_MAX + 1).read_to_end(&mut state)?;
    if state.len() as u64 > STATE_MAX {
        return Err(invalid("it is too long".to_owned()));
    }
    Ok(state)
}

fn fill(path: &Path, memory: &File) -> io::Result<()> {
    let saved = File::open(path)?;
    let (has, needs) = (saved.metadata()?.len(), memory.metadata()?.len());
    if has != needs {
        return Err(invalid(format!("it has {has} bytes, but the VM's memory has {needs}")));
    }
    ram::fill(&saved, memory)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DriverError {
    let path = path.to_owned();
    move |source| DriverError::Restoring { action, path, source }
}

#[cfg(test)]
mod tests;
