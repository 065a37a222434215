//! Starting `nexus-net`, which outlives whoever started it.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

/// The name of its socket, in its directory.
pub(super) const SOCKET: &str = "net.sock";
/// The name of its log there.
const LOG: &str = "nexus-net.log";
/// From this length on, in bytes, the log is begun anew.
const LOG_MAX: u64 = 1 << 20;
/// How much of the log's end an error shows, in bytes.
const TAIL: usize = 600;

/// Starts it in a directory of its own, in which it makes its socket. It gets a session of its own, and nothing of the daemon's.
pub(super) fn start(binary: &Path, directory: &Path) -> io::Result<Child> {
    let log = open_log(directory)?;
    let mut command = Command::new(binary);
    command
        .arg(SOCKET)
        .current_dir(directory)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(false);
    command.as_std_mut().process_group(0);
    command.spawn()
}

fn open_log(directory: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let log = File::options().append(true).create(true).mode(0o600).open(directory.join(LOG))?;
    if log.metadata()?.len() > LOG_MAX {
        log.set_len(0)?;
    }
    Ok(log)
}

/// The end of its log, for an error.
pub(super) fn last_words(directory: &Path) -> String {
    let text = std::fs::read(directory.join(LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL)..]).into_owned();
    text.trim().to_owned()
}
