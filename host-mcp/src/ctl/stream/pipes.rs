//! Standard input and outputs of this process, on separate threads, so that a slow peer blocks nothing else.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc as threads;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FileType, SeekFrom};
use rustix::io::Errno;
use tokio::sync::mpsc;

/// How much is read at once, in bytes.
const CHUNK: usize = 64 << 10;
/// The capacity of a pipe that output is written to, in bytes: one frame of much data. The usual one would wake its reader four times for that.
const PIPE: usize = 256 << 10;
/// How many pieces of input may be buffered.
const AHEAD: usize = 4;

/// The pieces of standard input; the channel closes at its end.
pub(crate) fn input() -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (pieces, receiver) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        let stdin = io::stdin();
        let mut chunk = vec![0; CHUNK];
        loop {
            let piece = match rustix::io::read(&stdin, &mut chunk) {
                Ok(0) => return,
                Ok(length) => Ok(chunk[..length].to_vec()),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    wait(&stdin, PollFlags::IN);
                    continue;
                }
                // The terminal was closed.
                Err(Errno::IO) => return,
                Err(error) => Err(io::Error::from(error)),
            };
            let is_error = piece.is_err();
            if pieces.blocking_send(piece).is_err() || is_error {
                return;
            }
        }
    });
    receiver
}

/// Writes output in order.
pub(super) struct Output {
    pieces: threads::Sender<(To, Bytes)>,
    /// How much of each piece was written, or the error.
    pub(super) written: mpsc::UnboundedReceiver<io::Result<usize>>,
}

/// One of the outputs.
#[derive(Debug, Clone, Copy)]
pub(super) enum To {
    Stdout,
    Stderr,
}

impl Output {
    pub(super) fn start() -> Self {
        let (pieces, waiting) = threads::channel::<(To, Bytes)>();
        let (tell, written) = mpsc::unbounded_channel();
        if rustix::pipe::fcntl_getpipe_size(io::stdout()).is_ok_and(|size| size < PIPE) {
            // A user may have too many large ones already.
            let _ = rustix::pipe::fcntl_setpipe_size(io::stdout(), PIPE);
        }
        std::thread::spawn(move || {
            for (to, bytes) in waiting {
                let outcome = match to {
                    To::Stdout => write_all(io::stdout(), &bytes),
                    To::Stderr => write_all(io::stderr(), &bytes),
                };
                if tell.send(outcome.map(|()| bytes.len())).is_err() {
                    return;
                }
            }
        });
        Self { pieces, written }
    }

    /// Queues a piece. The caller limits how much is queued.
    pub(super) fn put(&self, to: To, bytes: Bytes) {
        // If the writer is gone, it has reported why.
        let _ = self.pieces.send((to, bytes));
    }
}

/// Bypasses the library's buffers, so that bytes are written immediately.
pub(crate) fn write_all(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Another process made the terminal or pipe non-blocking.
            Err(Errno::AGAIN) => wait(&to, PollFlags::OUT),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn wait(fd: impl AsFd, what: PollFlags) {
    // An error shows at the next use.
    let _ = rustix::event::poll(&mut [PollFd::new(&fd, what)], None);
}

/// Whether this is a regular file at its beginning; a file that somebody reads line by line is further on.
pub(crate) fn is_fresh_file(fd: impl AsFd) -> bool {
    let kind = rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    kind == Ok(FileType::RegularFile) && rustix::fs::seek(&fd, SeekFrom::Current(0)) == Ok(0)
}
