//! Connections of a guest to other machines, which its host makes: the messages that open one.
//!
//! Each is a connection that the guest opens to the host's vsock port [`crate::link::EGRESS_PORT`]:
//!
//! ```text
//! guest                                             host
//!   {"version":1,"host":"example.org","port":443,"how":"connect"}  ──>    one line: `EgressOpening`
//!                     <─────────────  {"ok":{}}                           one line, or {"error":{…}}: `EgressAnswer`
//!   frames  <───────────────────────────────────────>                     both ways at once: `nexus_wire::frames`
//! ```
//! The frames are data, credit and end; both sides start with [`WINDOW`]. Each direction ends by itself. A side that hangs up before both
//! have ended resets the connection.

use serde::{Deserialize, Serialize};

use crate::network::DenyReason;

/// The version of the opening that this build speaks.
pub const VERSION: u32 = 1;
/// The longest opening, in bytes.
pub const OPENING_MAX: usize = 1 << 10;
/// The longest answer, in bytes.
pub const ANSWER_MAX: usize = 16 << 10;
/// How long the guest may take for its opening.
pub const OPENING_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// The credit that each side starts with, in bytes.
pub const WINDOW: u32 = 128 << 10;
/// The most connections of one VM at once.
pub const CONNECTIONS_MAX: usize = 256;

/// The first line: where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressOpening {
    /// [`VERSION`].
    pub version: u32,
    /// A name, which the host resolves, or an address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// How the program in the guest asked for it.
    pub how: EgressKind,
}

/// How a program asked its proxy for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressKind {
    /// By HTTP's CONNECT.
    Connect,
    /// By a request for a whole address.
    Http,
    /// By SOCKS5.
    Socks5,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressAnswer {
    /// The connection stands.
    Ok {},
    /// It does not.
    Error(EgressError),
}

/// Why a connection does not stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressError {
    /// What went wrong.
    pub failure: EgressFailure,
    /// Why it is refused, if it is by policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<DenyReason>,
    /// The same in words.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What the VM's allow list has to be for this connection; empty where that does not help, or is too long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

/// What went wrong with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressFailure {
    /// The policy refuses it.
    Denied,
    /// The opening makes no sense.
    Invalid,
    /// Nobody knows the name.
    NoSuchName,
    /// The other machine refuses the connection.
    Refused,
    /// The other machine cannot be reached.
    Unreachable,
    /// It does not answer in time.
    Timeout,
    /// The host cannot make it.
    Failed,
}

impl EgressError {
    /// An error that is no refusal by policy.
    pub fn new(failure: EgressFailure, message: impl Into<String>) -> Self {
        Self { failure, reason: None, message: message.into(), hint: None, allow: Vec::new() }
    }
}

impl EgressOpening {
    /// The opening of a line; words for what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, EgressError> {
        let refuse = |why: String| EgressError::new(EgressFailure::Invalid, why);
        let opening: Self =
            serde_json::from_slice(line).map_err(|error| refuse(format!("open a connection: {error}")))?;
        if opening.version != VERSION {
            return Err(refuse(format!(
                "openings of version {} are not known, but those of version {VERSION}",
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
        for (line, words) in [
            ("GET / HTTP/1.1", "expected value"),
            (r#"{"version":2,"host":"x","port":1,"how":"connect"}"#, "version 2 are not known"),
            (r#"{"version":1,"host":"x","port":65536,"how":"connect"}"#, "invalid value"),
            (r#"{"version":1,"host":"x","port":1,"how":"ftp"}"#, "unknown variant"),
        ] {
            let error = EgressOpening::parse(line.as_bytes()).unwrap_err();
            assert!(error.message.contains(words), "{line}: {}", error.message);
        }
        assert_eq!(serde_json::to_string(&EgressAnswer::Ok {}).unwrap(), r#"{"ok":{}}"#);
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
