//! Tells the agent of a restored guest that it was restored, by the nonce of this restore. Only then does it say hello, and only who knows the nonce
//! is believed.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nexus_schema::link::RESUME_PORT;

use super::WHAT;
use crate::os::paths::vm_files;
use crate::os::process::ProcessHandle;
use crate::vmm::driver::DriverError;

/// Timeout of all tries: the guest's driver for vsock notices the restore, and its agent runs again.
const LIMIT: Duration = Duration::from_secs(20);
/// Timeout of one try, to write and to read.
const TRY: Duration = Duration::from_secs(2);
/// Pause before the next try, which also looks whether firecracker still runs.
const PAUSE: Duration = Duration::from_millis(10);
/// Maximum length of both lines of an answer, in bytes.
const LINES_MAX: usize = 512;

/// Tells the agent, and waits until it repeats the nonce. The socket is the one in the working directory.
pub(super) fn relink(process: &ProcessHandle, nonce: &str) -> Result<(), DriverError> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let Err(source) = tell(nonce) else { return Ok(()) };
        if process.wait_ended(PAUSE).map_err(|source| DriverError::Connection { source })? {
            return Err(DriverError::Ended { what: WHAT });
        }
        if Instant::now() > deadline {
            let request = format!("the agent's port {RESUME_PORT} of the restored guest");
            return Err(DriverError::Unanswered { what: WHAT, request, source });
        }
    }
}

fn tell(nonce: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(Path::new(vm_files::VSOCK))?;
    stream.set_write_timeout(Some(TRY))?;
    // The device passes the second line on once the guest has accepted.
    stream.write_all(format!("CONNECT {RESUME_PORT}\n{nonce}\n").as_bytes())?;
    // A guest may answer byte by byte.
    let until = Instant::now() + 2 * TRY;
    let (mut received, mut piece) = (Vec::new(), [0; 256]);
    while received.iter().filter(|byte| **byte == b'\n').count() < 2 && received.len() < LINES_MAX {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => break,
            read => received.extend_from_slice(piece.get(..read).unwrap_or_default()),
        }
    }
    let text = String::from_utf8_lossy(&received);
    let mut lines = text.lines();
    let refused = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    if !lines.next().is_some_and(|line| line.starts_with("OK ")) {
        return refused("the vsock device refused the connection");
    }
    if lines.next().map(str::trim_end) != Some(nonce) {
        return refused("the agent did not repeat the nonce");
    }
    Ok(())
}
