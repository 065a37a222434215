//! Starts `nexus-net`, which outlives the daemon that started it.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

use crate::os::site::Site;

/// The file name of its socket, in its directory.
pub(super) const SOCKET: &str = "net.sock";
/// The file name of its log there.
const LOG: &str = "nexus-net.log";
/// Log length from which on the log is truncated, in bytes.
const LOG_MAX: u64 = 1 << 20;
/// Length of the log's end that an error shows, in bytes.
const TAIL: usize = 600;

/// Starts it in its own directory, where it creates its socket. It runs in its own session, and inherits nothing from the daemon.
pub(super) fn start(binary: &Path, directory: &Path, site: Site) -> io::Result<Child> {
    let log = open_log(directory)?;
    let mut command = Command::new(binary);
    match site {
        Site::Host => {}
        Site::Own => drop(command.arg("--own")),
    }
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

/// Returns the end of its log, for an error.
pub(super) fn last_words(directory: &Path) -> String {
    let text = std::fs::read(directory.join(LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL)..]).into_owned();
    text.trim().to_owned()
}
