//! A guest that only tests its vsock device, and the host's side of the tests.
//!
//! [`Kernel`] finds a kernel, [`Guest`] boots QEMU with it and `tests/guest/probe.rs` as `/init`, and [`dial`]
//! connects to that program. Every wait has a deadline, and its error says what it waited for.

mod guest;
mod kernel;
#[path = "../../guest/pattern.rs"]
pub mod pattern;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

pub use guest::{Archive, CID, Guest, VHOST, VSOCK, compile, compose};
pub use kernel::Kernel;

/// The timeout for everything on a busy machine under software emulation.
pub const PATIENCE: Duration = Duration::from_secs(240);
/// The port that the guest program listens on.
pub const PORT: u32 = 300;

/// Waits until `condition` returns a value. Panics with `what` after [`PATIENCE`].
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Connects to `port` of the guest whose sockets are in `directory`.
///
/// # Errors
/// `ConnectionRefused` if the connection ends without an `OK`, for example because nobody listens.
pub fn dial(directory: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(directory.join(VSOCK))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let line = read_line(&mut stream)?;
    if line.strip_prefix("OK ").is_none_or(|number| number.parse::<u32>().is_err()) {
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, format!("{line:?} for CONNECT {port}")));
    }
    Ok(stream)
}

/// Reads a line, or the rest before the end, and not a byte more.
///
/// # Errors
/// If reading fails, or the line is longer than 100 bytes.
pub fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = String::new();
    let mut byte = [0];
    while line.len() < 100 {
        match stream.read(&mut byte) {
            Ok(0) => return Ok(line),
            Ok(_) if byte[0] == b'\n' => return Ok(line),
            Ok(_) => line.push(byte[0].into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(line),
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}
