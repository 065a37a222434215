//! Generations of what daemon and shim say to each other, in requests, `plan.json` and `exit.json`.
//!
//! An upgraded daemon takes up shims that its predecessor launched, so it speaks two generations: its own and the one before.
//! Generation 1 carries no number; from 2 on each request, plan and exit says its generation in `protocol`. The request `status` is the same in
//! all generations: its answer tells which one the shim speaks. Fields may be added to answers within a generation; all else is a new one, with
//! recorded lines in `core/tests/fixtures/shim`.

use serde::Serialize;
use serde_json::{Map, Value};

use super::control::{Job, Request};

/// The generation that this build speaks.
pub(crate) const PROTOCOL: u32 = 2;
/// The oldest one that it understands.
pub(crate) const PROTOCOL_MIN: u32 = 1;
/// Where the number is.
const NUMBER: &str = "protocol";

/// The generation of what carries no number.
pub(crate) const fn unnumbered() -> u32 {
    1
}

/// Why something that was received is not understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// It is not what this generation says.
    #[error("not understood")]
    Garbled {
        /// Why not.
        #[from]
        source: serde_json::Error,
    },
    /// It is of a generation that this build does not speak.
    #[error("written for protocol {found}; this build speaks {PROTOCOL_MIN} to {PROTOCOL}")]
    Generation {
        /// The one that was found.
        found: u64,
    },
    /// The shim is too old to be asked this.
    #[error(
        "the shim speaks protocol {protocol}, which has no such request; it is possible after the VM's next start"
    )]
    Unknown {
        /// What the shim speaks.
        protocol: u32,
    },
}

/// A request as a line for a shim of the given generation.
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
    };
    if !is_known {
        return Err(WireError::Unknown { protocol });
    }
    let mut line = if protocol >= 2 && request != Request::Status {
        write_numbered(&request)?
    } else {
        serde_json::to_vec(&request)?
    };
    line.push(b'\n');
    Ok(line)
}

/// What a daemon asks, without the line's end.
pub(crate) fn read_request(line: &[u8]) -> Result<Request, WireError> {
    let fields = read_numbered(line)?;
    Ok(serde_json::from_value(Value::Object(fields))?)
}

/// The content of `plan.json`.
pub(crate) fn read_job(bytes: &[u8]) -> Result<Job, WireError> {
    let fields = read_numbered(bytes)?;
    Ok(serde_json::from_value(Value::Object(fields))?)
}

/// Something that becomes a JSON object, with this build's number in it.
pub(crate) fn write_numbered<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut value = serde_json::to_value(value)?;
    if let Value::Object(fields) = &mut value {
        fields.insert(NUMBER.to_owned(), PROTOCOL.into());
    }
    serde_json::to_vec(&value)
}

/// The fields of an object whose generation is understood, without its number.
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
