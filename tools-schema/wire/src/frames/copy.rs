//! Copies between a stream of frames and a connection of plain bytes.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{FrameError, Incoming, PIECE, Receiver, Sender, Waiting};

/// The size of one read of the plain connection, in bytes: it grows from the first to the second with bulk data.
const CHUNK: (usize, usize) = (8 << 10, PIECE);

/// Why copying ended early.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The stream of frames failed.
    #[error(transparent)]
    Frames(#[from] FrameError),
    /// The plain connection could not be read.
    #[error("read from the connection")]
    Read(#[source] io::Error),
    /// The plain connection could not be written to.
    #[error("write to the connection")]
    Write(#[source] io::Error),
}

/// Copies both ways until both directions have ended, or until the peer sends its final message, which is then returned. Each direction ends
/// separately: an end of the plain connection becomes a frame, and an end frame shuts the connection down for writing. Messages and standard error
/// are ignored; the latter gets no new credit.
pub async fn copy<R, W>(
    receiver: &mut Receiver<R>,
    sender: &Sender<W>,
    read: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
) -> Result<Option<Bytes>, CopyError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    // The credit limits how much waits here.
    let waiting = Waiting::default();
    let outwards = async {
        let mut chunk = vec![0; CHUNK.0];
        loop {
            let room = sender.room().await?.min(chunk.len());
            let length = read.read(&mut chunk[..room]).await.map_err(CopyError::Read)?;
            if length == 0 {
                return Ok::<_, CopyError>(sender.end().await?);
            }
            sender.data(&chunk[..length]).await?;
            if length == chunk.len() && length < CHUNK.1 {
                chunk.resize((length * 4).min(CHUNK.1), 0);
            }
        }
    };
    let inwards = async {
        while let Some(bytes) = waiting.next().await {
            write.write_all(&bytes).await.map_err(CopyError::Write)?;
            // If the connection has failed, the reading side reports it; after the peer's final message it may be closed.
            let _ = sender.took(bytes.len()).await;
        }
        write.shutdown().await.map_err(CopyError::Write)
    };
    let all = async {
        let (mut outwards, mut is_ended, mut is_cut) = (std::pin::pin!(outwards), false, false);
        let mut is_over = false;
        // Only these two are awaited here, so that a started frame is always polled until it is written.
        while !is_ended || !is_over || is_cut {
            let next = tokio::select! {
                biased;
                ended = &mut outwards, if !is_ended => {
                    is_ended = true;
                    match ended {
                        Ok(()) => {}
                        // The peer may have sent before why it accepts no more.
                        Err(CopyError::Frames(_)) => is_cut = true,
                        Err(error) => return Err(error),
                    }
                    continue;
                }
                next = receiver.next() => next?,
            };
            match next.ok_or(FrameError::Closed)? {
                // The consumer stops only after a failure, which ends this loop too.
                Incoming::Data(bytes) => waiting.push(bytes),
                Incoming::End => {
                    is_over = true;
                    waiting.end();
                }
                Incoming::Done(message) => {
                    waiting.end();
                    return Ok(Some(message));
                }
                Incoming::Stderr(_) | Incoming::Control(_) => {}
            }
        }
        Ok::<_, CopyError>(None)
    };
    Ok(tokio::try_join!(all, inwards)?.0)
}
