//! Tells the agent of a restored guest that it was restored, by the nonce of this restore. Only then does it say hello, and only who knows the nonce
//! is believed.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
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
/// Timeout of one try.
const TRY: Duration = Duration::from_secs(2);
/// Pause before the next try, which also looks whether firecracker still runs.
const PAUSE: Duration = Duration::from_millis(10);
/// Maximum length of an answer, in bytes.
const LINE_MAX: u64 = 256;

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
    stream.set_read_timeout(Some(TRY))?;
    stream.set_write_timeout(Some(TRY))?;
    // The device passes the second line on once the guest has accepted.
    stream.write_all(format!("CONNECT {RESUME_PORT}\n{nonce}\n").as_bytes())?;
    let mut lines = BufReader::new(stream.take(2 * LINE_MAX));
    let mut line = || {
        let mut line = String::new();
        lines.read_line(&mut line).map(|_| line)
    };
    let refused = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    if !line()?.starts_with("OK ") {
        return refused("the vsock device refused the connection");
    }
    if line()?.trim_end() != nonce {
        return refused("the agent did not repeat the nonce");
    }
    Ok(())
}
