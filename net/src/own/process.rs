//! Processes that outlive `nexus-net`. Each writes its record before it does anything else, so that none is ever lost: a file with the
//! host's boot, its process id and its start time.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::OwnError;
use crate::nft::socket::readable;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Index of the start time among the fields of `/proc/PID/stat` after the name: field 22.
const START_TIME: usize = 19;
/// Timeout of a killed process to disappear.
const END: Duration = Duration::from_secs(5);
/// In place of a record: the process ends with its parent.
pub(super) const UNRECORDED: &str = "-";

/// A process that is running, or has just ended.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    handle: OwnedFd,
}

/// Does what a process that outlives `nexus-net` does first: writes its record, or, for [`UNRECORDED`], binds its life to its parent's.
pub(super) fn begin(record: &OsStr) -> Result<(), OwnError> {
    let path = PathBuf::from(record);
    let failed = |source: io::Error| OwnError::Record { path: path.clone(), source };
    if record == UNRECORDED {
        return rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|error| failed(error.into()));
    }
    // Its own session: signals of a terminal do not reach it. It fails only for the leader of a session.
    let _ = rustix::process::setsid();
    let text =
        identity(std::process::id()).and_then(|text| text.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let mut half = path.clone().into_os_string();
    half.push(".new");
    text.and_then(|text| std::fs::write(&half, text))
        .and_then(|()| std::fs::rename(&half, &path))
        .map_err(failed)
}

/// Returns what tells a process from all others; `None` if there is none with this id.
fn identity(pid: u32) -> io::Result<Option<String>> {
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let boot = std::fs::read_to_string(BOOT_ID)?;
    // The name may contain spaces and parentheses.
    let after = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let started = after.split_whitespace().nth(START_TIME).unwrap_or_default();
    Ok(Some(format!("{pid} {started} {}", boot.trim())))
}

impl Process {
    /// Returns the process of a record, if it is running.
    pub(super) fn find(record: &Path) -> Result<Option<Self>, OwnError> {
        let failed = |source| OwnError::Record { path: record.to_owned(), source };
        let text = match std::fs::read_to_string(record) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let Some(pid) = text.split_whitespace().next().and_then(|pid| pid.parse().ok()) else {
            return Ok(None);
        };
        let Some(process) = Self::open(pid).map_err(failed)? else { return Ok(None) };
        // Compared while the handle is open: it stays with this process even if its id is used again.
        let is_it = identity(pid).map_err(failed)?.is_some_and(|now| now == text.trim());
        Ok(Some(process).filter(|process| is_it && !process.has_ended(Duration::ZERO)))
    }

    /// Returns a child that was just started.
    pub(super) fn of_child(pid: u32) -> io::Result<Self> {
        Self::open(pid)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(number, PidfdFlags::NONBLOCK) {
            Ok(handle) => Ok(Some(Self { pid, handle })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns its process id.
    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end, and returns whether it has ended.
    pub(super) fn has_ended(&self, patience: Duration) -> bool {
        let mut polled = [PollFd::new(std::os::fd::AsFd::as_fd(&self.handle), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        poll(&mut polled, timeout).is_ok_and(|ready| ready > 0)
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) -> io::Result<()> {
        readable(self.handle.try_clone()?)?.readable().await.map(drop)
    }

    /// Kills it, and waits until it has ended.
    pub(super) fn end(self) {
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::warn!(%error, pid = self.pid, "cannot end a process"),
        }
        if !self.has_ended(END) {
            tracing::warn!(pid = self.pid, "a killed process is still there");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn a_recorded_process_is_found_as_long_as_it_runs() {
        let directory = std::env::temp_dir().join(format!("nexus-record-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let record = directory.join("record");
        assert!(Process::find(&record).unwrap().is_none(), "there is no record");
        let mut child = sleeper();
        let text = identity(child.id()).unwrap().unwrap();
        std::fs::write(&record, &text).unwrap();
        assert_eq!(Process::find(&record).unwrap().unwrap().pid(), child.id());
        for other in [
            "".to_owned(),
            "x 1 y".to_owned(),
            "0 0 0".to_owned(),
            text.replace(' ', " 1"),
            format!("{text}x"),
            identity(std::process::id()).unwrap().unwrap().replace(&std::process::id().to_string(), "1"),
        ] {
            std::fs::write(&record, &other).unwrap();
            assert!(Process::find(&record).unwrap().is_none(), "{other}");
        }
        std::fs::write(&record, &text).unwrap();
        Process::find(&record).unwrap().unwrap().end();
        // It is a zombie now, which counts as ended.
        assert!(Process::find(&record).unwrap().is_none());
        child.wait().unwrap();
        assert!(Process::find(&record).unwrap().is_none());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
