//! Copies between a stream of frames and a connection of plain bytes.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::coop::consume_budget;

use super::{FrameError, Incoming, PIECE, Receiver, Sender, Source, Waiting, whole};
use crate::duplex::Writer;
use crate::pipe::Pipe;

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
    both(receiver, sender, outwards(sender, read), write).await
}

/// The same, but much data of the plain connection is not copied to this process.
pub async fn copy_spliced<R: AsyncRead + Unpin>(
    receiver: &mut Receiver<R>,
    sender: &Sender<Writer>,
    read: &mut impl Source,
    write: &mut (impl AsyncWrite + Unpin),
) -> Result<Option<Bytes>, CopyError> {
    both(receiver, sender, outwards_spliced(sender, read), write).await
}

/// Sends what a plain connection has until it ends, and then the end.
async fn outwards<W: AsyncWrite + Unpin>(
    sender: &Sender<W>,
    read: &mut (impl AsyncRead + Unpin),
) -> Result<(), CopyError> {
    let mut chunk = vec![0; CHUNK.0];
    loop {
        let room = sender.room().await?;
        if !once(sender, room, read, &mut chunk).await? {
            return Ok(sender.end().await?);
        }
    }
}

/// The same, but moves much data.
async fn outwards_spliced(sender: &Sender<Writer>, read: &mut impl Source) -> Result<(), CopyError> {
    let mut chunk = vec![0; CHUNK.0];
    loop {
        let room = sender.room().await?;
        if let Some((there, socket)) = read.much()
            && let Some(mut pipe) = Pipe::take()
        {
            sender.splice(&mut pipe, socket, whole(there).min(room)).await?;
            // Other tasks have their turn.
            consume_budget().await;
        } else if !once(sender, room, read, &mut chunk).await? {
            return Ok(sender.end().await?);
        }
    }
}

/// Reads at most `room` bytes and sends them; `false` at the end. `chunk` grows with much data.
async fn once<W: AsyncWrite + Unpin>(
    sender: &Sender<W>,
    room: usize,
    read: &mut (impl AsyncRead + Unpin),
    chunk: &mut Vec<u8>,
) -> Result<bool, CopyError> {
    let most = room.min(chunk.len());
    let length = read.read(&mut chunk[..most]).await.map_err(CopyError::Read)?;
    sender.data(&chunk[..length]).await?;
    if length == chunk.len() && length < CHUNK.1 {
        chunk.resize((length * 4).min(CHUNK.1), 0);
    }
    Ok(length > 0)
}

/// Copies inwards while `outwards` sends.
async fn both<R, W>(
    receiver: &mut Receiver<R>,
    sender: &Sender<W>,
    outwards: impl Future<Output = Result<(), CopyError>>,
    write: &mut (impl AsyncWrite + Unpin),
) -> Result<Option<Bytes>, CopyError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    // The credit limits how much waits here.
    let waiting = Waiting::default();
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
