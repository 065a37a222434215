//! Streams on their own connections: reads the request that opens one, and passes it to the part that serves it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::ToolError;
use nexus_schema::stream::{
    Answer, Done, Ended, LINE_MAX, OPENING_TIMEOUT, Open, Opened, Opening, TreeEnded,
};
use nexus_wire::duplex::{Reader, Writer};
use nexus_wire::{duplex, frames};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::{Agent, tcp};
use crate::tools::agent_failed;
use crate::tree::{TreeIn, TreeOut};

/// The receiving half of a stream.
pub(super) type Receiver = frames::Receiver<Reader>;
/// The sending half of a stream.
pub(crate) type Sender = frames::Sender<Writer>;

/// Timeout for the host to disconnect after the last frame.
const LINGER: Duration = Duration::from_secs(5);

/// Reads the request of a new stream, and serves it.
pub(super) async fn serve(agent: Arc<Agent>, socket: OwnedFd) -> io::Result<()> {
    let (mut reader, writer) = duplex::split(socket)?;
    let mut read = BytesMut::new();
    let asked = timeout(OPENING_TIMEOUT, read_opening(&mut reader, &mut read)).await;
    let ends = (reader, writer);
    let opening = match asked {
        Ok(Ok(Some(opening))) => opening,
        // The host has disconnected, so nobody would read an answer.
        Ok(Ok(None)) | Err(_) => return Ok(()),
        Ok(Err(error)) => return refuse_over(ends, error).await,
    };
    match opening.open {
        Open::Exec(_) | Open::Attach(_) => {
            // The holder goes on with the connection.
            let socket = duplex::join(ends)?;
            let settings = agent.settings().of_commands(&agent.proxy);
            match agent.holder.hand_over(&socket, opening, settings).await {
                Ok(()) => Ok(()),
                Err(error) => refuse(socket, error).await,
            }
        }
        Open::Tcp(open) => match tcp::connect(open.port).await {
            Ok(connection) => {
                let (receiver, sender) = begin(ends, Opened::default(), read).await?;
                tcp::serve(connection, receiver, sender).await;
                Ok(())
            }
            Err(error) => refuse_over(ends, error).await,
        },
        Open::TreeIn(opening) => match TreeIn::open(&agent, *opening).await {
            Ok(tree) => {
                let (mut receiver, sender) = begin(ends, Opened::default(), read).await?;
                let ended = tree.run(&mut receiver, &sender).await;
                finish(receiver, sender, of_tree(ended)).await;
                Ok(())
            }
            Err(error) => refuse_over(ends, error).await,
        },
        Open::TreeOut(opening) => match TreeOut::open(&agent, *opening).await {
            Ok(tree) => {
                let opened = Opened { is_directory: tree.is_directory(), ..Opened::default() };
                let (mut receiver, sender) = begin(ends, opened, read).await?;
                let ended = tree.run(&mut receiver, &sender).await;
                finish(receiver, sender, of_tree(ended)).await;
                Ok(())
            }
            Err(error) => refuse_over(ends, error).await,
        },
    }
}

fn of_tree(ended: Result<TreeEnded, ToolError>) -> Done {
    match ended {
        Ok(tree) => Done::Ok(Ended { tree: Some(Box::new(tree)), ..Ended::default() }),
        Err(error) => Done::Error(error),
    }
}

/// Reads the line that opens a stream; `None` if the host disconnects before it is complete. Only frames of a TCP connection may already follow it:
/// they stay in `read`.
async fn read_opening(reader: &mut Reader, read: &mut BytesMut) -> Result<Option<Opening>, ToolError> {
    let failed = |error: io::Error| ToolError::invalid(format!("open a stream: {error}"));
    let Some(line) = frames::read_line(reader, read, LINE_MAX).await.map_err(failed)? else {
        return Ok(None);
    };
    let opening = Opening::parse(&line)?;
    if !read.is_empty() && !matches!(opening.open, Open::Tcp(_)) {
        return Err(ToolError::invalid("open a stream: frames before the answer"));
    }
    Ok(Some(opening))
}

/// Accepts the stream; from here on there are frames.
pub(crate) async fn accept(socket: OwnedFd, opened: Opened) -> io::Result<(Receiver, Sender)> {
    begin(duplex::split(socket)?, opened, BytesMut::new()).await
}

/// The same over the halves of a socket; `read` has frames that were already read.
async fn begin(
    (reader, mut writer): (Reader, Writer),
    opened: Opened,
    read: BytesMut,
) -> io::Result<(Receiver, Sender)> {
    writer.write_all(&line(&Answer::Ok(opened))?).await?;
    Ok(frames::over(reader, writer, read))
}

/// Refuses the stream, and waits briefly until the host has read the reason.
pub(crate) async fn refuse(socket: OwnedFd, error: ToolError) -> io::Result<()> {
    refuse_over(duplex::split(socket)?, error).await
}

async fn refuse_over((mut reader, mut writer): (Reader, Writer), error: ToolError) -> io::Result<()> {
    writer.write_all(&line(&Answer::Error(error))?).await?;
    let _ = timeout(LINGER, tokio::io::copy(&mut reader, &mut tokio::io::sink())).await;
    Ok(())
}

fn line(answer: &Answer) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    Ok(line)
}

/// Sends how a stream ended, and waits briefly until the host disconnects; otherwise unread data could be lost.
pub(crate) async fn finish(mut receiver: Receiver, sender: Sender, done: Done) {
    let message = serde_json::to_vec(&done).unwrap_or_else(|error| {
        let error = Done::Error(agent_failed(format!("send the end of a stream: {error}")));
        serde_json::to_vec(&error).unwrap_or_default()
    });
    // There is nothing to wait for if the host is gone.
    if timeout(LINGER, sender.done(&message)).await.is_ok_and(|sent| sent.is_ok()) {
        let _ = timeout(LINGER, async { while let Ok(Some(_)) = receiver.next().await {} }).await;
    }
}
