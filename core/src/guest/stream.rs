//! Separate streams into a guest: each is a connection to vsock port 201, which carries frames in both directions once it is open.

use std::borrow::Cow;
use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::error::is_errno;
use nexus_schema::link::STREAM_PORT;
use nexus_schema::stream::{Answer, Done, LINE_MAX, Open, Opened, Opening};
use nexus_schema::{ErrorCode, ToolError};
use nexus_wire::duplex::{Reader, Writer};
use nexus_wire::frames::{self, CopyError, FrameError, Incoming, Kind, Receiver, Sender};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::link::{Dialled, LinkError, dial};
use super::result::words;

/// The maximum of data that is sent with the request for a stream, and again before its answer, in bytes.
pub(crate) const EARLY_MAX: usize = 16 << 10;
/// Timeout for a guest's answer. Longer than the guest's own timeout for a connection to one of its ports.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the answer if a tree is opened: the guest's disk may be slow.
const TREE_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for the final message once both directions have ended.
const DONE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum length of an error message, in characters.
const MESSAGE_MAX: usize = 4000;
/// Maximum length of a hint, in characters.
const HINT_MAX: usize = 500;

/// Why a stream could not be opened, or failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The guest's port for streams does not answer.
    #[error("cannot reach the guest's port for streams")]
    Dial(#[source] io::Error),
    /// The guest took too long.
    #[error("no answer after {} s", .after.as_secs())]
    Deadline {
        /// Time waited.
        after: Duration,
    },
    /// The guest hung up instead of answering.
    #[error("the guest hung up")]
    HungUp,
    /// The guest's answer violates the protocol.
    #[error("invalid answer from the guest: {what}")]
    Misbehaved {
        /// The violation.
        what: &'static str,
    },
    /// The guest refused, for a reason in its own words, which are shortened and without control characters.
    #[error("{0}")]
    Refused(ToolError),
    /// A frame is invalid, or the connection failed.
    #[error("the stream failed")]
    Frames(#[from] FrameError),
    /// The connection on the host failed.
    #[error("the connection on the host failed")]
    Own(#[source] io::Error),
}

impl StreamError {
    /// Returns the error as a caller sees it, with the guest's words marked as such; `vm` is the VM's name.
    pub fn to_tool_error(&self, vm: &str) -> ToolError {
        let text = format!("{vm}: {}", nexus_schema::error::chain(self));
        match self {
            Self::Refused(error) => {
                let said = ToolError {
                    message: format!("inside {vm}: {}", error.message),
                    hint: None,
                    ..error.clone()
                };
                match &error.hint {
                    Some(hint) => said.hint(format!("the guest suggests: {hint}")),
                    None => said,
                }
            }
            Self::Dial(_) | Self::Frames(FrameError::Io(_) | FrameError::Closed | FrameError::Cut) => {
                ToolError::new(ErrorCode::GuestUnreachable, text)
                    .hint("look at vm_inspect and vm_logs, then try again")
            }
            Self::Deadline { .. } => ToolError::new(ErrorCode::Timeout, text).hint("try again"),
            Self::HungUp => ToolError::new(ErrorCode::GuestMisbehaved, text).hint(
                "close streams that are not needed; if none are open, the agent in the VM is too old for streams: call vm_restart",
            ),
            Self::Misbehaved { .. } | Self::Frames(_) => ToolError::new(ErrorCode::GuestMisbehaved, text)
                .hint("try again; if it keeps failing, call vm_restart"),
            Self::Own(_) => ToolError::new(ErrorCode::Cancelled, text),
        }
    }
}

/// Connects to the port for streams of the guest whose vsock socket is in `directory`, before a stream is needed.
pub(crate) async fn connect(directory: &Path) -> io::Result<Dialled> {
    dial(directory, STREAM_PORT, &[]).await
}

/// How the connection of a stream is made.
pub(crate) enum Way<'a> {
    /// A new one to the guest whose vsock socket is in this directory.
    New(&'a Path),
    /// One that was made before.
    Made(Dialled),
}

impl Way<'_> {
    /// Sends the first bytes.
    async fn go(self, first: &[u8]) -> io::Result<Dialled> {
        match self {
            Self::New(directory) => dial(directory, STREAM_PORT, first).await,
            Self::Made(mut dialled) => {
                dialled.writer.write_all(first).await?;
                Ok(dialled)
            }
        }
    }
}

/// An open stream of a guest.
#[derive(Debug)]
pub struct GuestStream {
    /// The guest's answer.
    pub opened: Opened,
    /// The connection. Dropping the writer closes it.
    pub ends: (Reader, Writer),
    /// Frames that were already read together with the answer.
    pub read: BytesMut,
    /// How much data was sent before the answer, in bytes.
    early: u32,
}

impl GuestStream {
    /// Opens a stream of the guest whose vsock socket is in `directory`.
    pub(crate) async fn open(directory: &Path, opening: &Opening) -> Result<Self, StreamError> {
        Self::open_with(Way::New(directory), opening, &[], std::future::pending()).await
    }

    /// Opens a TCP stream, and sends the first bytes of its connection together with the request: at most [`EARLY_MAX`]. What `more` then returns, as
    /// much again, does not wait for the answer either. Only guests that offer `early_data` may get any.
    pub(crate) async fn open_with(
        way: Way<'_>,
        opening: &Opening,
        early: &[u8],
        more: impl Future<Output = io::Result<Vec<u8>>>,
    ) -> Result<Self, StreamError> {
        let mut line = serde_json::to_vec(opening).map_err(|error| StreamError::Own(error.into()))?;
        line.push(b'\n');
        let mut sent = add_frame(&mut line, early).map_err(StreamError::Own)?;
        let Dialled { mut reader, mut writer, mut read } = way.go(&line).await.map_err(StreamError::Dial)?;
        let exchange = async {
            match frames::read_line(&mut reader, &mut read, LINE_MAX).await {
                Ok(answer) => answer.ok_or(StreamError::HungUp),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    Err(StreamError::Misbehaved { what: "a line that is too long" })
                }
                // The vsock device may reset a connection that the guest closed.
                Err(_) => Err(StreamError::HungUp),
            }
        };
        let with_more = async {
            let mut exchange = std::pin::pin!(exchange);
            tokio::select! {
                biased;
                answer = &mut exchange => return answer,
                bytes = more => {
                    line.clear();
                    let added = bytes.and_then(|bytes| add_frame(&mut line, &bytes));
                    sent += added.map_err(StreamError::Own)?;
                    // If the guest is gone, its answer may be there all the same.
                    let _ = writer.write_all(&line).await;
                }
            }
            exchange.await
        };
        let after = match opening.open {
            Open::TreeIn(_) | Open::TreeOut(_) => TREE_TIMEOUT,
            Open::Exec(_) | Open::Attach(_) | Open::Tcp(_) => ANSWER_TIMEOUT,
        };
        let answer = timeout(after, with_more).await;
        let answer = answer.map_err(|_| StreamError::Deadline { after })??;
        match serde_json::from_slice(&answer) {
            Ok(Answer::Ok(opened)) => Ok(Self { opened, ends: (reader, writer), read, early: sent }),
            Ok(Answer::Error(error)) => Err(refused(error)),
            Err(_) => Err(StreamError::Misbehaved { what: "malformed JSON" }),
        }
    }

    /// Turns the stream into a receiver and a sender of frames.
    pub fn into_frames(self) -> (Receiver<Reader>, Sender<Writer>) {
        let (reader, writer) = self.ends;
        frames::over_after(reader, writer, self.read, self.early)
    }

    /// Relays a connection of the host over a TCP stream until both directions have ended; each ends on its own. If the future is dropped,
    /// the stream is closed, and the guest resets its connection.
    pub async fn carry(
        self,
        read: &mut (impl AsyncRead + Unpin),
        write: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), StreamError> {
        let (mut receiver, sender) = self.into_frames();
        let copied = frames::copy(&mut receiver, &sender, read, write).await;
        let done = match copied {
            Ok(Some(done)) => done,
            Ok(None) => {
                let last = timeout(DONE_TIMEOUT, receiver.next()).await;
                match last.map_err(|_| StreamError::Deadline { after: DONE_TIMEOUT })?? {
                    Some(Incoming::Done(done)) => done,
                    Some(_) => return Err(StreamError::Misbehaved { what: "a frame after the end" }),
                    None => return Err(StreamError::HungUp),
                }
            }
            Err(CopyError::Frames(error)) => return Err(error.into()),
            Err(CopyError::Read(error) | CopyError::Write(error)) => return Err(StreamError::Own(error)),
        };
        match serde_json::from_slice(&done) {
            Ok(Done::Ok(_)) => Ok(()),
            Ok(Done::Error(error)) => Err(refused(error)),
            Err(_) => Err(StreamError::Misbehaved { what: "malformed JSON" }),
        }
    }
}

/// Appends a frame of a connection's first bytes, if there are any; returns how many they are.
fn add_frame(line: &mut Vec<u8>, bytes: &[u8]) -> io::Result<u32> {
    if bytes.len() > EARLY_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if !bytes.is_empty() {
        line.extend_from_slice(&Kind::Data.header(bytes.len()));
        line.extend_from_slice(bytes);
    }
    Ok(bytes.len() as u32)
}

/// Converts an error of a guest, whose words are checked and shortened.
fn refused(error: ToolError) -> StreamError {
    if !error.code.may_be_of_guest() {
        return StreamError::Misbehaved { what: "an error with a code that guests may not use" };
    }
    let tame = |text: String, max| words(Cow::Owned(text), max).map(Cow::into_owned);
    let message = tame(error.message, MESSAGE_MAX);
    let hint = error.hint.map(|hint| tame(hint, HINT_MAX)).transpose();
    match (message, hint) {
        (Ok(message), Ok(hint)) => {
            let said = ToolError { hint, ..ToolError::new(error.code, message) };
            StreamError::Refused(match error.errno {
                Some(errno) if is_errno(&errno) => said.errno(errno),
                _ => said,
            })
        }
        (Err(LinkError::Misbehaved { what }), _) | (_, Err(LinkError::Misbehaved { what })) => {
            StreamError::Misbehaved { what }
        }
        (Err(_), _) | (_, Err(_)) => {
            StreamError::Misbehaved { what: "an error with an invalid message or hint" }
        }
    }
}

#[cfg(test)]
mod tests;
