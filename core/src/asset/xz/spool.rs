//! Passes bytes from one thread to another: a few in memory, the rest in an unnamed file.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The most bytes that are passed at a time.
pub(super) const PIECE: usize = 256 << 10;
/// How many pieces wait in memory.
const IN_MEMORY: usize = 3;

/// The bytes could not be written to the file, or not be read from it. Wrapped in an [`io::Error`] on its way through readers.
#[derive(Debug, thiserror::Error)]
#[error("buffer decoded data on disk")]
pub(crate) struct Unkept(#[source] pub(crate) Arc<io::Error>);

impl Unkept {
    pub(super) fn of(error: io::Error) -> io::Error {
        io::Error::new(error.kind(), Self(Arc::new(error)))
    }

    /// Extracts the disk's error from an [`io::Error`].
    pub(crate) fn in_error(error: &io::Error) -> Option<io::Error> {
        let Self(cause) = error.get_ref()?.downcast_ref::<Self>()?;
        // The original OS error, so that a full disk is recognised.
        Some(cause.raw_os_error().map_or_else(|| cause.kind().into(), io::Error::from_raw_os_error))
    }
}

/// A queue of bytes. Putting never waits; what does not fit in memory goes to a region of a file.
pub(super) struct Spool {
    file: Arc<std::fs::File>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    pieces: VecDeque<Piece>,
    in_memory: usize,
    /// The file offset of the next piece.
    end: u64,
    /// How it ended; nothing more may be put in.
    ended: Option<io::Result<()>>,
    /// The reader is gone.
    abandoned: bool,
}

enum Piece {
    Memory(Vec<u8>),
    /// A region of the file.
    File(u64, usize),
}

impl Spool {
    /// A queue whose region begins at `start` and grows as bytes are put in.
    pub(super) fn new(file: Arc<std::fs::File>, start: u64) -> Self {
        let state =
            State { pieces: VecDeque::new(), in_memory: 0, end: start, ended: None, abandoned: false };
        Self { file, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds at most [`PIECE`] bytes. Only one thread may call it. Returns whether the reader is still there.
    pub(super) fn put(&self, bytes: &[u8]) -> io::Result<bool> {
        let at = {
            let mut state = self.state();
            if state.abandoned {
                return Ok(false);
            }
            if state.in_memory < IN_MEMORY {
                state.in_memory += 1;
                state.pieces.push_back(Piece::Memory(bytes.to_vec()));
                self.changed.notify_all();
                return Ok(true);
            }
            state.end
        };
        self.file.write_all_at(bytes, at).map_err(Unkept::of)?;
        let mut state = self.state();
        state.end = at + bytes.len() as u64;
        // Consecutive small pieces are read as one.
        match state.pieces.back_mut() {
            Some(Piece::File(start, length)) if *start + *length as u64 == at && *length < PIECE => {
                *length += bytes.len();
            }
            _ => state.pieces.push_back(Piece::File(at, bytes.len())),
        }
        self.changed.notify_all();
        Ok(true)
    }

    /// Ends the queue. Bytes added before are still delivered; the first call wins.
    pub(super) fn finish(&self, ended: io::Result<()>) {
        self.state().ended.get_or_insert(ended);
        self.changed.notify_all();
    }

    /// Marks the reader as gone.
    pub(super) fn abandon(&self) {
        self.state().abandoned = true;
        self.changed.notify_all();
    }

    /// Takes the next bytes into `buffer`, waiting for them; an empty buffer is the end.
    pub(super) fn take(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut state = self.state();
        let piece = loop {
            if state.abandoned {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if let Some(piece) = state.pieces.pop_front() {
                break piece;
            }
            match &mut state.ended {
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(ended) => {
                    buffer.clear();
                    return std::mem::replace(ended, Ok(()));
                }
            }
        };
        match piece {
            Piece::Memory(bytes) => {
                state.in_memory -= 1;
                *buffer = bytes;
            }
            Piece::File(at, length) => {
                drop(state);
                buffer.resize(length, 0);
                self.file.read_exact_at(buffer, at).map_err(Unkept::of)?;
            }
        }
        Ok(())
    }
}
