//! What an agent and its holder say to each other: JSON, each message behind its length in 4 bytes. Behind the message of a stream
//! there is one byte, and with it the stream's socket.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use nexus_schema::ToolError;
use nexus_schema::stream::Opening;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::net::UnixStream;

/// The longest message, in bytes: arguments of one call in the escapes of JSON.
const MESSAGE_MAX: u32 = 128 << 20;

/// What an agent says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToHolder {
    /// Do this.
    Call(Request),
    /// Whoever made a call wants it undone: what it started is killed.
    Cancel(u64),
    /// Whoever made a call is gone: what it started goes on, and there is no answer.
    Leave(u64),
    /// Serve this stream. Its socket comes behind this message, and nothing else then.
    Stream(Stream),
    /// Kill everything and go.
    End,
}

/// A stream of a command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stream {
    /// What is wanted.
    pub(crate) opening: Opening,
    /// How the VM is configured.
    pub(crate) settings: Settings,
}

/// A call.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Its number.
    pub(crate) id: u64,
    /// The tool.
    pub(crate) tool: String,
    /// Its parameters.
    pub(crate) params: Box<RawValue>,
    /// Who calls.
    pub(crate) client: Option<String>,
    /// Whether the newest lines of output are wanted while it waits.
    pub(crate) progress: bool,
    /// How the VM is configured.
    pub(crate) settings: Settings,
}

/// What a command needs of the VM's configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Environment variables of every command.
    pub(crate) env: BTreeMap<String, String>,
    /// The variables that name the proxy, where nobody sets others.
    #[serde(default)]
    pub(crate) proxy_env: BTreeMap<String, String>,
    /// Where commands start when they do not say.
    pub(crate) working_dir: Option<String>,
    /// The user that the image names.
    #[serde(default)]
    pub(crate) image_user: Option<String>,
}

/// What a holder answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromHolder {
    /// It serves this connection. The kernel also connects to one that is about to die.
    Hello,
    /// The outcome of a call.
    Done(u64, Result<Answer, ToolError>),
    /// The newest lines of output of a call that waits.
    Progress(u64, String),
}

/// The result of a call.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// What happened, in a line.
    pub(crate) header: String,
    /// Text after it: which stream it holds, if it is content and not talk.
    pub(crate) blocks: Vec<(Option<OfStream>, String)>,
    /// The facts.
    pub(crate) facts: Box<RawValue>,
}

/// A stream that a block of text is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OfStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A message as it is written.
pub(crate) fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).ok().filter(|length| *length <= MESSAGE_MAX);
    let length = length.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

/// Reads a message; `None` when the peer is gone.
pub(crate) async fn read<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let length = match stream.read_u32().await {
        Ok(length) if length <= MESSAGE_MAX => length,
        Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}

/// Sends a socket, with the byte that carries it.
pub(crate) async fn send_socket(stream: &UnixStream, socket: impl AsFd) -> io::Result<()> {
    let sockets = [socket.as_fd()];
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
        Ok(rustix::net::sendmsg(stream, &[IoSlice::new(b"+")], &mut ancillary, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(Interest::WRITABLE, send).await.map(drop)
}

/// Receives the socket that comes next.
pub(crate) async fn receive_socket(stream: &UnixStream) -> io::Result<OwnedFd> {
    let receive = || {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags)?;
        let sockets = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
            _ => None,
        });
        sockets.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    };
    stream.async_io(Interest::READABLE, receive).await
}
