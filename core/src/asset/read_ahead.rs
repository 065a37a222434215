//! Runs a stage of a pipeline on a thread of its own and reads a few pieces ahead.
//!
//! ```text
//! inner ─> thread ─> full pieces, at most AHEAD ─> Read
//!             ^───── empty pieces, used again <──────┘
//! ```

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

/// The size of a piece, in bytes.
const PIECE: usize = 256 << 10;
/// How many full pieces may wait.
const AHEAD: usize = 4;

/// The reading end. Dropping it ends the thread and waits for it: afterwards nothing reads from the inner reader.
pub(crate) struct ReadAhead {
    /// `None` at the end.
    full: Option<Receiver<io::Result<Vec<u8>>>>,
    empty: Sender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    thread: Option<JoinHandle<()>>,
}

/// Starts a thread that reads ahead from `inner`.
pub(crate) fn read_ahead(inner: impl Read + Send + 'static) -> io::Result<ReadAhead> {
    let (full_tx, full) = sync_channel(AHEAD);
    let (empty, empty_rx) = channel();
    let thread = thread::Builder::new().name("read-ahead".into());
    let thread = thread.spawn(move || read_all(inner, &full_tx, &empty_rx))?;
    Ok(ReadAhead { full: Some(full), empty, piece: Vec::new(), at: 0, thread: Some(thread) })
}

/// Runs the thread. An empty piece marks the end; if the channel closes without one, the thread was lost.
fn read_all(mut inner: impl Read, full: &SyncSender<io::Result<Vec<u8>>>, empty: &Receiver<Vec<u8>>) {
    loop {
        let mut piece = empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(PIECE));
        piece.clear();
        let read = (&mut inner).take(PIECE as u64).read_to_end(&mut piece);
        let is_end = piece.is_empty();
        // Data from before an error is still delivered.
        if (!is_end || read.is_ok()) && full.send(Ok(piece)).is_err() {
            return;
        }
        if let Err(error) = read {
            // The reader may already be gone; then the error does not matter.
            let _ = full.send(Err(error));
            return;
        }
        if is_end {
            return;
        }
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            let Some(full) = &self.full else { return Ok(0) };
            let next =
                full.recv().unwrap_or_else(|_| Err(io::Error::other("a thread of the pipeline ended")));
            let next = next.inspect_err(|_| self.full = None)?;
            let used = std::mem::replace(&mut self.piece, next);
            self.at = 0;
            // The thread may have ended; then the piece is just dropped.
            let _ = self.empty.send(used);
            if self.piece.is_empty() {
                self.full = None;
                return Ok(0);
            }
        }
        let n = buf.len().min(self.piece.len() - self.at);
        buf[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.full = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported as an error here.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Returns some bytes in small reads, counts them, and then ends as configured.
    struct Source {
        left: usize,
        given: Arc<AtomicUsize>,
        end: fn() -> io::Result<usize>,
    }

    impl Read for Source {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            if self.left == 0 {
                return (self.end)();
            }
            let n = buf.len().min(self.left).min(1000);
            for byte in &mut buf[..n] {
                *byte = (self.left % 251) as u8;
                self.left -= 1;
            }
            self.given.fetch_add(n, Ordering::SeqCst);
            Ok(n)
        }
    }

    fn source(bytes: usize, end: fn() -> io::Result<usize>) -> (Source, Arc<AtomicUsize>) {
        let given = Arc::new(AtomicUsize::new(0));
        (Source { left: bytes, given: given.clone(), end }, given)
    }

    #[test]
    fn all_bytes_come_in_order_and_then_the_end() {
        for bytes in [0, 1, PIECE, 7 * PIECE + 5] {
            let (mut plain, _) = source(bytes, || Ok(0));
            let mut expected = Vec::new();
            plain.read_to_end(&mut expected).unwrap();
            let mut reader = read_ahead(source(bytes, || Ok(0)).0).unwrap();
            let mut found = Vec::new();
            reader.read_to_end(&mut found).unwrap();
            assert!(found == expected, "{bytes} bytes");
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn a_failure_comes_after_what_came_before_it() {
        let mut reader =
            read_ahead(source(PIECE + 10, || Err(io::ErrorKind::ConnectionAborted.into())).0).unwrap();
        let mut found = Vec::new();
        let error = reader.read_to_end(&mut found).unwrap_err();
        assert_eq!((error.kind(), found.len()), (io::ErrorKind::ConnectionAborted, PIECE + 10));
    }

    #[test]
    fn a_thread_that_is_lost_is_no_end() {
        let mut reader = read_ahead(source(10, || panic!("on purpose")).0).unwrap();
        assert!(reader.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn a_reader_that_wants_no_more_ends_the_thread_and_little_was_read() {
        let (endless, given) = source(usize::MAX, || Ok(0));
        let mut reader = read_ahead(endless).unwrap();
        reader.read_exact(&mut [0; 10]).unwrap();
        drop(reader);
        let given_then = given.load(Ordering::SeqCst);
        assert!(given_then <= (AHEAD + 3) * PIECE, "{given_then}");
    }
}
