//! Protocol versions ("generations") between daemon and shim: of requests, `plan.json` and `exit.json`.
//!
//! An upgraded daemon adopts shims that earlier ones launched, so it supports several generations: its own, the one before, and those
//! whose support costs nothing.
//! Generation 1 carries no number; from 2 on, each request, plan and exit has its generation in `protocol`. The request `status` is the same in
//! all generations: its answer tells which one the shim speaks. Fields may be added to answers within a generation; any other change needs a
//! new generation, with recorded lines in `core/tests/fixtures/shim`.

use serde::Serialize;
use serde_json::{Map, Value};

use super::control::{Job, Request};

/// The generation that this build speaks.
pub(crate) const PROTOCOL: u32 = 4;
/// The oldest generation that this build supports.
pub(crate) const PROTOCOL_MIN: u32 = 1;
/// Name of the field with the generation.
const NUMBER: &str = "protocol";

/// Returns the generation of messages without a number.
pub(crate) const fn unnumbered() -> u32 {
    1
}

/// Error of a message that is not understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// It is not valid in its generation.
    #[error("not understood")]
    Garbled {
        /// Why not.
        #[from]
        source: serde_json::Error,
    },
    /// Its generation is not supported.
    #[error("written for protocol {found}; this build supports {PROTOCOL_MIN} to {PROTOCOL}")]
    Generation {
        /// The message's generation.
        found: u64,
    },
    /// The shim is too old for this request.
    #[error(
        "the shim speaks protocol {protocol}, which does not support this request; restart the VM to use it"
    )]
    Unknown {
        /// The shim's generation.
        protocol: u32,
    },
}

/// Encodes a request as a line for a shim of the given generation.
pub(crate) fn request_line(request: Request, protocol: u32) -> Result<Vec<u8>, WireError> {
    let is_known = match request {
        Request::Status
        | Request::Shutdown
        | Request::Kill
        | Request::Pause
        | Request::Resume
        | Request::ResizeDrive { .. }
        | Request::Wait => true,
        Request::Watch => protocol >= 2,
        Request::Hold { .. } | Request::Release => protocol >= 3,
        Request::Limit { .. } | Request::Save { .. } | Request::SetLink { .. } => protocol >= 4,
    };
    if !is_known {
        return Err(WireError::Unknown { protocol });
    }
    let mut line = if protocol >= 2 && request != Request::Status {
        numbered(&request, protocol.min(PROTOCOL))?
    } else {
        serde_json::to_vec(&request)?
    };
    line.push(b'\n');
    Ok(line)
}

/// Decodes a daemon's request, a line without its newline.
pub(crate) fn read_request(line: &[u8]) -> Result<Request, WireError> {
    let fields = read_numbered(line)?;
    Ok(serde_json::from_value(Value::Object(fields))?)
}

/// Decodes the content of `plan.json`.
pub(crate) fn read_job(bytes: &[u8]) -> Result<Job, WireError> {
    let fields = read_numbered(bytes)?;
    Ok(serde_json::from_value(Value::Object(fields))?)
}

/// Encodes a value as a JSON object with this build's generation in it.
pub(crate) fn write_numbered<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    numbered(value, PROTOCOL)
}

fn numbered<T: Serialize>(value: &T, protocol: u32) -> Result<Vec<u8>, serde_json::Error> {
    let mut value = serde_json::to_value(value)?;
    if let Value::Object(fields) = &mut value {
        fields.insert(NUMBER.to_owned(), protocol.into());
    }
    serde_json::to_vec(&value)
}

/// Decodes an object of a supported generation. Returns its fields without the generation.
fn read_numbered(bytes: &[u8]) -> Result<Map<String, Value>, WireError> {
    let mut fields: Map<String, Value> = serde_json::from_slice(bytes)?;
    let found = match fields.remove(NUMBER) {
        Some(number) => serde_json::from_value(number)?,
        None => u64::from(unnumbered()),
    };
    if !(u64::from(PROTOCOL_MIN)..=u64::from(PROTOCOL)).contains(&found) {
        return Err(WireError::Generation { found });
    }
    Ok(fields)
}

#[cfg(test)]
mod tests;
