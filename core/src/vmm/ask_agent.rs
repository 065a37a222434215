//! One line to the guest's agent and its answer, over the socket of the vsock device. For shims, which have no runtime.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Maximum length of the device's answer and the agent's together, in bytes.
const LINES_MAX: usize = 512;

/// Connects to a port of the guest, writes a line, and returns the agent's answer without its newline. Takes at most `limit`, apart from connecting.
pub(super) fn ask(socket: &Path, port: u32, line: &str, limit: Duration) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(limit))?;
    // The device passes the second line on once the guest has accepted.
    stream.write_all(format!("CONNECT {port}\n{line}\n").as_bytes())?;
    // A guest may answer byte by byte.
    let until = Instant::now() + limit;
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
    if !lines.next().is_some_and(|line| line.starts_with("OK ")) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the vsock device refused the connection".to_owned(),
        ));
    }
    let answer = lines.next().ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(answer.trim_end().to_owned())
}
