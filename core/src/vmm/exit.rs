//! How a VMM ended: `exit.json` in the VM's directory, written by its shim.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use serde::{Deserialize, Serialize};

use super::wire;
use crate::os::paths::vm_files;

/// Maximum size of `exit.json` that is read, in bytes. Real files are far smaller.
const FILE_MAX: u64 = 64 << 10;

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The VMM's exit status; `None` if a signal ended it or if it is unknown.
    pub code: Option<i32>,
    /// The signal that ended the VMM.
    pub signal: Option<i32>,
    /// Whether the daemon requested it, by shutdown or kill.
    pub by_request: bool,
    /// Whether the shim died without a report. It is then not known how the VMM ended.
    #[serde(default)]
    pub shim_lost: bool,
    /// What the guest did to its machine, if the VMM reports it.
    #[serde(default)]
    pub machine: Option<MachineEnd>,
    /// What happened, for people.
    pub message: String,
}

/// How a guest ended its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineEnd {
    /// Reset: a reboot, or a guest's way to end the machine.
    Reset,
    /// Powered off.
    Off,
}

impl Exit {
    /// Returns the end of a VMM whose exit status is known.
    pub(crate) fn seen(status: ExitStatus, by_request: bool, message: String) -> Self {
        Self {
            code: status.code(),
            signal: status.signal(),
            by_request,
            shim_lost: false,
            machine: None,
            message,
        }
    }

    /// Returns the end of a VMM that never ran.
    pub(crate) fn never_ran(message: String) -> Self {
        Self { code: None, signal: None, by_request: false, shim_lost: false, machine: None, message }
    }

    /// Returns the end of a VMM whose shim died without a report.
    pub(crate) fn lost() -> Self {
        Self {
            code: None,
            signal: None,
            by_request: false,
            shim_lost: true,
            machine: None,
            message: "the VM's shim died, and its VMM with it".to_owned(),
        }
    }
}

/// Describes an exit status: `exited with status 1`, `was killed by SIGKILL`.
pub(crate) fn describe(status: ExitStatus) -> String {
    if let Some(code) = status.code() {
        return format!("exited with status {code}");
    }
    match status.signal().map(nix::sys::signal::Signal::try_from) {
        Some(Ok(signal)) => format!("was killed by {signal}"),
        _ => format!("ended with {status}"),
    }
}

/// Reads how the last VMM of a VM's directory ended; `None` if none has ended since the last launch, or if the file is
/// invalid. Unknown fields of later builds are ignored.
pub fn read_exit(directory: &Path) -> Option<Exit> {
    let file = crate::os::regular::open(&directory.join(vm_files::EXIT)).ok()?;
    serde_json::from_reader(std::io::Read::take(file, FILE_MAX)).ok()
}

/// Writes `exit.json` atomically, and returns once it is synced.
pub(crate) fn write_exit(directory: &Path, exit: &Exit) -> std::io::Result<()> {
    write_atomic(&directory.join(vm_files::EXIT), &wire::write_numbered(exit)?, true)
}

/// Replaces a file whole or not at all. With `lasting`, it and its directory are synced before this returns. Blocks.
pub(crate) fn write_atomic(file: &Path, content: &[u8], lasting: bool) -> std::io::Result<()> {
    let temporary = file.with_added_extension("new");
    let written = fs_err::File::create(&temporary).and_then(|mut new| {
        new.write_all(content)?;
        if lasting {
            new.sync_all()?;
        }
        fs_err::rename(&temporary, file)
    });
    if written.is_err() {
        // Half a file takes room on a disk that may be full.
        std::fs::remove_file(&temporary).ok();
    }
    written?;
    match file.parent() {
        Some(directory) if lasting => fs_err::File::open(directory)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_round_trip_and_garbage_is_none() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read_exit(directory.path()), None);
        let exit = Exit::seen(ExitStatus::from_raw(9), true, "was killed".into());
        assert_eq!((exit.code, exit.signal), (None, Some(9)));
        write_exit(directory.path(), &exit).unwrap();
        assert_eq!(read_exit(directory.path()), Some(exit));
        std::fs::write(directory.path().join(vm_files::EXIT), b"{\"code\":").unwrap();
        assert_eq!(read_exit(directory.path()), None);
    }

    #[test]
    fn statuses_in_words() {
        assert_eq!(describe(ExitStatus::from_raw(1 << 8)), "exited with status 1");
        assert_eq!(describe(ExitStatus::from_raw(9)), "was killed by SIGKILL");
    }
}
