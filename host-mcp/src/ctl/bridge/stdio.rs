//! This process's stdin and stdout, without a thread in between if they are pipes or sockets.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::unix::pipe;

use crate::duplex;

/// What the bridge reads from.
pub(super) type Input = Box<dyn AsyncRead + Unpin>;
/// What the bridge writes to.
pub(super) type Output = Box<dyn AsyncWrite + Unpin>;

/// Both ends, and the guards that restore their flags.
pub(super) struct Stdio {
    /// Standard input.
    pub(super) input: Input,
    /// Standard output.
    pub(super) output: Output,
    /// Dropped last: others with the same pipe share the flags.
    pub(super) _restore: [Restore; 2],
}

/// Restores the flags of an open file when dropped.
pub(super) struct Restore(Option<(OwnedFd, OFlags)>);

impl Restore {
    fn of(fd: BorrowedFd<'_>) -> Self {
        let flags = rustix::fs::fcntl_getfl(fd).ok();
        Self(fd.try_clone_to_owned().ok().zip(flags))
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some((fd, flags)) = &self.0 {
            // If the other side is gone, there is nothing to restore.
            rustix::fs::fcntl_setfl(fd, *flags).ok();
        }
    }
}

/// Takes stdin and stdout.
pub(super) fn take() -> io::Result<Stdio> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let restore = [Restore::of(stdin.as_fd()), Restore::of(stdout.as_fd())];
    let input: Input = match kind(stdin.as_fd()) {
        Some(FileType::Fifo) => Box::new(pipe::Receiver::from_owned_fd(stdin.as_fd().try_clone_to_owned()?)?),
        Some(FileType::Socket) => Box::new(duplex::Reader::of_shared(stdin.as_fd().try_clone_to_owned()?)?),
        _ => Box::new(tokio::io::stdin()),
    };
    let output: Output = match kind(stdout.as_fd()) {
        Some(FileType::Fifo) => Box::new(pipe::Sender::from_owned_fd(stdout.as_fd().try_clone_to_owned()?)?),
        Some(FileType::Socket) => Box::new(duplex::Writer::of_shared(stdout.as_fd().try_clone_to_owned()?)),
        _ => Box::new(tokio::io::stdout()),
    };
    Ok(Stdio { input, output, _restore: restore })
}

fn kind(fd: BorrowedFd<'_>) -> Option<FileType> {
    rustix::fs::fstat(fd).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
}
