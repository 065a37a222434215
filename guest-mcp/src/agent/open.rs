//! Streams on their own connections: reads the request that opens one, and passes it to the part that serves it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
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
    let opening = match timeout(OPENING_TIMEOUT, read_opening(&socket)).await {
        Ok(Ok(Some(opening))) => opening,
        // The host has disconnected, so nobody would read an answer.
        Ok(Ok(None)) | Err(_) => return Ok(()),
        Ok(Err(error)) => return refuse(socket, error).await,
    };
    match opening.open {
        Open::Exec(_) | Open::Attach(_) => {
            let settings = agent.settings().of_commands(&agent.proxy);
            match agent.holder.hand_over(&socket, opening, settings).await {
                Ok(()) => Ok(()),
                Err(error) => refuse(socket, error).await,
            }
        }
        Open::Tcp(open) => match tcp::connect(open.port).await {
            Ok(connection) => {
                let (receiver, sender) = accept(socket, Opened::default()).await?;
                tcp::serve(connection, receiver, sender).await;
                Ok(())
            }
            Err(error) => refuse(socket, error).await,
        },
        Open::TreeIn(opening) => match TreeIn::open(&agent, *opening).await {
            Ok(tree) => {
                let (mut receiver, sender) = accept(socket, Opened::default()).await?;
                let ended = tree.run(&mut receiver, &sender).await;
                finish(receiver, sender, of_tree(ended)).await;
                Ok(())
            }
            Err(error) => refuse(socket, error).await,
        },
        Open::TreeOut(opening) => match TreeOut::open(&agent, *opening).await {
            Ok(tree) => {
                let opened = Opened { is_directory: tree.is_directory(), ..Opened::default() };
                let (mut receiver, sender) = accept(socket, opened).await?;
                let ended = tree.run(&mut receiver, &sender).await;
                finish(receiver, sender, of_tree(ended)).await;
                Ok(())
            }
            Err(error) => refuse(socket, error).await,
        },
    }
}

fn of_tree(ended: Result<TreeEnded, ToolError>) -> Done {
    match ended {
        Ok(tree) => Done::Ok(Ended { tree: Some(Box::new(tree)), ..Ended::default() }),
        Err(error) => Done::Error(error),
    }
}

/// Reads the line that opens a stream; `None` if the host disconnects before it is complete.
async fn read_opening(socket: &OwnedFd) -> Result<Option<Opening>, ToolError> {
    let failed = |error: io::Error| ToolError::invalid(format!("open a stream: {error}"));
    // The socket may be handed over to another process, so it must not be shut down here.
    let mut reader =
        Reader::of_shared(socket.as_fd().try_clone_to_owned().map_err(failed)?).map_err(failed)?;
    let mut buffer = BytesMut::new();
    let line = frames::read_line(&mut reader, &mut buffer, LINE_MAX).await.map_err(failed)?;
    if !buffer.is_empty() {
        return Err(ToolError::invalid("open a stream: frames before the answer"));
    }
    line.map(|line| Opening::parse(&line)).transpose()
}

/// Accepts the stream; from here on there are frames.
pub(crate) async fn accept(socket: OwnedFd, opened: Opened) -> io::Result<(Receiver, Sender)> {
    let (reader, mut writer) = duplex::split(socket)?;
    writer.write_all(&line(&Answer::Ok(opened))?).await?;
    Ok(frames::over(reader, writer, BytesMut::new()))
}

/// Refuses the stream, and waits briefly until the host has read the reason.
pub(crate) async fn refuse(socket: OwnedFd, error: ToolError) -> io::Result<()> {
    let (mut reader, mut writer) = duplex::split(socket)?;
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
