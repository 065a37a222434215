//! A queue of lines to be written to a stream, which writes waiting lines in batches. [`LineReader`] reads them.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use nexus_wire::duplex::Peer;
pub(super) use nexus_wire::lines::{Line, LineReader};

/// Capacity above which empty buffers are freed, in bytes.
const KEEP: usize = 128 << 10;

/// A queue of lines to be written: any number of tasks add to it, one task writes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the writer.
    filled: Notify,
    /// Wakes tasks that wait for the queue to drain.
    drained: Notify,
    /// Wakes the task that waits for something to be written.
    written: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Number of bytes that the writer has taken but not yet written.
    writing: usize,
    closed: bool,
    /// Whether the queue was closed because its limit was reached.
    is_unread: bool,
    /// What [`Outbox::flush`] writes to.
    peer: Option<Peer>,
    /// Maximum number of waiting bytes.
    limit: Option<usize>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            filled: Notify::new(),
            drained: Notify::new(),
            written: Notify::new(),
        }))
    }
}

impl State {
    /// Writes what waits, as far as the socket accepts it. Returns whether that was all. Leaves errors to the writer.
    fn write_now(&mut self) -> bool {
        let Some(peer) = &self.peer else { return false };
        match peer.try_write(&self.waiting) {
            Ok(length) => drop(self.waiting.drain(..length)),
            Err(_) => return false,
        }
        if self.waiting.capacity() > KEEP && self.waiting.is_empty() {
            self.waiting = Vec::new();
        }
        self.waiting.is_empty()
    }
}

impl Outbox {
    /// Creates a queue that is run with the writing end of `peer`.
    pub fn of(peer: Peer) -> Self {
        let outbox = Self::default();
        outbox.state().peer = Some(peer);
        outbox
    }

    /// Limits the queue: it is closed as soon as more than so many bytes wait, because the peer does not read them.
    #[must_use]
    pub fn with_limit(self, bytes: usize) -> Self {
        self.state().limit = Some(bytes);
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one line: `write` appends it without its line end. Returns `false` if the queue is closed.
    pub fn push(&self, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        let added = self.put(write);
        if added {
            self.0.filled.notify_one();
        }
        added
    }

    /// Adds one line like [`Self::push`], but nothing is written before [`Self::flush`] or the next [`Self::push`].
    pub fn put(&self, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        write(&mut state.waiting);
        state.waiting.push(b'\n');
        if state.limit.is_some_and(|limit| state.waiting.len() + state.writing > limit) {
            state.waiting = Vec::new();
            state.is_unread = true;
            drop(state);
            self.close();
            return false;
        }
        true
    }

    /// Writes what waits. If the queue belongs to a socket that accepts it and nobody else is writing, it is written by the caller, and no
    /// task is woken. For callers that know that no more lines follow at once.
    pub fn flush(&self) {
        let mut state = self.state();
        if state.waiting.is_empty() {
            return;
        }
        let is_done = state.writing == 0 && state.write_now();
        drop(state);
        if is_done {
            self.0.drained.notify_waiters();
            self.0.written.notify_one();
        } else {
            self.0.filled.notify_one();
        }
    }

    /// Returns the number of bytes that wait to be written.
    pub fn len(&self) -> usize {
        let state = self.state();
        state.waiting.len() + state.writing
    }

    /// Returns whether nothing waits to be written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether the queue is closed.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Closes the queue: further lines are refused, and the writer ends once all waiting lines are written.
    pub fn close(&self) {
        {
            let mut state = self.state();
            state.closed = true;
            state.peer = None;
        }
        self.0.filled.notify_one();
        self.0.drained.notify_waiters();
    }

    /// Waits until at most `bytes` wait, or the queue is closed.
    pub async fn drained_to(&self, bytes: usize) {
        loop {
            let drained = self.0.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            {
                let state = self.state();
                if state.closed || state.waiting.len() + state.writing <= bytes {
                    return;
                }
            }
            drained.await;
        }
    }

    /// Waits until something was written since the last call. For use by one task.
    pub async fn written(&self) {
        self.0.written.notified().await;
    }

    /// Waits until the queue is closed because its limit was reached.
    async fn unread(&self) {
        loop {
            let drained = self.0.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            if self.state().is_unread {
                return;
            }
            drained.await;
        }
    }

    /// Writes added lines until the queue is closed or writing fails.
    pub async fn run(self, mut write: impl AsyncWrite + Unpin) -> io::Result<()> {
        // However this task ends, the queue must not be filled any further.
        let closer = CloseOnDrop(self);
        let this = &closer.0;
        let mut batch = Vec::new();
        loop {
            let closed = {
                let mut state = this.state();
                std::mem::swap(&mut state.waiting, &mut batch);
                state.writing = batch.len();
                state.closed
            };
            if batch.is_empty() {
                if closed {
                    return Ok(());
                }
                this.0.filled.notified().await;
                continue;
            }
            tokio::select! {
                biased;
                written = write_out(&mut write, &batch) => written?,
                () = this.unread() => return Err(io::ErrorKind::TimedOut.into()),
            }
            batch.clear();
            if batch.capacity() > KEEP {
                batch = Vec::new();
            }
            this.state().writing = 0;
            this.0.drained.notify_waiters();
            this.0.written.notify_one();
        }
    }
}

async fn write_out(write: &mut (impl AsyncWrite + Unpin), batch: &[u8]) -> io::Result<()> {
    write.write_all(batch).await?;
    write.flush().await
}

struct CloseOnDrop(Outbox);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn an_outbox_that_nobody_reads_is_closed_at_its_limit() {
        let outbox = Outbox::default().with_limit(10_000);
        let (near, _far) = tokio::io::duplex(64);
        let writer = tokio::spawn(outbox.clone().run(near));
        let line = |out: &mut Vec<u8>| out.extend_from_slice(&[b'x'; 999]);
        let mut taken = 0;
        while outbox.push(line) {
            taken += 1;
            tokio::task::yield_now().await;
        }
        assert_eq!(taken, 10);
        assert!(outbox.is_closed());
        assert_eq!(writer.await.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        outbox.drained_to(0).await;
    }

    #[tokio::test]
    async fn an_outbox_writes_everything_and_ends() {
        let outbox = Outbox::default();
        let (near, mut far) = tokio::io::duplex(64);
        let writer = tokio::spawn(outbox.clone().run(near));
        for i in 0..1000 {
            assert!(outbox.push(|out| out.extend_from_slice(format!("line {i}").as_bytes())));
        }
        assert!(outbox.len() > 1000);
        let reader = tokio::spawn(async move {
            let mut text = String::new();
            far.read_to_string(&mut text).await.unwrap();
            text
        });
        outbox.drained_to(0).await;
        outbox.close();
        assert!(!outbox.push(|_| ()));
        writer.await.unwrap().unwrap();
        assert_eq!(reader.await.unwrap().lines().count(), 1000);
    }

    #[tokio::test]
    async fn an_outbox_closes_when_nobody_reads_any_more() {
        let outbox = Outbox::default();
        let (near, far) = tokio::io::duplex(64);
        drop(far);
        outbox.push(|out| out.extend_from_slice(b"x"));
        assert!(outbox.clone().run(near).await.is_err());
        assert!(outbox.is_closed());
        outbox.drained_to(0).await;
    }

    #[tokio::test]
    async fn lines_that_are_written_at_once_keep_their_order_whatever_there_is_room_for() {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let (_read, write) = nexus_wire::duplex::split(near.into()).unwrap();
        let (mut far, _) = nexus_wire::duplex::split(far.into()).unwrap();
        let outbox = Outbox::of(write.peer());
        assert!(outbox.put(|out| out.extend_from_slice(b"one")));
        assert!(outbox.put(|out| out.extend_from_slice(b"two")));
        assert!(!outbox.is_empty());
        outbox.flush();
        assert!(outbox.is_empty(), "it is written, and nobody runs it yet");
        assert!(outbox.push(|out| out.extend_from_slice(b"waits")));
        let mut expected = "one\ntwo\nwaits\n".to_owned();

        let writer = tokio::spawn(outbox.clone().run(write));
        let reader = tokio::spawn(async move {
            let mut text = String::new();
            far.read_to_string(&mut text).await.unwrap();
            text
        });
        for i in 0..200 {
            let line = format!("{i} {}", "x".repeat(i * 50));
            expected.push_str(&line);
            expected.push('\n');
            assert!(outbox.put(|out| out.extend_from_slice(line.as_bytes())));
            if i % 3 > 0 || i % 20 == 0 {
                outbox.flush();
            }
            if i % 20 == 0 {
                outbox.drained_to(0).await;
            }
        }
        outbox.close();
        assert!(!outbox.put(|_| ()));
        outbox.flush();
        writer.await.unwrap().unwrap();
        assert!(reader.await.unwrap() == expected);
    }

    #[tokio::test]
    async fn who_waits_for_room_is_told_of_what_is_written_at_once() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let (_read, write) = nexus_wire::duplex::split(near.into()).unwrap();
        let outbox = Outbox::of(write.peer());
        outbox.put(|out| out.extend_from_slice(b"a line"));
        let waiting = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.drained_to(0).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        outbox.flush();
        waiting.await.unwrap();
    }
}
