//! The lines of the protocol: calls and replies.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Answer, Event, NetError, Request};

/// Maximum length of a line, in bytes.
pub const LINE_MAX: usize = 4 << 20;

/// A request with an id, which the answer repeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// An id that the client chooses.
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// A line from `nexus-net`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Reply {
    /// The answer to a successful request.
    Answer {
        /// The request's id.
        id: u64,
        /// The answer.
        answer: Answer,
    },
    /// The error of a failed request.
    Error {
        /// The request's id; 0 if it could not be read.
        id: u64,
        /// The error.
        error: NetError,
    },
    /// An event.
    Event {
        /// The event.
        event: Event,
    },
}

/// The error for a line that cannot be decoded.
#[derive(Debug, thiserror::Error)]
#[error("malformed line in nexus-net's protocol: {line}")]
pub struct LineError {
    /// The start of the line.
    pub line: String,
    /// The cause.
    #[source]
    pub source: serde_json::Error,
}

/// Length of the line's start that an error shows, in characters.
const SHOWN_MAX: usize = 120;

/// Encodes a message as a line, with the line end.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("the messages are plain data with text as keys");
    line.push(b'\n');
    line
}

/// Decodes a line: a [`Call`] or a [`Reply`].
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    serde_json::from_slice(line).map_err(|source| LineError {
        line: String::from_utf8_lossy(line).chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect(),
        source,
    })
}
