//! The sending end.

use std::sync::Arc;

use bytes::Buf;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Mutex;

use super::rules::Flow;
use super::{FrameError, Kind, Moved, PIECE};
use crate::duplex::Writer;

/// Writes frames. Cheap to clone: several tasks may write to one stream.
///
/// Do not cancel a write in the middle of a frame, as `select!` may do: after that, the stream is closed for writing.
#[derive(Debug)]
pub struct Sender<W> {
    flow: Arc<Flow>,
    output: Arc<Mutex<Output<W>>>,
}

#[derive(Debug)]
struct Output<W> {
    write: W,
    /// Whether a frame is incomplete, or the last one was sent.
    is_closed: bool,
}

impl<W> Clone for Sender<W> {
    fn clone(&self) -> Self {
        Self { flow: self.flow.clone(), output: self.output.clone() }
    }
}

impl<W: AsyncWrite + Unpin> Sender<W> {
    pub(super) fn new(write: W, flow: Arc<Flow>) -> Self {
        Self { flow, output: Arc::new(Mutex::new(Output { write, is_closed: false })) }
    }

    /// Waits for credit, and returns how many bytes one frame may have now: more than a few. Takes no credit, so it is cancel-safe.
    pub async fn room(&self) -> Result<usize, FrameError> {
        Ok((self.flow.room(PIECE as u32).await? as usize).min(PIECE))
    }

    /// Sends bytes, in as many frames as the credit requires.
    pub async fn data(&self, bytes: &[u8]) -> Result<(), FrameError> {
        self.send(Kind::Data, bytes).await
    }

    /// Sends bytes of standard error.
    pub async fn stderr(&self, bytes: &[u8]) -> Result<(), FrameError> {
        self.send(Kind::Stderr, bytes).await
    }

    async fn send(&self, kind: Kind, mut bytes: &[u8]) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            let most = bytes.len().min(PIECE) as u32;
            let (now, later) = bytes.split_at(self.flow.take(most).await? as usize);
            self.write(kind, now).await?;
            bytes = later;
        }
        Ok(())
    }

    /// Stops sending data: tasks that wait for credit fail at once. Messages can still be sent.
    pub fn close(&self) {
        self.flow.close();
    }

    /// Sends the end of this direction's data.
    pub async fn end(&self) -> Result<(), FrameError> {
        self.write(Kind::End, &[]).await
    }

    /// Sends a message of at most [`super::MESSAGE_MAX`] bytes.
    pub async fn control(&self, message: &[u8]) -> Result<(), FrameError> {
        self.write(Kind::Control, message).await
    }

    /// Sends the final message, of at most [`super::MESSAGE_MAX`] bytes. Nothing can be sent after it.
    pub async fn done(&self, message: &[u8]) -> Result<(), FrameError> {
        self.write(Kind::Done, message).await
    }

    /// Records that this many bytes of the peer were consumed, and gives it new credit when that is worth a frame.
    pub async fn took(&self, bytes: usize) -> Result<(), FrameError> {
        match self.flow.took(bytes) {
            Some(more) => self.write(Kind::Credit, &more.to_be_bytes()).await,
            None => Ok(()),
        }
    }

    async fn write(&self, kind: Kind, payload: &[u8]) -> Result<(), FrameError> {
        if !kind.takes(payload.len()) {
            return Err(FrameError::Length { kind, length: payload.len() });
        }
        let mut output = self.output.lock().await;
        // A cancelled write below leaves an incomplete frame.
        if std::mem::replace(&mut output.is_closed, true) {
            return Err(FrameError::Closed);
        }
        let header = kind.header(payload.len());
        output.write.write_all_buf(&mut (&header[..]).chain(payload)).await?;
        output.write.flush().await?;
        output.is_closed = kind == Kind::Done;
        Ok(())
    }
}

impl Sender<Writer> {
    /// Sends a frame of a file's data, once there is credit for all of it.
    pub async fn moved(&self, Moved { mut pipe, length }: Moved) -> Result<(), FrameError> {
        self.flow.take_all(length as u32).await?;
        let mut output = self.output.lock().await;
        // A failure below leaves an incomplete frame.
        if std::mem::replace(&mut output.is_closed, true) {
            return Err(FrameError::Closed);
        }
        output.write.drain(&mut pipe).await?;
        output.is_closed = false;
        Ok(())
    }
}
