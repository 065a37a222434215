//! A socket to the kernel's netfilter, with libmnl, for batches and dumps.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::netlink::{self, ACK, DONE, DUMP_INTERRUPTED, ERROR, Message, messages};

/// Size of the socket's buffer, in bytes: a batch is sent in one piece.
const BUFFER: usize = 16 << 20;
/// Number of bytes that are read at once.
const READ: usize = 256 << 10;
/// Types of the messages that start and end a batch (`NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`).
const BATCH: [u16; 2] = [0x10, 0x11];
/// Number of tries of a dump that is interrupted by changes.
const DUMPS: usize = 5;

/// A netfilter socket, for one request at a time.
pub(crate) struct Netfilter {
    socket: mnl::Socket,
    read: Vec<u8>,
}

impl Netfilter {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
        // SAFETY: the descriptor is the socket's, which lives longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
        // In a user namespace the system's limits apply.
        if setsockopt(&fd, sockopt::SndBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&fd, sockopt::SndBuf, &BUFFER);
        }
        if setsockopt(&fd, sockopt::RcvBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&fd, sockopt::RcvBuf, &BUFFER);
        }
        Ok(Self { socket, read: vec![0; READ] })
    }

    /// Sends a batch, and waits until the kernel has applied all of it, or refused it.
    pub(crate) fn commit(&mut self, mut batch: Vec<u8>) -> io::Result<()> {
        let Some(last) = acknowledge_last(&mut batch) else { return Ok(()) };
        self.send(&batch)?;
        self.receive(|message| match message.error() {
            Some(0) if message.sequence == last => Some(Ok(())),
            Some(code) if code != 0 => Some(Err(io::Error::from_raw_os_error(code))),
            _ => None,
        })
    }

    /// Sends one request and waits for the acknowledgement.
    pub(crate) fn ask(&mut self, request: &[u8]) -> io::Result<()> {
        self.send(request)?;
        self.receive(|message| match message.error()? {
            0 => Some(Ok(())),
            code => Some(Err(io::Error::from_raw_os_error(code))),
        })
    }

    /// Requests a list. If the kernel does not know the kind of object at all, the list is empty.
    pub(crate) fn dump<T>(
        &mut self,
        request: &[u8],
        read: impl Fn(Message<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMPS {
            let mut found = Vec::new();
            let mut is_whole = true;
            self.send(request)?;
            let done = self.receive(|message| {
                is_whole &= message.flags & DUMP_INTERRUPTED == 0;
                match (message.kind, message.error()) {
                    (DONE, _) => Some(Ok(())),
                    (ERROR, Some(code)) if code != 0 => Some(Err(io::Error::from_raw_os_error(code))),
                    (ERROR, _) => None,
                    _ => {
                        found.extend(read(message));
                        None
                    }
                }
            });
            match done {
                Ok(()) if is_whole => return Ok(found),
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(Vec::new()),
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::from(io::ErrorKind::ResourceBusy))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self.socket.send(bytes)? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::WriteZero)),
        }
    }

    /// Reads messages until `end` returns a result.
    fn receive(&mut self, mut end: impl FnMut(Message<'_>) -> Option<io::Result<()>>) -> io::Result<()> {
        loop {
            let length = self.socket.recv_raw(&mut self.read)?;
            for message in messages(&self.read[..length]) {
                if let Some(result) = end(message) {
                    return result;
                }
            }
        }
    }
}

/// Makes a socket nonblocking, for a task that waits until it is readable.
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open and unchanged as long as the value that owns it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

/// Requests an acknowledgement for the last message of a batch only (hundreds of them would not fit in the socket), and returns its sequence
/// number. Errors are reported for every message.
fn acknowledge_last(batch: &mut [u8]) -> Option<u32> {
    let mut at = 0;
    let mut last = None;
    loop {
        let next = messages(&batch[at..]).next();
        let Some((kind, sequence, flags)) =
            next.map(|message| (message.kind, message.sequence, message.flags & !ACK))
        else {
            break;
        };
        let length = u32::from_ne_bytes(batch[at..at + 4].try_into().ok()?) as usize;
        batch[at + 6..at + 8].copy_from_slice(&flags.to_ne_bytes());
        if !BATCH.contains(&kind) {
            last = Some((at, sequence));
        }
        at += length.next_multiple_of(4);
    }
    let (at, sequence) = last?;
    let flags = u16::from_ne_bytes(batch[at + 6..at + 8].try_into().ok()?) | netlink::ACK;
    batch[at + 6..at + 8].copy_from_slice(&flags.to_ne_bytes());
    Some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Writer;

    #[test]
    fn only_the_last_message_of_a_batch_is_acknowledged() {
        let mut batch = Writer::new(BATCH[0], ACK, 1, 0, 10).finish();
        for sequence in 2..=4 {
            batch.extend(Writer::new(0x0a00, ACK, sequence, 1, 0).finish());
        }
        batch.extend(Writer::new(BATCH[1], ACK, 5, 0, 10).finish());
        assert_eq!(acknowledge_last(&mut batch), Some(4));
        let flags: Vec<u16> = messages(&batch).map(|message| message.flags & ACK).collect();
        assert_eq!(flags, [0, 0, 0, ACK, 0]);
        let mut empty = Writer::new(BATCH[0], ACK, 1, 0, 10).finish();
        assert_eq!(acknowledge_last(&mut empty), None);
    }
}
