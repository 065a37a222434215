//! Connections of a guest to other machines, made by its host: the messages that open them.
//!
//! Each is a connection that the guest opens to the host's vsock port [`crate::link::EGRESS_PORT`]:
//!
//! ```text
//! guest                                             host
//!   {"version":1,"host":"example.org","port":443,"how":"connect"}  ──>    one line: `EgressOpening`
//!                     <─────────────  {"ok":{}}                           one line, or {"error":{…}}: `EgressAnswer`
//!   frames  <───────────────────────────────────────>                     both ways at once: `nexus_wire::frames`
//! ```
//! The frames are data, credit and end; both sides start with [`WINDOW`]. If both support it, there is no credit: a side reads on when it has passed
//! on what it read. Each direction ends separately. A side that disconnects before both have ended resets the connection.

use serde::{Deserialize, Serialize};

use crate::network::DenyReason;

/// The version of the opening that this build supports.
pub const VERSION: u32 = 1;
/// The maximum length of an opening, in bytes.
pub const OPENING_MAX: usize = 1 << 10;
/// The maximum length of an answer, in bytes.
pub const ANSWER_MAX: usize = 16 << 10;
/// Timeout of the guest's opening.
pub const OPENING_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// The initial credit of each side, in bytes.
pub const WINDOW: u32 = 128 << 10;
/// The maximum number of open connections of one VM.
pub const CONNECTIONS_MAX: usize = 256;

/// The first line: the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressOpening {
    /// [`VERSION`].
    pub version: u32,
    /// A name, which the host resolves, or an address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// How the program in the guest requested it.
    pub how: EgressKind,
    /// Whether the guest supports frames without credit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_credit: bool,
}

/// How a program requested a connection from its proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressKind {
    /// By HTTP's CONNECT.
    Connect,
    /// With a request that has an absolute URL.
    Http,
    /// By SOCKS5.
    Socks5,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressAnswer {
    /// The connection was made.
    Ok {
        /// Whether the frames are without credit, which the guest must support.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        without_credit: bool,
    },
    /// The connection was not made.
    Error(EgressError),
}

/// Why a connection was not made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressError {
    /// The kind of failure.
    pub failure: EgressFailure,
    /// The reason of a refusal by policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<DenyReason>,
    /// A description of the failure.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The allow list that the VM needs for this connection; empty if that does not help, or would be too long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

/// The kind of a connection failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressFailure {
    /// The policy refuses it.
    Denied,
    /// The opening is invalid.
    Invalid,
    /// The name does not exist.
    NoSuchName,
    /// The other machine refuses the connection.
    Refused,
    /// The other machine cannot be reached.
    Unreachable,
    /// The other machine did not answer in time.
    Timeout,
    /// The host failed to make the connection.
    Failed,
}

impl EgressError {
    /// Creates an error that is not a refusal by policy.
    pub fn new(failure: EgressFailure, message: impl Into<String>) -> Self {
        Self { failure, reason: None, message: message.into(), hint: None, allow: Vec::new() }
    }
}

impl EgressOpening {
    /// Parses the line of an opening; the error describes what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, EgressError> {
        let refuse = |why: String| EgressError::new(EgressFailure::Invalid, why);
        let opening: Self =
            serde_json::from_slice(line).map_err(|error| refuse(format!("open a connection: {error}")))?;
        if opening.version != VERSION {
            return Err(refuse(format!(
                "openings of version {} are not supported, only version {VERSION}",
                opening.version
            )));
        }
        Ok(opening)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openings_and_answers_are_what_is_documented() {
        let line = r#"{"version":1,"host":"example.org","port":443,"how":"connect"}"#;
        let opening = EgressOpening::parse(line.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&opening).unwrap(), line);
        assert!(!opening.without_credit);
        let line = r#"{"version":1,"host":"::1","port":1,"how":"socks5","without_credit":true}"#;
        let opening = EgressOpening::parse(line.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&opening).unwrap(), line);
        for (line, words) in [
            ("GET / HTTP/1.1", "expected value"),
            (r#"{"version":2,"host":"x","port":1,"how":"connect"}"#, "version 2 are not supported"),
            (r#"{"version":1,"host":"x","port":65536,"how":"connect"}"#, "invalid value"),
            (r#"{"version":1,"host":"x","port":1,"how":"ftp"}"#, "unknown variant"),
        ] {
            let error = EgressOpening::parse(line.as_bytes()).unwrap_err();
            assert!(error.message.contains(words), "{line}: {}", error.message);
        }
        for (without_credit, line) in [(false, r#"{"ok":{}}"#), (true, r#"{"ok":{"without_credit":true}}"#)] {
            let answer = EgressAnswer::Ok { without_credit };
            assert_eq!(serde_json::to_string(&answer).unwrap(), line);
            assert_eq!(serde_json::from_str::<EgressAnswer>(line).unwrap(), answer);
        }
        let error = EgressError {
            reason: Some(DenyReason::Private),
            ..EgressError::new(EgressFailure::Denied, "no")
        };
        assert_eq!(
            serde_json::to_string(&EgressAnswer::Error(error)).unwrap(),
            r#"{"error":{"failure":"denied","reason":"private","message":"no"}}"#
        );
    }
}
