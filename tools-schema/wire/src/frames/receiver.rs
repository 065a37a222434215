//! The receiving end.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::rules::{Flow, Rules};
use super::{FULL, FrameError, HEADER, Kind, PAYLOAD_MAX};
use crate::block::{self, Block};

/// The minimum size of one read, in bytes.
const CHUNK: usize = 64 << 10;
/// A payload of so many bytes is read into a block of its own. A peer that sends many of just this length makes a stream take four times
/// the credit that it was given.
const LARGE: usize = FULL;

// A block holds the longest payload.
const _: () = assert!(PAYLOAD_MAX <= block::SIZE);

/// A received frame. Credit frames are not returned: they go to the [`super::Sender`] of the same stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Bytes. Call [`super::Sender::took`] once they are consumed.
    Data(Bytes),
    /// Bytes of standard error; the same applies to them.
    Stderr(Bytes),
    /// No more data.
    End,
    /// A message.
    Control(Bytes),
    /// How the stream ended. This is the last frame.
    Done(Bytes),
}

/// Reads and checks frames. Keep reading, whatever happens to the data: credit, messages and the end arrive only this way. The given credit limits
/// how much has to be buffered meanwhile.
#[derive(Debug)]
pub struct Receiver<R> {
    read: R,
    buffer: BytesMut,
    /// The frame whose header was read.
    begun: Option<(Kind, usize)>,
    /// Its payload so far, if it is large.
    large: Option<Block>,
    /// Whether the last frame was large: then nothing but the header of the next one is read with it.
    was_large: bool,
    rules: Rules,
    flow: Arc<Flow>,
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    pub(super) fn new(read: R, buffer: BytesMut, flow: Arc<Flow>) -> Self {
        Self { read, buffer, begun: None, large: None, was_large: false, rules: Rules::default(), flow }
    }

    /// Returns the next frame; `None` after the last one, or if the connection ends between two frames. Cancel-safe: nothing is lost.
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
            let mut payload = if kind.is_data() && length >= LARGE {
                if !self.fill_large(length).await? {
                    return Err(FrameError::Cut);
                }
                let Some(block) = self.large.take() else { continue };
                self.was_large = true;
                block.freeze()
            } else {
                if self.buffer.len() < length {
                    if !self.fill(length).await? {
                        return Err(FrameError::Cut);
                    }
                    continue;
                }
                self.was_large = false;
                self.buffer.split_to(length).freeze()
            };
            self.begun = None;
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

    /// Returns the current frame once its header is complete.
    fn begin(&mut self) -> Result<Option<(Kind, usize)>, FrameError> {
        if self.begun.is_none()
            && let Some(header) = self.buffer.first_chunk::<HEADER>()
        {
            self.begun = Some(self.rules.check(*header, &self.flow)?);
            self.buffer.advance(HEADER);
        }
        Ok(self.begun)
    }

    /// Reads more of the `length` wanted bytes; `false` at the end of the connection.
    async fn fill(&mut self, length: usize) -> Result<bool, FrameError> {
        let missing = length - self.buffer.len();
        if self.was_large {
            self.buffer.reserve(missing);
            return Ok(self.read.read_buf(&mut (&mut self.buffer).limit(missing)).await? > 0);
        }
        self.buffer.reserve(missing.max(CHUNK));
        Ok(self.read.read_buf(&mut self.buffer).await? > 0)
    }

    /// Reads a large payload to its end; `false` at the end of the connection.
    async fn fill_large(&mut self, length: usize) -> Result<bool, FrameError> {
        let block = self.large.get_or_insert_default();
        if block.is_empty() {
            let there = self.buffer.len().min(length);
            block.push(&self.buffer[..there]);
            self.buffer.advance(there);
        }
        while block.len() < length {
            let missing = length - block.len();
            let read = self.read.read(&mut block.room()[..missing]).await?;
            if read == 0 {
                return Ok(false);
            }
            block.fill(read);
        }
        Ok(true)
    }
}

#[cfg(test)]
impl<R> Receiver<R> {
    /// Returns the size of its buffer, in bytes.
    pub(super) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }
}

impl<R> Drop for Receiver<R> {
    fn drop(&mut self) {
        self.flow.close();
    }
}
