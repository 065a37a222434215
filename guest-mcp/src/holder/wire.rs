//! What an agent and its holder say to each other: JSON, each message behind its length in 4 bytes.

use std::collections::BTreeMap;
use std::io;

use nexus_schema::ToolError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncReadExt};

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
    /// Kill everything and go.
    End,
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
    /// Where commands start when they do not say.
    pub(crate) working_dir: Option<String>,
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
