//! Connects the frames of a stream with the thread that packs or unpacks.

use std::io;

use bytes::Bytes;
use nexus_wire::duplex::Writer;
use nexus_wire::frames::{FrameError, Incoming, Receiver, Sender, Waiting};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::chunks::{Chunk, Piece};

/// Passes the data of a stream on until it ends. Returns the peer's final message if that comes before the end; `None` otherwise, or if the consumer
/// stopped. The consumer also gets an error if the connection fails.
pub async fn receive<R, W>(
    receiver: &mut Receiver<R>,
    sender: &Sender<W>,
    into: mpsc::Sender<Chunk>,
) -> Result<Option<Bytes>, FrameError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    // The credit limits how much is buffered here.
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
            // A failed connection is reported by the reading side.
            let _ = sender.took(length).await;
        }
    };
    let (mut passing, mut reading) = (std::pin::pin!(passing), Box::pin(reading));
    let ended = tokio::select! {
        ended = &mut reading => ended,
        () = &mut passing => return Ok(None),
    };
    // Data that has already arrived is still delivered.
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

/// Sends all data, without an end mark. Returns the peer's final message if that comes meanwhile.
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
    unless_done(receiver, sending).await
}

/// The same with pieces.
pub async fn send_pieces<R: AsyncRead + Unpin>(
    receiver: &mut Receiver<R>,
    sender: &Sender<Writer>,
    mut from: mpsc::Receiver<Piece>,
) -> Result<Option<Bytes>, FrameError> {
    let sending = async {
        while let Some(piece) = from.recv().await {
            match piece {
                Piece::Read(bytes) => sender.data(&bytes).await?,
                Piece::Moved(moved) => sender.moved(moved).await?,
            }
        }
        Ok::<_, FrameError>(None)
    };
    unless_done(receiver, sending).await
}

/// Sends until the peer's final message comes.
async fn unless_done<R: AsyncRead + Unpin>(
    receiver: &mut Receiver<R>,
    sending: impl Future<Output = Result<Option<Bytes>, FrameError>>,
) -> Result<Option<Bytes>, FrameError> {
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

/// Returns the peer's final message; other frames before it are ignored.
pub async fn last_words<R: AsyncRead + Unpin>(receiver: &mut Receiver<R>) -> Result<Bytes, FrameError> {
    loop {
        if let Incoming::Done(message) = receiver.next().await?.ok_or(FrameError::Closed)? {
            return Ok(message);
        }
    }
}
