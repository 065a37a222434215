//! Saves of a running guest, from the daemon's side.
//!
//! ```text
//! save: files made ─> shim holds the guest, writes state and memory ─> Saved ─> the daemon copies the drives ─> release_guest
//!                                                                       └─ not in time: the shim resumes the guest by itself
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::control::{Reply, Request, Saved, VmmError};
use super::shim_client::{ShimClient, next_reply};
use crate::os::passing;

/// Name of the file with the state of the guest's devices and processors.
const STATE: &str = "state";
/// Name of the file with the guest's memory.
const RAM: &str = "ram";
/// Timeout of a save. The memory may be large and the disk slow.
const ANSWER: Duration = Duration::from_secs(120);

impl ShimClient {
    /// Saves the guest to the new files `state` and `ram` in `directory`. Afterwards it is held for at most `hold`, at most a minute, so
    /// that its drives can be copied: [`ShimClient::hold_guest`] sets the time anew, [`ShimClient::release_guest`] ends it.
    ///
    /// The files are not synced, since the guest is paused: do that after the hold. If this fails or its future is dropped, the guest goes
    /// on; the files are the caller's to remove.
    pub async fn save(&self, directory: &Path, hold: Duration) -> Result<Saved, VmmError> {
        let unanswered =
            |source| VmmError::Unanswered { pid: self.inner.identity.pid, action: "save the guest", source };
        let hold_ms = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
        // Before the files are made: an older shim cannot do it.
        let line = self.line(Request::Save { hold_ms }).map_err(unanswered)?;
        let [state, ram] = [STATE, RAM].map(|name| directory.join(name));
        let make_both = move || -> Result<[File; 2], VmmError> { Ok([make(state)?, make(ram)?]) };
        let made = tokio::task::spawn_blocking(make_both).await;
        let files = made.map_err(|error| unanswered(io::Error::other(error)))??;
        let exchange = async {
            let stream = self.connect().await?;
            send(&stream, &line, &files).await?;
            next_reply(&mut BufReader::new(stream)).await
        };
        let reply = timeout(ANSWER, exchange).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut));
        match reply.flatten().map_err(unanswered)? {
            Reply::Saved(saved) => Ok(saved),
            Reply::Refused(message) => Err(VmmError::Refused { action: "save the guest", message }),
            Reply::Done | Reply::Status(_) | Reply::Ended(_) | Reply::Stalled(_) => {
                Err(unanswered(io::ErrorKind::InvalidData.into()))
            }
        }
    }

    /// Connects the guest's network interface, or disconnects it. It is disconnected after a restore.
    pub async fn set_link(&self, up: bool) -> Result<(), VmmError> {
        let action = if up { "connect its network" } else { "disconnect its network" };
        self.request(Request::SetLink { up }, action).await
    }
}

fn make(path: PathBuf) -> Result<File, VmmError> {
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
    made.map_err(|source| VmmError::File { action: "make", path, source })
}

/// Sends a line with files.
async fn send(stream: &UnixStream, line: &[u8], files: &[File; 2]) -> io::Result<()> {
    let files = [files[0].as_fd(), files[1].as_fd()];
    let sent = stream.async_io(Interest::WRITABLE, || passing::send(stream, line, &files)).await?;
    // A short line fits into the empty buffer of a new connection.
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
