//! The near end of a connection: a non-blocking Unix socket, and buffers for both directions.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;

use super::connection::NearSide;

/// Maximum number of bytes that are read from a near program at once.
pub(super) const CHUNK: usize = 64 << 10;
/// Number of unused buffers that are kept.
const SPARE_BUFFERS: usize = 4;
/// An empty queue with more capacity than this is freed, in bytes.
const KEPT_CAPACITY: usize = 16 << 10;

/// Pool of buffers of [`CHUNK`] bytes. Only a connection with pending bytes holds a buffer.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    spare: Vec<Box<[u8]>>,
}

impl Buffers {
    fn get(&mut self) -> Box<[u8]> {
        self.spare.pop().unwrap_or_else(|| vec![0; CHUNK].into_boxed_slice())
    }

    fn put(&mut self, buffer: Box<[u8]>) {
        if self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }
}

/// Bytes from the near program that were not sent to the far side yet.
#[derive(Debug)]
struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// A near program's socket.
#[derive(Debug)]
pub(super) struct NearStream {
    socket: UnixStream,
    /// `readable` and `writable`: no read or write has returned "would block" since the last event (events are edge-triggered).
    readable: bool,
    writable: bool,
    /// The near program has closed the connection.
    hung_up: bool,
    /// Nothing more can be read.
    ended: bool,
    /// Nothing more can be written.
    deaf: bool,
    /// Shut the socket down for writing once all bytes are written.
    finish: bool,
    inbox: Option<Inbox>,
    outbox: VecDeque<u8>,
}

impl NearStream {
    /// Wraps a socket that is already non-blocking.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            readable: true,
            writable: true,
            hung_up: false,
            ended: false,
            deaf: false,
            finish: false,
            inbox: None,
            outbox: VecDeque::new(),
        }
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Records epoll events.
    pub(super) fn note(&mut self, events: EventFlags) {
        let gone = events.intersects(EventFlags::HUP | EventFlags::ERR);
        self.readable |= gone || events.intersects(EventFlags::IN | EventFlags::RDHUP);
        self.writable |= gone || events.contains(EventFlags::OUT);
        self.hung_up |= gone;
    }

    /// Returns whether the near program has closed the connection.
    pub(super) fn is_gone(&self) -> bool {
        self.hung_up
    }

    /// Returns whether all bytes from the far side have been written to the near program.
    pub(super) fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    pub(super) fn side(&self) -> NearSide {
        NearSide {
            pending: self.pending().len(),
            readable: self.readable,
            ended: self.ended,
            deaf: self.deaf || self.hung_up,
        }
    }

    /// Returns the pending bytes for the far side.
    pub(super) fn pending(&self) -> &[u8] {
        self.inbox.as_ref().map_or(&[], |inbox| &inbox.buffer[inbox.start..inbox.end])
    }

    /// Drops the first `count` pending bytes after they were sent to the far side.
    pub(super) fn consume(&mut self, count: usize, buffers: &mut Buffers) {
        let Some(inbox) = &mut self.inbox else { return };
        inbox.start = (inbox.start + count).min(inbox.end);
        if inbox.start == inbox.end {
            self.discard(buffers);
        }
    }

    /// Drops all pending bytes.
    pub(super) fn discard(&mut self, buffers: &mut Buffers) {
        if let Some(inbox) = self.inbox.take() {
            buffers.put(inbox.buffer);
        }
    }

    /// Reads at most `limit` bytes if none are pending.
    pub(super) fn fill(&mut self, limit: usize, buffers: &mut Buffers) {
        let limit = limit.min(CHUNK);
        if limit == 0 || self.inbox.is_some() || !self.readable || self.ended {
            return;
        }
        let mut buffer = buffers.get();
        let count = loop {
            match self.socket.read(&mut buffer[..limit]) {
                Ok(0) => {
                    self.ended = true;
                    break 0;
                }
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    break 0;
                }
                Err(_) => {
                    (self.ended, self.deaf) = (true, true);
                    break 0;
                }
            }
        };
        if count == 0 {
            buffers.put(buffer);
        } else {
            self.inbox = Some(Inbox { buffer, start: 0, end: count });
        }
    }

    /// Writes bytes from the far side to the near program, and queues what does not fit yet. Returns how many bytes were written or dropped.
    pub(super) fn send(&mut self, bytes: &[u8]) -> usize {
        let written = if self.outbox.is_empty() { self.write(bytes) } else { 0 };
        self.outbox.extend(&bytes[written..]);
        written
    }

    /// Writes queued bytes. Returns how many bytes were written or dropped.
    pub(super) fn flush(&mut self) -> usize {
        let mut settled = 0;
        while self.writable && !self.outbox.is_empty() {
            let outbox = std::mem::take(&mut self.outbox);
            let written = self.write(outbox.as_slices().0);
            self.outbox = outbox;
            self.outbox.drain(..written);
            settled += written;
        }
        if self.outbox.is_empty() {
            if self.outbox.capacity() > KEPT_CAPACITY {
                self.outbox = VecDeque::new();
            }
            if std::mem::take(&mut self.finish) {
                // Fails harmlessly if the near program has disconnected.
                self.shut(Shutdown::Write);
            }
        }
        settled
    }

    /// Writes until the socket is full. If the near program does not read any more, all bytes count as written.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while self.writable && written < bytes.len() && !self.deaf {
            match self.socket.write(&bytes[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.deaf = true,
            }
        }
        if self.deaf { bytes.len() } else { written }
    }

    /// Handles that the far side sends no more: the near program reads an end of file after the queued bytes.
    pub(super) fn finish(&mut self) -> usize {
        self.finish = true;
        self.flush()
    }

    /// Handles that the far side receives no more: the near program's writes fail from now on.
    pub(super) fn refuse(&mut self, buffers: &mut Buffers) {
        self.discard(buffers);
        self.shut(Shutdown::Read);
    }

    fn shut(&self, how: Shutdown) {
        // It fails if the near program has disconnected, which makes no difference.
        let _ = self.socket.shutdown(how);
    }

    /// Returns the size of this end's buffers, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.outbox.capacity() + self.inbox.as_ref().map_or(0, |inbox| inbox.buffer.len())
    }
}

impl AsFd for NearStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
