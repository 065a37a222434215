//! Between the frames of a stream and the thread that packs or unpacks.

use std::io;

use bytes::Bytes;
use nexus_wire::frames::{FrameError, Incoming, Receiver, Sender, Waiting};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::chunks::Chunk;

/// Passes the data of a stream on until it ends. If the peer says before how the stream ended, its words; `None` too where nobody
/// takes the data any more. A connection that fails is told to the taker as well.
pub async fn receive<R, W>(
    receiver: &mut Receiver<R>,
    sender: &Sender<W>,
    into: mpsc::Sender<Chunk>,
) -> Result<Option<Bytes>, FrameError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    // No more waits here than the credit that was given.
    let waiting = Waiting::default();
    let reading = async {
        let ended = read(receiver, &waiting).await;
        waiting.end();
        ended
    };
    let passing = async {
        while let Some(bytes) = waiting.next().await {
            let length = bytes.len();
            if into.send(Ok(bytes)).await.is_err() {
                return;
            }
            // A connection that failed shows where it is read.
            let _ = sender.took(length).await;
        }
    };
    let (mut passing, mut reading) = (std::pin::pin!(passing), Box::pin(reading));
    let ended = tokio::select! {
        ended = &mut reading => ended,
        () = &mut passing => return Ok(None),
    };
    // What arrived before is delivered.
    drop(reading);
    passing.await;
    if let Err(error) = &ended {
        let _ = into.send(Err(io::Error::other(error.to_string()))).await;
    }
    ended
}

async fn read<R: AsyncRead + Unpin>(
    receiver: &mut Receiver<R>,
    waiting: &Waiting,
) -> Result<Option<Bytes>, FrameError> {
    loop {
        match receiver.next().await?.ok_or(FrameError::Closed)? {
            Incoming::Data(bytes) => waiting.push(bytes),
            Incoming::End => return Ok(None),
            Incoming::Done(message) => return Ok(Some(message)),
            Incoming::Stderr(_) | Incoming::Control(_) => {}
        }
    }
}

/// Sends all that comes, without an end behind it. If the peer says meanwhile how the stream ended, its words.
pub async fn send<R, W>(
    receiver: &mut Receiver<R>,
    sender: &Sender<W>,
    mut from: mpsc::Receiver<Chunk>,
) -> Result<Option<Bytes>, FrameError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let sending = async {
        while let Some(chunk) = from.recv().await {
            sender.data(&chunk?).await?;
        }
        Ok::<_, FrameError>(None)
    };
    let mut sending = std::pin::pin!(sending);
    loop {
        tokio::select! {
            sent = &mut sending => return sent,
            next = receiver.next() => {
                if let Incoming::Done(message) = next?.ok_or(FrameError::Closed)? {
                    return Ok(Some(message));
                }
            }
        }
    }
}

/// The peer's last words; what else comes before them is passed over.
pub async fn last_words<R: AsyncRead + Unpin>(receiver: &mut Receiver<R>) -> Result<Bytes, FrameError> {
    loop {
        if let Incoming::Done(message) = receiver.next().await?.ok_or(FrameError::Closed)? {
            return Ok(message);
        }
    }
}
