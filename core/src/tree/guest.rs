//! The streams of one guest.

use std::path::PathBuf;

use nexus_schema::stream::{LINE_MAX, Open, Opening, VERSION};
use nexus_schema::{ErrorCode, ToolError};
use nexus_wire::duplex::{Reader, Writer};
use nexus_wire::frames;

use crate::guest::GuestStream;

/// Maximum length of a guest's message, in characters.
const WORDS_MAX: usize = 4000;
/// A guest to open streams to.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    /// Its VM's directory, where its sockets are.
    pub(crate) directory: PathBuf,
    /// Its VM's name.
    pub(crate) name: String,
    /// The client that opens streams.
    pub(crate) client: String,
}

/// An open stream.
pub(crate) struct Stream {
    pub(crate) receiver: frames::Receiver<Reader>,
    pub(crate) sender: frames::Sender<Writer>,
}

impl Guest {
    /// Opens a stream.
    pub(crate) async fn open(&self, open: Open) -> Result<Stream, ToolError> {
        let opening = Opening { version: VERSION, client: Some(self.client.clone()), open };
        let length = serde_json::to_vec(&opening).map_or(usize::MAX, |line| line.len());
        if length > LINE_MAX {
            return Err(ToolError::invalid("the arguments are too long: leave patterns out"));
        }
        let opened = GuestStream::open(&self.directory, &opening).await;
        let (receiver, sender) = opened.map_err(|error| error.to_tool_error(&self.name))?.into_frames();
        Ok(Stream { receiver, sender })
    }

    /// Returns a guest's error, marked as the guest's words, shortened and without control characters.
    pub(crate) fn said(&self, error: ToolError) -> ToolError {
        if !error.code.may_be_of_guest() {
            return self.misbehaved("its error has a code that guests may not use");
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

    /// Returns the error for a guest that violates the protocol.
    pub(crate) fn misbehaved(&self, what: &str) -> ToolError {
        ToolError::new(ErrorCode::GuestMisbehaved, format!("{}: {what}", self.name))
    }
}
