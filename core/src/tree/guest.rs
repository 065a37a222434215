//! The streams of one guest.

use std::path::PathBuf;
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::stream::{Answer, LINE_MAX, OPENING_TIMEOUT, Open, Opening, VERSION};
use nexus_schema::{ErrorCode, ToolError};
use nexus_wire::duplex::{self, Reader, Writer};
use nexus_wire::frames;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::guest::dial_stream;

/// The longest words of a guest, in characters.
const WORDS_MAX: usize = 4000;
/// How long a guest may take to open a stream: it may have to look at a slow disk.
const OPEN_TIMEOUT: Duration = OPENING_TIMEOUT.saturating_mul(6);

/// A guest that streams can be opened to.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    /// Its VM's directory, where its sockets are.
    pub(crate) directory: PathBuf,
    /// Its VM's name.
    pub(crate) name: String,
    /// Who opens streams.
    pub(crate) client: String,
}

/// A stream that was opened.
pub(crate) struct Stream {
    pub(crate) receiver: frames::Receiver<Reader>,
    pub(crate) sender: frames::Sender<Writer>,
}

impl Guest {
    /// Opens a stream.
    pub(crate) async fn open(&self, open: Open) -> Result<Stream, ToolError> {
        let failed = |why: String| {
            ToolError::new(ErrorCode::GuestUnreachable, format!("{}: open a stream: {why}", self.name))
                .hint("look at vm_inspect and vm_logs")
        };
        let opening = Opening { version: VERSION, client: Some(self.client.clone()), open };
        let mut line =
            serde_json::to_vec(&opening).map_err(|e| ToolError::internal(format!("open a stream: {e}")))?;
        if line.len() > LINE_MAX {
            return Err(ToolError::invalid("the arguments are too long: leave patterns out"));
        }
        line.push(b'\n');
        let work = async {
            let socket = dial_stream(&self.directory).await?;
            let (mut reader, mut writer) = duplex::split(socket.into_std()?.into())?;
            writer.write_all(&line).await?;
            let mut buffer = BytesMut::new();
            let answer = frames::read_line(&mut reader, &mut buffer, LINE_MAX).await?;
            let answer = answer.ok_or(std::io::ErrorKind::UnexpectedEof)?;
            Ok::<_, std::io::Error>((serde_json::from_slice(&answer), reader, writer, buffer))
        };
        let (answer, reader, writer, buffer) = match timeout(OPEN_TIMEOUT, work).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(_) => return Err(failed("the guest does not answer".into())),
        };
        match answer {
            Ok(Answer::Ok(_)) => {
                let (receiver, sender) = frames::over(reader, writer, buffer);
                Ok(Stream { receiver, sender })
            }
            Ok(Answer::Error(error)) => Err(self.said(error)),
            Err(_) => Err(self.misbehaved("its answer to the opening of a stream makes no sense")),
        }
    }

    /// What a guest says of a failure, marked as its words, cut to size and without control characters.
    pub(crate) fn said(&self, error: ToolError) -> ToolError {
        if !error.code.may_be_of_guest() {
            return self.misbehaved("it failed in a way that is not a guest's");
        }
        let plain = |text: &str| -> String {
            let is_bad = |c: char| c.is_control() && c != '\t' && c != '\n';
            text.chars()
                .take(WORDS_MAX)
                .map(|c| if is_bad(c) { char::REPLACEMENT_CHARACTER } else { c })
                .collect()
        };
        let told = ToolError::new(error.code, format!("inside {}: {}", self.name, plain(&error.message)));
        match &error.hint {
            Some(hint) => told.hint(format!("the guest suggests: {}", plain(hint))),
            None => told,
        }
    }

    /// A guest that keeps no rules.
    pub(crate) fn misbehaved(&self, what: &str) -> ToolError {
        ToolError::new(ErrorCode::GuestMisbehaved, format!("{}: {what}", self.name))
    }
}
