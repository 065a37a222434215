//! Frames: the format of a stream between host and guest after its opening. It is the same in both directions.
//!
//! ```text
//! frame   = kind (1 byte), length of the payload (3 bytes, big endian), payload
//! data    1   bytes: standard input, standard output, what a TCP connection carries, a tar
//! stderr  2   bytes: standard error
//! end     3   empty: no more data in this direction
//! credit  4   u32, big endian: how many more bytes of data and stderr the other side may send
//! control 5   JSON: a message while the stream is open
//! done    6   JSON: how it ended; the last frame of its direction
//! ```
//! Data and stderr need credit. Each side starts with [`WINDOW`], and gets more as the other side consumes its bytes. So a receiver never buffers
//! more than the credit that it gave, and a slow reader only blocks its own stream. A sender that has little credit left waits for more, rather than
//! send small frames; a receiver gives new credit at the latest when it has consumed three quarters of [`WINDOW`]. A protocol violation closes the
//! connection: [`Receiver`] checks each frame before it buffers anything.
//!
//! A connection that carries nothing but one stream of data each way can do without credit: [`copy_uncredited`].
//!
//! Much data of a file need not be copied to this process on its way into frames: [`Moved`].

mod copy;
mod receiver;
mod rules;
mod sender;
mod splice;
#[cfg(test)]
mod tests;
mod uncredited;
mod waiting;

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

pub use copy::{CopyError, copy};
pub use receiver::{Incoming, Receiver};
pub use sender::Sender;
pub use splice::Moved;
pub use uncredited::copy_uncredited;
pub use waiting::Waiting;

/// The length of a frame without its payload, in bytes.
pub const HEADER: usize = 4;
/// The maximum payload of data and stderr, in bytes.
pub const PAYLOAD_MAX: usize = 256 << 10;
/// How much one packet of vsock holds, in bytes: a longer write is cut into several, and each of them costs both sides more than its bytes do.
pub const PACKET: usize = 64 << 10;
/// The payload of a frame that fills one packet, in bytes.
pub const FULL: usize = PACKET - HEADER;
/// The largest payload that a [`Sender`] makes, in bytes: with its header, the frame fills whole packets. It also fits into the buffer of a vsock
/// connection, so that its end need not wait until its beginning was read.
pub const PIECE: usize = PAYLOAD_MAX - HEADER;
/// The maximum payload of control and done, in bytes.
pub const MESSAGE_MAX: usize = 64 << 10;
/// The initial credit of each side, in bytes.
pub const WINDOW: u32 = 1 << 20;
/// The maximum unused credit of a side, in bytes.
pub const CREDIT_MAX: u32 = 64 << 20;

/// The kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes.
    Data = 1,
    /// Bytes of standard error.
    Stderr = 2,
    /// No more data in this direction.
    End = 3,
    /// More credit.
    Credit = 4,
    /// A message while the stream is open.
    Control = 5,
    /// How the stream ended. This is the last frame.
    Done = 6,
}

impl Kind {
    /// Returns the kind with a number; `None` if there is no such kind.
    pub const fn of(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Data,
            2 => Self::Stderr,
            3 => Self::End,
            4 => Self::Credit,
            5 => Self::Control,
            6 => Self::Done,
            _ => return None,
        })
    }

    /// Returns whether it needs credit.
    pub const fn is_data(self) -> bool {
        matches!(self, Self::Data | Self::Stderr)
    }

    /// Returns whether its payload may have this length.
    const fn takes(self, length: usize) -> bool {
        match self {
            // An empty one would cost no credit, so it could be sent without limit.
            Self::Data | Self::Stderr => length > 0 && length <= PAYLOAD_MAX,
            Self::End => length == 0,
            Self::Credit => length == 4,
            Self::Control | Self::Done => length <= MESSAGE_MAX,
        }
    }

    /// Returns kind and length of the frame with this header.
    fn parse([kind, length @ ..]: [u8; HEADER]) -> Result<(Self, usize), FrameError> {
        let kind = Self::of(kind).ok_or(FrameError::UnknownKind { kind })?;
        let [high, middle, low] = length.map(usize::from);
        let length = high << 16 | middle << 8 | low;
        if kind.takes(length) { Ok((kind, length)) } else { Err(FrameError::Length { kind, length }) }
    }

    /// Returns the header of a frame with a payload of `length` bytes, which must be valid for its kind.
    pub const fn header(self, length: usize) -> [u8; HEADER] {
        debug_assert!(self.takes(length), "a frame of this kind cannot be so long");
        let [.., high, middle, low] = length.to_be_bytes();
        [self as u8, high, middle, low]
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Data => "data",
            Self::Stderr => "stderr",
            Self::End => "end",
            Self::Credit => "credit",
            Self::Control => "control",
            Self::Done => "done",
        })
    }
}

/// Returns the payload of the largest frame that fills whole packets, if so many bytes are there; [`PIECE`] if they do not fill one.
pub const fn whole(there: usize) -> usize {
    let packets = there.saturating_add(HEADER) / PACKET;
    let most = (PIECE + HEADER) / PACKET;
    if 0 < packets && packets < most { packets * PACKET - HEADER } else { PIECE }
}

/// Why a stream of frames failed.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Unknown kind of frame.
    #[error("unknown frame kind {kind}")]
    UnknownKind {
        /// Its number.
        kind: u8,
    },
    /// A payload that is too long or too short for its kind.
    #[error("{kind} frame of {length} bytes")]
    Length {
        /// The frame's kind.
        kind: Kind,
        /// The payload's length, in bytes.
        length: usize,
    },
    /// More data than the credit allows.
    #[error("{length} bytes of data exceed the credit of {credit}")]
    Overrun {
        /// The payload's length, in bytes.
        length: usize,
        /// The remaining credit, in bytes.
        credit: u64,
    },
    /// A credit frame with too much credit, or with none.
    #[error("invalid credit of {bytes} bytes")]
    Credit {
        /// The credit that was given, in bytes.
        bytes: u32,
    },
    /// A frame that may not follow the end of its direction.
    #[error("{kind} frame after the end")]
    AfterEnd {
        /// The frame's kind.
        kind: Kind,
    },
    /// The connection ended within a frame.
    #[error("the connection ended within a frame")]
    Cut,
    /// The stream has ended, or was abandoned in the middle of a frame.
    #[error("the stream is closed")]
    Closed,
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

/// Creates the two ends of a stream of frames over a connection. `read` has bytes that were already read after the opening.
pub fn over<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: R,
    writer: W,
    read: BytesMut,
) -> (Receiver<R>, Sender<W>) {
    over_with(reader, writer, read, WINDOW)
}

/// Creates the two ends of a stream on which `early` bytes of data were sent already, together with the line that opens it: at most [`WINDOW`].
pub fn over_after<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: R,
    writer: W,
    read: BytesMut,
    early: u32,
) -> (Receiver<R>, Sender<W>) {
    let flow = Arc::new(rules::Flow::after(WINDOW, early));
    (Receiver::new(reader, read, flow.clone()), Sender::new(writer, flow))
}

/// Creates the two ends with another initial credit than [`WINDOW`].
pub fn over_with<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: R,
    writer: W,
    read: BytesMut,
    window: u32,
) -> (Receiver<R>, Sender<W>) {
    let flow = Arc::new(rules::Flow::after(window, 0));
    (Receiver::new(reader, read, flow.clone()), Sender::new(writer, flow))
}

/// Reads the line that opens a stream, or the answer to it: at most `max` bytes. Bytes after it stay in `buffer`. Returns `None` if the connection
/// ends before the line does.
pub async fn read_line(
    read: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    max: usize,
) -> io::Result<Option<BytesMut>> {
    let mut scanned = 0;
    loop {
        if let Some(at) = memchr::memchr(b'\n', &buffer[scanned..]) {
            let mut line = buffer.split_to(scanned + at + 1);
            line.truncate(scanned + at);
            if line.len() > max {
                return Err(too_long(max));
            }
            return Ok(Some(line));
        }
        scanned = buffer.len();
        if scanned > max {
            return Err(too_long(max));
        }
        buffer.reserve(4 << 10);
        if read.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn too_long(max: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a line of more than {max} bytes"))
}
