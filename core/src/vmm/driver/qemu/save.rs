//! Saves of a guest: the state of its devices and processors through QEMU's migration into a pipe, its memory from the file that QEMU and shim
//! share.
//!
//! ```text
//! (stop) ─> set_link off ─> migrate-set-capabilities, getfd, migrate ─> finished ─> set_link on ─> memory copied ─> … (cont)
//! ```
//! With `x-ignore-shared` the memory is not part of the state. The saved guest's network interface is disconnected: it has another guest's
//! address until its agent is told its own.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::pipe::{Drained, drain};
use crate::vmm::control::{Saved, SavedQemu};
use crate::vmm::driver::qmp::Monitor;
use crate::vmm::driver::{DriverError, STATE, SaveFiles};
use crate::vmm::plan::SavedKind;
use crate::vmm::ram;

const WHAT: &str = "qemu";
/// The name under which QEMU keeps the pipe for the state.
const FD_NAME: &str = "state";
/// Interval at which QEMU is asked whether it is done, if it says nothing by itself.
const ASK_AGAIN: Duration = Duration::from_millis(5);
/// Timeout for QEMU to finish with a migration whose result is known.
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// Stack size of the thread that reads the state, in bytes.
const STACK: usize = 128 << 10;

/// What it takes to save the guest of one QEMU.
#[derive(Debug)]
pub(super) struct Saver {
    memory: File,
    /// The length of the memory, in bytes, before a VMM had it.
    bytes: u64,
    has_interface: bool,
    /// Opened when QEMU was started, since an upgrade may replace it.
    binary: File,
    binary_sha256: OnceLock<String>,
}

impl Saver {
    /// Returns the saver of a guest whose memory is the file `memory`, which QEMU has mapped shared.
    pub(super) fn new(memory: File, has_interface: bool, binary: &Path) -> Result<Self, DriverError> {
        let binary = File::open(binary).map_err(saving("open qemu's binary"))?;
        let bytes = memory.metadata().map_err(saving("look at the guest's memory"))?.len();
        Ok(Self { memory, bytes, has_interface, binary, binary_sha256: OnceLock::new() })
    }

    /// Returns the SHA-256 of QEMU's binary. The first call reads all of it.
    pub(super) fn binary_sha256(&self) -> Result<&str, DriverError> {
        if let Some(known) = self.binary_sha256.get() {
            return Ok(known);
        }
        let digest = digest(&self.binary).map_err(saving("read qemu's binary"))?;
        Ok(self.binary_sha256.get_or_init(|| digest))
    }

    /// Writes a paused guest to files. Another thread must call [`Monitor::take`] meanwhile.
    pub(super) fn save(
        &self,
        monitor: &Monitor,
        version: &str,
        files: &SaveFiles,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Saved, DriverError> {
        let binary_sha256 = self.binary_sha256()?.to_owned();
        let started = Instant::now();
        forget_earlier(monitor)?;
        if self.has_interface
            && let Err(error) = set_link(monitor, false)
        {
            // QEMU may still do it.
            set_link(monitor, true).ok();
            return Err(error);
        }
        let state = write_state(monitor, &files.state, Instant::now() + STATE);
        // Also after a failure: the guest goes on with its network.
        let linked = if self.has_interface { set_link(monitor, true) } else { Ok(()) };
        let state = state?;
        linked?;
        let state_ms = milliseconds(started);
        let started = Instant::now();
        let ram = self.copy_memory(&files.ram, is_wanted).map_err(saving("write the guest's memory"))?;
        Ok(Saved {
            state_sha256: state.sha256,
            state_bytes: state.bytes,
            ram_sha256: ram.sha256,
            ram_bytes: ram.bytes,
            state_ms,
            ram_ms: milliseconds(started),
            kind: SavedKind::Shared,
            qemu: SavedQemu { version: version.to_owned(), binary_sha256 },
        })
    }
}

impl Saver {
    /// Copies the memory. A VMM that was taken over may have changed its file's length, where that is not sealed.
    fn copy_memory(&self, to: &File, is_wanted: &dyn Fn() -> bool) -> io::Result<ram::Copied> {
        let as_made = || -> io::Result<()> {
            match self.memory.metadata()?.len() == self.bytes {
                true => Ok(()),
                false => Err(io::Error::new(io::ErrorKind::InvalidData, "its length has changed")),
            }
        };
        as_made()?;
        let copied = ram::copy(&self.memory, to, is_wanted).map_err(|source| match source.kind() {
            io::ErrorKind::Interrupted => io::Error::other("nobody waits for it any more"),
            _ => source,
        })?;
        as_made()?;
        Ok(copied)
    }
}

/// Connects or disconnects the guest's network interface.
pub(super) fn set_link(monitor: &Monitor, up: bool) -> Result<(), DriverError> {
    monitor.execute_with("set_link", &json!({ "name": "net0", "up": up })).map(drop)
}

/// The capability that leaves shared memory out of the state, as an argument of `migrate-set-capabilities`.
pub(super) fn without_memory() -> Value {
    json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] })
}

/// QEMU refuses a second migration of a guest that has been paused since the first one. The guest runs for a moment.
fn forget_earlier(monitor: &Monitor) -> Result<(), DriverError> {
    let status = monitor.execute("query-status")?;
    if status.get("status").and_then(Value::as_str) == Some("postmigrate") {
        monitor.set_paused(false)?;
        monitor.set_paused(true)?;
    }
    Ok(())
}

/// Has QEMU write the state into a pipe, and writes it from there to a file. QEMU may not open files or start programs by itself.
fn write_state(monitor: &Monitor, to: &File, deadline: Instant) -> Result<Drained, DriverError> {
    monitor.execute_with("migrate-set-capabilities", &without_memory())?;
    let (reader, writer) =
        pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).map_err(saving("make a pipe"))?;
    let name = json!({ "fdname": FD_NAME });
    monitor.execute_passing("getfd", &name, writer.as_fd())?;
    // QEMU's copy is the last one, so that its end is the end of the state.
    drop(writer);
    let drained = migrate(monitor, reader, to, deadline)?;
    await_end(monitor, deadline).inspect_err(|_| give_up(monitor))?;
    settle(monitor, false);
    Ok(drained)
}

/// Starts a migration into a pipe, which a thread of its own reads: QEMU may answer only after it has written a part of the state.
fn migrate(monitor: &Monitor, pipe: OwnedFd, to: &File, deadline: Instant) -> Result<Drained, DriverError> {
    std::thread::scope(|scope| {
        let draining = std::thread::Builder::new()
            .name("state".to_owned())
            .stack_size(STACK)
            .spawn_scoped(scope, move || drain(pipe, to, deadline))
            .map_err(saving("start a thread for the guest's state"))?;
        let started = monitor.execute_with("migrate", &json!({ "uri": format!("fd:{FD_NAME}") }));
        if started.is_err() {
            // The thread waits for the pipe's end.
            give_up(monitor);
        }
        let drained = draining.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
        started?;
        drained.map_err(saving("write the guest's state")).inspect_err(|_| give_up(monitor))
    })
}

/// Makes QEMU let go of the pipe after a failure, and waits until it has.
fn give_up(monitor: &Monitor) {
    // Each fails if there is nothing to give up.
    let cancelled = monitor.execute("migrate_cancel");
    monitor.execute_with("closefd", &json!({ "fdname": FD_NAME })).ok();
    if !matches!(cancelled, Err(DriverError::Unanswered { .. })) {
        settle(monitor, true);
    }
}

/// Waits until QEMU has finished with a migration, at most for [`SETTLE_MAX`]. Its thread does that a moment after the result is told, and `cont` is refused
/// until then. One that was given up may still run; as long as it does, another one is refused.
fn settle(monitor: &Monitor, is_given_up: bool) {
    let deadline = Instant::now() + SETTLE_MAX;
    let is = |command: &'static str, words: &[&str]| {
        let answer = monitor.execute(command).ok();
        let status = answer.as_ref().and_then(|answer| answer.get("status")).and_then(Value::as_str);
        status.is_some_and(|status| words.contains(&status))
    };
    while (is_given_up && is("query-migrate", &["setup", "active", "device", "cancelling"]))
        || is("query-status", &["finish-migrate"])
    {
        if Instant::now() >= deadline {
            return;
        }
        monitor.linger(ASK_AGAIN);
    }
}

/// Waits for the result of a migration whose pipe QEMU has closed.
fn await_end(monitor: &Monitor, deadline: Instant) -> Result<(), DriverError> {
    loop {
        let answer = monitor.execute("query-migrate")?;
        let word = |key: &str| answer.get(key).and_then(Value::as_str);
        let refused = |message: &str| DriverError::Refused {
            what: WHAT,
            request: "migrate".into(),
            message: message.into(),
        };
        match word("status") {
            Some("completed") => return Ok(()),
            Some(status @ ("failed" | "cancelled")) => {
                return Err(refused(word("error-desc").unwrap_or(status)));
            }
            _ if Instant::now() >= deadline => return Err(refused("it does not end")),
            _ => monitor.linger(ASK_AGAIN),
        }
    }
}

fn digest(mut file: &File) -> io::Result<String> {
    file.rewind()?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 256 << 10];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(data_encoding::HEXLOWER.encode(&hasher.finalize())),
            Ok(read) => hasher.update(&chunk[..read]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn saving(action: &'static str) -> impl FnOnce(io::Error) -> DriverError {
    move |source| DriverError::Saving { action, source }
}

#[cfg(test)]
mod tests;
