//! Lines: a request with its number, and what comes back.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Answer, Event, NetError, Request};

/// The longest line, in bytes.
pub const LINE_MAX: usize = 4 << 20;

/// A request and its number, which the answer repeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// The client's own number.
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// A line of `nexus-net`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Reply {
    /// A request was done.
    Answer {
        /// Its number.
        id: u64,
        /// The answer.
        answer: Answer,
    },
    /// A request failed.
    Error {
        /// Its number; 0 if the line could not be read that far.
        id: u64,
        /// Why.
        error: NetError,
    },
    /// Something happened.
    Event {
        /// What.
        event: Event,
    },
}

/// A line that is not understood.
#[derive(Debug, thiserror::Error)]
#[error("a line of nexus-net's protocol is not understood: {line}")]
pub struct LineError {
    /// Its start.
    pub line: String,
    /// Why.
    #[source]
    pub source: serde_json::Error,
}

/// How much of a line an error shows, in characters.
const SHOWN_MAX: usize = 120;

/// A line, with its end.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("the messages are plain data with text as keys");
    line.push(b'\n');
    line
}

/// What a line says: a [`Call`] or a [`Reply`].
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    serde_json::from_slice(line).map_err(|source| LineError {
        line: String::from_utf8_lossy(line).chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect(),
        source,
    })
}
