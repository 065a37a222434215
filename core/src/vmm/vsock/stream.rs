//! The host's end of a connection: a non-blocking Unix socket and the bytes under way in either direction.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;

use super::connection::HostSide;

/// The most that is read from a host program at once, in bytes.
pub(super) const CHUNK: usize = 64 << 10;
/// How many unused buffers are kept.
const SPARE_BUFFERS: usize = 4;
/// An emptied queue with more capacity than this gives its memory back.
const KEPT_CAPACITY: usize = 16 << 10;

/// Buffers of [`CHUNK`] bytes, kept between uses: only a connection with bytes at hand holds one.
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

/// Bytes from the host program that the guest has not got yet.
#[derive(Debug)]
struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// A host program's socket.
#[derive(Debug)]
pub(super) struct HostStream {
    socket: UnixStream,
    /// Neither has said "would block" since the last event (events are edge-triggered).
    readable: bool,
    writable: bool,
    /// The host program has closed its end.
    hung_up: bool,
    /// Nothing more can be read.
    ended: bool,
    /// Nothing more can be written.
    deaf: bool,
    /// The socket is to be shut for writing once all is written.
    finish: bool,
    inbox: Option<Inbox>,
    outbox: VecDeque<u8>,
}

impl HostStream {
    /// Takes a socket that is non-blocking already.
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

    /// Notes what epoll says.
    pub(super) fn note(&mut self, events: EventFlags) {
        let gone = events.intersects(EventFlags::HUP | EventFlags::ERR);
        self.readable |= gone || events.intersects(EventFlags::IN | EventFlags::RDHUP);
        self.writable |= gone || events.contains(EventFlags::OUT);
        self.hung_up |= gone;
    }

    /// Whether the host program has closed its end.
    pub(super) fn is_gone(&self) -> bool {
        self.hung_up
    }

    /// Whether bytes from the guest wait for the host program.
    pub(super) fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    pub(super) fn side(&self) -> HostSide {
        HostSide {
            pending: self.pending().len(),
            readable: self.readable,
            ended: self.ended,
            deaf: self.deaf || self.hung_up,
        }
    }

    /// Bytes for the guest.
    pub(super) fn pending(&self) -> &[u8] {
        self.inbox.as_ref().map_or(&[], |inbox| &inbox.buffer[inbox.start..inbox.end])
    }

    /// Drops the first `count` pending bytes: the guest has them.
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

    /// Reads at most `limit` bytes when none are pending.
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

    /// Passes bytes from the guest on, or keeps what the host program does not take yet. Returns how many are settled.
    pub(super) fn send(&mut self, bytes: &[u8]) -> usize {
        let written = if self.outbox.is_empty() { self.write(bytes) } else { 0 };
        self.outbox.extend(&bytes[written..]);
        written
    }

    /// Writes what was kept. Returns how many bytes are settled.
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
                // It fails when the host program is gone, and then there is nobody to tell.
                self.shut(Shutdown::Write);
            }
        }
        settled
    }

    /// Writes until the socket is full. Of a socket that nobody reads, all bytes are settled.
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

    /// The guest sends nothing more: lets the host program read up to an end.
    pub(super) fn finish(&mut self) -> usize {
        self.finish = true;
        self.flush()
    }

    /// The guest takes nothing more: lets the host program's writes fail.
    pub(super) fn refuse(&mut self, buffers: &mut Buffers) {
        self.discard(buffers);
        self.shut(Shutdown::Read);
    }

    fn shut(&self, how: Shutdown) {
        if let Err(error) = self.socket.shutdown(how) {
            tracing::trace!(%error, "shut a host socket");
        }
    }

    /// How many bytes this end keeps in memory.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.outbox.capacity() + self.inbox.as_ref().map_or(0, |inbox| inbox.buffer.len())
    }
}

impl AsFd for HostStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
