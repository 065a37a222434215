//! Packets in a byte stream that may still hold bytes of an earlier session, as a port of a virtio-serial device does.
//!
//! ```text
//!  guest: HELLO n ──> host: HELLO n ──> packets in both directions
//!     ^                                       │
//!     └── the guest opens the port anew <─────┘ its agent ends, or the host asks for it: see `serial`
//! ```
//! Each side drops what comes before the other's HELLO. The guest says a new nonce each time, so it does not take an old answer for the new
//! one. A HELLO is a packet with a number of its own, and a packet follows the other without a gap: its header has its length.

use std::fmt;
use std::io;
use std::str::FromStr;

use crate::connection::Cids;
use crate::device::{Device, Front};
use crate::packet::{HEADER_LEN, Header, STREAM};

/// Maximum length of a packet with its header, in bytes: what the driver in the guest takes in one write, as a whole or not at all.
pub const FRAME_MAX: usize = 32 << 10;
/// Number of a HELLO among the operations of packets.
const HELLO: u16 = 0x4e58;
/// Tells a HELLO from bytes that look like one by chance.
const MAGIC: [u8; 32] = [
    0x9d, 0x31, 0xc6, 0x0b, 0xe8, 0x77, 0x52, 0xaf, 0x14, 0x8e, 0xd9, 0x63, 0x3a, 0xf0, 0x25, 0xbc, 0x47,
    0x91, 0x0e, 0xd2, 0x6c, 0xb5, 0x78, 0x03, 0xea, 0x5f, 0x86, 0x29, 0xc1, 0x9a, 0x74, 0x1d,
];
/// Maximum length of a nonce, in bytes. In a HELLO, zeros follow it up to this length.
const NONCE_LEN: usize = 64;
const HELLO_LEN: usize = HEADER_LEN + MAGIC.len() + NONCE_LEN;
const PREFIX_LEN: usize = HEADER_LEN + MAGIC.len();
/// Size of a receiver's buffer, in bytes.
const BUFFER: usize = 2 * FRAME_MAX;
/// A packet is begun in a batch only if there is room for so much of its payload, in bytes.
const ROOM_MIN: usize = 4 << 10;

/// What tells one session from another: 1 to 64 of a-z, A-Z, 0-9, - and _.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce([u8; NONCE_LEN]);

impl Nonce {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let (text, rest) = bytes.split_at(length);
        if rest.iter().any(|byte| *byte != 0) {
            return None;
        }
        std::str::from_utf8(text).ok()?.parse().ok()
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        f.write_str(std::str::from_utf8(text).unwrap_or_default())
    }
}

impl FromStr for Nonce {
    type Err = Broken;

    fn from_str(text: &str) -> Result<Self, Broken> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if text.is_empty() || text.len() > NONCE_LEN || !text.bytes().all(is_allowed) {
            return Err(Broken { what: "a nonce is 1 to 64 of a-z, A-Z, 0-9, - and _" });
        }
        let mut nonce = [0; NONCE_LEN];
        nonce[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self(nonce))
    }
}

/// The far side does not keep to the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken {
    /// What is wrong.
    pub what: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl std::error::Error for Broken {}

/// The HELLO that begins a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// One with any nonce.
    Any,
    /// One with this nonce.
    This(Nonce),
}

/// What came from the far side.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// It begins a session.
    Hello(Nonce),
    /// A packet with its payload.
    Packet(Header, &'a [u8]),
}

/// Cuts what comes from the far side into packets. Its size is fixed.
pub struct Receiver {
    prefix: [u8; PREFIX_LEN],
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The HELLO that is waited for; `None` within a session.
    waiting: Option<Expected>,
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (length, waiting) = (self.end - self.start, self.waiting);
        f.debug_struct("Receiver").field("length", &length).field("waiting", &waiting).finish_non_exhaustive()
    }
}

/// What a HELLO of the side `near` begins with.
fn prefix(cids: Cids) -> [u8; PREFIX_LEN] {
    let header = Header {
        source_cid: cids.near,
        destination_cid: cids.far,
        kind: STREAM,
        operation: HELLO,
        length: (MAGIC.len() + NONCE_LEN) as u32,
        ..Header::default()
    };
    let mut bytes = [0; PREFIX_LEN];
    bytes[..HEADER_LEN].copy_from_slice(&header.encode());
    bytes[HEADER_LEN..].copy_from_slice(&MAGIC);
    bytes
}

impl Receiver {
    /// Waits for a HELLO of the far side.
    #[must_use]
    pub fn new(cids: Cids, expected: Expected) -> Self {
        Self {
            prefix: prefix(Cids { near: cids.far, far: cids.near }),
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            waiting: Some(expected),
        }
    }

    /// Ends the session, and waits for the next HELLO.
    pub fn wait(&mut self, expected: Expected) {
        self.waiting = Some(expected);
    }

    /// Returns whether there is a session.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.waiting.is_none()
    }

    /// Calls `read` with room for more bytes, at least [`FRAME_MAX`]. Call it only after [`Receiver::take`] has returned `None`.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let count = read(&mut self.buffer[self.end..])?;
        self.end = (self.end + count).min(BUFFER);
        Ok(count)
    }

    /// Returns what comes next; `None` if it is incomplete.
    ///
    /// # Errors
    /// When the far side does not keep to the protocol. The session is over then, and another HELLO is waited for.
    pub fn take(&mut self) -> Result<Option<Incoming<'_>>, Broken> {
        let Some(expected) = self.waiting else { return self.packet() };
        while let Some(at) = find(&self.buffer[self.start..self.end], &self.prefix) {
            self.start += at;
            if self.end - self.start < HELLO_LEN {
                return Ok(None);
            }
            let nonce = Nonce::decode(&self.buffer[self.start + PREFIX_LEN..self.start + HELLO_LEN]);
            if let Some(nonce) = nonce
                && (expected == Expected::Any || expected == Expected::This(nonce))
            {
                self.start += HELLO_LEN;
                self.waiting = None;
                return Ok(Some(Incoming::Hello(nonce)));
            }
            self.start += 1;
        }
        self.start = self.end;
        Ok(None)
    }

    fn packet(&mut self) -> Result<Option<Incoming<'_>>, Broken> {
        let Some(first) = self.buffer[self.start..self.end].first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = Header::decode(first);
        let length = header.length as usize;
        if length > FRAME_MAX - HEADER_LEN {
            return Err(self.broken("a packet is too long"));
        }
        let from = self.start + HEADER_LEN;
        let to = from + length;
        if self.end < to {
            return Ok(None);
        }
        if header.operation == HELLO {
            let nonce = self.buffer[self.start..to].strip_prefix(&self.prefix).and_then(Nonce::decode);
            let Some(nonce) = nonce else { return Err(self.broken("a HELLO is malformed")) };
            self.start = to;
            return Ok(Some(Incoming::Hello(nonce)));
        }
        self.start = to;
        Ok(Some(Incoming::Packet(header, &self.buffer[from..to])))
    }

    fn broken(&mut self, what: &'static str) -> Broken {
        self.waiting = Some(Expected::Any);
        self.start += 1;
        Broken { what }
    }
}

/// Returns where `prefix` begins in `bytes`; if they end before it does, where what there is of it begins.
fn find(bytes: &[u8], prefix: &[u8; PREFIX_LEN]) -> Option<usize> {
    (0..bytes.len()).find(|at| bytes[*at] == prefix[0] && prefix.starts_with(head(&bytes[*at..])))
}

fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(PREFIX_LEN)]
}

/// What is to be written to the transport: whole packets, at most [`FRAME_MAX`] bytes.
#[derive(Debug, Default)]
pub struct Sender {
    bytes: Vec<u8>,
    sent: usize,
}

impl Sender {
    /// Begins a session: drops what was not written yet, and says HELLO.
    pub fn hello(&mut self, cids: Cids, nonce: Nonce) {
        self.clear();
        self.bytes.extend_from_slice(&prefix(cids));
        self.bytes.extend_from_slice(&nonce.0);
    }

    /// Drops what was not written yet.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }

    /// Takes packets of a device's lane, if everything before was written. Returns whether there is something to write.
    pub fn fill<F: Front>(&mut self, device: &mut Device<F>, lane: usize) -> bool {
        if self.sent < self.bytes.len() {
            return true;
        }
        self.clear();
        while self.bytes.len() + HEADER_LEN + ROOM_MIN <= FRAME_MAX && device.has_packet(lane) {
            let room = FRAME_MAX - HEADER_LEN - self.bytes.len();
            device.next_packet(lane, room, |header, payload| {
                self.bytes.extend_from_slice(&header.encode());
                self.bytes.extend_from_slice(payload);
            });
        }
        !self.bytes.is_empty()
    }

    /// Returns what is to be written.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Counts bytes that were written.
    pub fn consume(&mut self, count: usize) {
        self.sent = (self.sent + count).min(self.bytes.len());
    }
}

#[cfg(test)]
mod tests;
