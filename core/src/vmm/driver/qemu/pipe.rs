//! Pipes through which QEMU writes and reads the state of a guest, each with a deadline.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::os::process::timespec;
use crate::vmm::process::set_nonblocking;

/// Maximum length of a state, in bytes. Without the memory it has about 100 KiB; a network interface or more processors add little.
pub(super) const STATE_MAX: u64 = 64 << 20;
const CHUNK: usize = 64 << 10;

/// A state that was written.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Drained {
    pub(super) bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub(super) sha256: String,
}

/// Writes to a file what comes out of a pipe, until QEMU closes the other end.
pub(super) fn drain(pipe: OwnedFd, mut to: &File, deadline: Instant) -> io::Result<Drained> {
    set_nonblocking(&pipe)?;
    let mut pipe = File::from(pipe);
    let (mut bytes, mut hasher) = (0, Sha256::new());
    let mut chunk = vec![0; CHUNK];
    loop {
        match pipe.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => {
                bytes += read as u64;
                if bytes > STATE_MAX {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the state is too long"));
                }
                hasher.update(&chunk[..read]);
                to.write_all(&chunk[..read])?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(&pipe, PollFlags::IN, deadline)?,
            Err(e) => return Err(e),
        }
    }
    Ok(Drained { bytes, sha256: data_encoding::HEXLOWER.encode(&hasher.finalize()) })
}

/// Writes a state into a pipe that QEMU reads, and closes it.
pub(super) fn feed(pipe: OwnedFd, mut state: &[u8], deadline: Instant) -> io::Result<()> {
    set_nonblocking(&pipe)?;
    let mut pipe = File::from(pipe);
    while !state.is_empty() {
        match pipe.write(state) {
            Ok(written) => state = state.get(written..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(&pipe, PollFlags::OUT, deadline)?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn wait(pipe: &File, ready: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match poll(&mut [PollFd::new(pipe, ready)], Some(&timespec(left))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;
    use std::time::Duration;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn a_state_longer_than_a_pipe_goes_through_unchanged() {
        let state: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let drained = std::thread::scope(|scope| {
            let fed = scope.spawn(|| feed(writer, &state, soon()));
            let drained = drain(reader, &file, soon()).unwrap();
            fed.join().unwrap().unwrap();
            drained
        });
        assert_eq!(drained.bytes, 300_000);
        assert_eq!(drained.sha256, data_encoding::HEXLOWER.encode(&Sha256::digest(&state)));
        let mut written = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut written).unwrap();
        assert!(written == state);
    }

    #[test]
    fn a_silent_other_end_is_not_waited_for_for_ever() {
        let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let past = Instant::now();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(drain(reader, &file, past).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (_reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        assert_eq!(feed(writer, &[1; 1 << 20], past).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        drop(reader);
        assert_eq!(feed(writer, b"x", soon()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        feed(writer, b"state", soon()).unwrap();
        assert_eq!(drain(reader, &full, soon()).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
