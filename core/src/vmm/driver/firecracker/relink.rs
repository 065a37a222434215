//! Tells the agent of a restored guest that it was restored, by the nonce of this restore. Only then does it say hello, and only who knows the nonce
//! is believed.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nexus_schema::link::RESUME_PORT;

use super::WHAT;
use crate::os::paths::vm_files;
use crate::os::process::ProcessHandle;
use crate::vmm::ask_agent::ask;
use crate::vmm::driver::DriverError;

/// Timeout of all tries: the guest's driver for vsock notices the restore, and its agent runs again.
const LIMIT: Duration = Duration::from_secs(20);
/// Timeout of one try.
const TRY: Duration = Duration::from_secs(4);
/// Pause before the next try, which also looks whether firecracker still runs.
const PAUSE: Duration = Duration::from_millis(10);

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
    match ask(Path::new(vm_files::VSOCK), RESUME_PORT, nonce, TRY)? {
        answer if answer == nonce => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the agent did not repeat the nonce".to_owned())),
    }
}
