//! Standard input and outputs of this process, on threads of their own: whoever is slow to write or to read holds up nothing else.

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
/// How many pieces of input may wait.
const AHEAD: usize = 4;

/// What standard input gives: pieces, then the end of the channel at its end.
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
                // The terminal is gone.
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

/// Where what comes is written, in its order.
pub(super) struct Output {
    pieces: threads::Sender<(To, Bytes)>,
    /// How much was written of each piece, or why it could not be.
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

    /// Has a piece written. How much may wait is the giver's business.
    pub(super) fn put(&self, to: To, bytes: Bytes) {
        // A writer that is gone has said why.
        let _ = self.pieces.send((to, bytes));
    }
}

/// Past the buffers of the library: bytes go out as they come.
pub(crate) fn write_all(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Somebody else made the terminal or pipe so.
            Err(Errno::AGAIN) => wait(&to, PollFlags::OUT),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn wait(fd: impl AsFd, what: PollFlags) {
    // Whatever comes of it shows where it is used next.
    let _ = rustix::event::poll(&mut [PollFd::new(&fd, what)], None);
}

/// Whether this is a regular file at its beginning: one that somebody reads line by line is further on.
pub(crate) fn is_fresh_file(fd: impl AsFd) -> bool {
    let kind = rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    kind == Ok(FileType::RegularFile) && rustix::fs::seek(&fd, SeekFrom::Current(0)) == Ok(0)
}
