//! The holder: a process in the namespace that only sleeps, without any capability. While it runs, the namespace can be entered.

use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};

use super::OwnError;
use super::process::{self, Process, UNRECORDED};
use crate::privileges;

/// This program, even if its file was replaced.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";
/// Timeout of its start.
const START: Duration = Duration::from_secs(10);
const READY: &[u8] = b"ready\n";
const WHAT: &str = "the holder of the network namespace";

/// The namespaces of a new holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Namespaces {
    /// New ones.
    New,
    /// Those of the process that starts it.
    Same,
}

impl Namespaces {
    /// Returns its word on the command line.
    const fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Same => "same",
        }
    }

    /// Returns the namespaces that a word names.
    pub(crate) fn of(word: &OsStr) -> Option<Self> {
        [Self::New, Self::Same].into_iter().find(|one| word == one.word())
    }
}

/// Starts a holder, with its record; without one it ends with this process.
pub(super) fn start(record: Option<&Path>, namespaces: Namespaces) -> Result<Process, OwnError> {
    let failed = |source| OwnError::Start { what: WHAT, source };
    let mut child = Command::new(OWN_PROGRAM)
        .arg("--hold")
        .arg(record.map_or(UNRECORDED.as_ref(), Path::as_os_str))
        .arg(namespaces.word())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let process = Process::of_child(child.id()).map_err(failed)?;
    match is_ready(child.stdout.take()).map_err(failed)? {
        Some(true) => Ok(process),
        Some(false) => Err(OwnError::Ended { what: WHAT, said: last_words(&mut child) }),
        None => {
            process.end();
            Err(OwnError::Late { what: WHAT, seconds: START.as_secs() })
        }
    }
}

/// Waits until the holder says that it is ready. `None`: it did not within [`START`].
fn is_ready(stdout: Option<ChildStdout>) -> io::Result<Option<bool>> {
    let Some(mut stdout) = stdout else { return Ok(Some(false)) };
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::try_from(START).unwrap_or(PollTimeout::MAX))? == 0 {
        return Ok(None);
    }
    let mut said = [0; READY.len()];
    // It is written at once, or the process has ended.
    let read = stdout.read(&mut said)?;
    Ok(Some(&said[..read] == READY))
}

/// Returns the last line of a process that has failed.
pub(super) fn last_words(child: &mut Child) -> String {
    let mut said = String::new();
    let _ = child.kill();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut said);
    }
    let _ = child.wait();
    said.trim().lines().next_back().unwrap_or_default().to_owned()
}

/// Returns whether a process is in another user namespace than this one.
pub(super) fn is_apart(pid: u32) -> bool {
    let user = |of: &str| std::fs::metadata(format!("/proc/{of}/ns/user")).map(|file| file.ino());
    matches!((user(&pid.to_string()), user("self")), (Ok(its), Ok(own)) if its != own)
}

/// Runs the holder: makes the namespaces, says that it is ready, and sleeps until it is killed.
pub(crate) fn hold(record: &OsStr, namespaces: Namespaces) -> Result<(), OwnError> {
    process::begin(record)?;
    if namespaces == Namespaces::New {
        make().map_err(|source| OwnError::Namespaces { source })?;
    }
    privileges::give_up_all()
        .map_err(|error| OwnError::Start { what: WHAT, source: io::Error::other(error) })?;
    io::stdout()
        .write_all(READY)
        .and_then(|()| io::stdout().flush())
        .map_err(|source| OwnError::Start { what: WHAT, source })?;
    loop {
        nix::unistd::pause();
    }
}

/// Makes a user namespace in which this process's user is root, and a network namespace that belongs to it.
fn make() -> io::Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    // The kernel lets an ordinary user map its group only once supplementary groups cannot be changed any more.
    for (name, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {} 1", user.as_raw())),
        ("gid_map", format!("0 {} 1", group.as_raw())),
    ] {
        std::fs::write(format!("/proc/self/{name}"), text)?;
    }
    Ok(())
}
