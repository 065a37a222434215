//! The reading end.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::rules::{Flow, Rules};
use super::{FrameError, HEADER, Kind};

/// How much is read at once at least, in bytes.
const CHUNK: usize = 64 << 10;

/// A frame for whoever reads. Credit is none of them: it goes to the [`super::Sender`] of the same stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Bytes. [`super::Sender::took`] is to be told once they are taken away.
    Data(Bytes),
    /// Bytes of standard error; the same holds for them.
    Stderr(Bytes),
    /// No more data.
    End,
    /// A message.
    Control(Bytes),
    /// How it ended. Nothing follows.
    Done(Bytes),
}

/// Reads frames and checks them. It is to be read all the time, whatever becomes of the data: only so it hears of credit, of a
/// message or of the end. What waits meanwhile is bounded by the credit that was given.
#[derive(Debug)]
pub struct Receiver<R> {
    read: R,
    buffer: BytesMut,
    /// The frame whose header was taken already.
    begun: Option<(Kind, usize)>,
    rules: Rules,
    flow: Arc<Flow>,
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    pub(super) fn new(read: R, buffer: BytesMut, flow: Arc<Flow>) -> Self {
        Self { read, buffer, begun: None, rules: Rules::default(), flow }
    }

    /// The next frame; `None` once the last one was read, or where the connection ends between two frames. Can be cancelled at
    /// any time without losing anything.
    pub async fn next(&mut self) -> Result<Option<Incoming>, FrameError> {
        let next = self.read_next().await;
        if !matches!(next, Ok(Some(_))) {
            self.flow.close();
        }
        next
    }

    async fn read_next(&mut self) -> Result<Option<Incoming>, FrameError> {
        loop {
            if self.begun.is_none() && self.rules.is_done() {
                return Ok(None);
            }
            let Some((kind, length)) = self.begin()? else {
                if !self.fill(HEADER).await? {
                    return if self.buffer.is_empty() { Ok(None) } else { Err(FrameError::Cut) };
                }
                continue;
            };
            if self.buffer.len() < length {
                if !self.fill(length).await? {
                    return Err(FrameError::Cut);
                }
                continue;
            }
            self.begun = None;
            let mut payload = self.buffer.split_to(length).freeze();
            return Ok(Some(match kind {
                Kind::Data => Incoming::Data(payload),
                Kind::Stderr => Incoming::Stderr(payload),
                Kind::End => Incoming::End,
                Kind::Credit => {
                    self.flow.add(payload.get_u32())?;
                    continue;
                }
                Kind::Control => Incoming::Control(payload),
                Kind::Done => Incoming::Done(payload),
            }));
        }
    }

    /// The frame that is under way, if so much of it is there.
    fn begin(&mut self) -> Result<Option<(Kind, usize)>, FrameError> {
        if self.begun.is_none()
            && let Some(header) = self.buffer.first_chunk::<HEADER>()
        {
            self.begun = Some(self.rules.check(*header, &self.flow)?);
            self.buffer.advance(HEADER);
        }
        Ok(self.begun)
    }

    /// Reads more of the `length` bytes that are wanted; `false` at the end of the connection.
    async fn fill(&mut self, length: usize) -> Result<bool, FrameError> {
        let missing = length - self.buffer.len();
        self.buffer.reserve(missing.max(CHUNK));
        Ok(self.read.read_buf(&mut self.buffer).await? > 0)
    }
}

#[cfg(test)]
impl<R> Receiver<R> {
    /// How much memory its buffer takes, in bytes.
    pub(super) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }
}

impl<R> Drop for Receiver<R> {
    fn drop(&mut self) {
        self.flow.close();
    }
}
