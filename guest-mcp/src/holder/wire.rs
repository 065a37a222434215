//! The protocol between an agent and its holder: JSON messages, each after its length in 4 bytes. The message for a stream is
//! followed by one byte that carries the stream's socket.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use nexus_schema::link::CommandEnded;
use nexus_schema::stream::Opening;
use nexus_schema::{ToolError, TraceContext};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::net::UnixStream;

/// The longest message, in bytes: the arguments of one call, escaped as JSON.
const MESSAGE_MAX: u32 = 128 << 20;

/// Messages of the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToHolder {
    /// Run this call.
    Call(Request),
    /// The caller cancelled a call: kill what it started.
    Cancel(u64),
    /// The caller is gone: what it started continues, and there is no answer.
    Leave(u64),
    /// Serve this stream. Its socket follows this message, and nothing after that.
    Stream(Stream),
    /// Kill everything and exit.
    End,
}

/// A stream of a command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stream {
    /// The request of the stream.
    pub(crate) opening: Opening,
    /// The VM's configuration.
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
    /// The caller.
    pub(crate) client: Option<String>,
    /// The trace that the call belongs to.
    #[serde(default)]
    pub(crate) trace: Option<TraceContext>,
    /// Whether the newest lines of output should be sent while it waits.
    pub(crate) progress: bool,
    /// The VM's configuration.
    pub(crate) settings: Settings,
}

/// The parts of the VM's configuration that commands need.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Environment variables of every command.
    pub(crate) env: BTreeMap<String, String>,
    /// The proxy variables, used unless others are set.
    #[serde(default)]
    pub(crate) proxy_env: BTreeMap<String, String>,
    /// The default working directory of commands.
    pub(crate) working_dir: Option<String>,
    /// The user that the image names.
    #[serde(default)]
    pub(crate) image_user: Option<String>,
}

/// Messages of the holder.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromHolder {
    /// It serves this connection. A successful connect is not enough: the kernel also connects to a process that is about to die.
    Hello,
    /// The outcome of a call.
    Done(u64, Result<Answer, ToolError>),
    /// The newest lines of output of a call in progress.
    Progress(u64, String),
    /// A command has ended that no call was waiting for.
    Ended(CommandEnded),
}

/// The result of a call.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// What happened, in one line.
    pub(crate) header: String,
    /// The text after it, with its stream if it is output and not a message.
    pub(crate) blocks: Vec<(Option<OfStream>, String)>,
    /// The structured result.
    pub(crate) facts: Box<RawValue>,
}

/// The stream that a block of text comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OfStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Encodes a message.
pub(crate) fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).ok().filter(|length| *length <= MESSAGE_MAX);
    let length = length.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

/// Reads a message; `None` if the peer has disconnected.
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

/// Receives the next socket.
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
