//! Streams between host and guest on their own connections: the messages that open, accompany and end one.
//!
//! Each is a connection that the host opens to the guest's vsock port [`crate::link::STREAM_PORT`]:
//!
//! ```text
//! host                                              guest
//!   {"version":1,"open":{"exec":{…}}}  ─────────────>      one line: `Opening`
//!                     <─────────────  {"ok":{…}}           one line: `Opened`, or {"error":{code, message, …}}
//!   frames  <───────────────────────────────────────>      both ways at once: `nexus_wire::frames`
//!                     <─────────────  done                 `Done`; then both close the connection
//! ```
//! The host sends no frame before it has read the answer, except data of a TCP connection to guests that offer [`crate::link::EARLY_DATA`]. A side that
//! disconnects before `done` abandons the stream; each kind of [`Open`] says what happens then.

mod tree;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ToolError;
use crate::id::CommandId;
use crate::tools::command::CommandStartParams;

pub use self::tree::{
    TreeArrival, TreeEnded, TreeInOpening, TreeOutOpening, TreePart, TreeResume, TreeTrack,
};

/// The version of openings and frames that this build supports.
pub const VERSION: u32 = 1;
/// The maximum length of the line that opens a stream, and of the answer, in bytes.
pub const LINE_MAX: usize = 64 << 10;
/// Timeout of each side's line.
pub const OPENING_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// The first line: the host's request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opening {
    /// [`VERSION`].
    pub version: u32,
    /// The name of the client that opens it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// What to open.
    pub open: Open,
}

/// What a stream is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Open {
    /// Start a command and attach to it.
    Exec(Box<ExecOpening>),
    /// Attach to an existing command.
    Attach(AttachOpening),
    /// A TCP connection to the guest's loopback.
    Tcp(TcpOpening),
    /// A tree of files to unpack.
    TreeIn(Box<TreeInOpening>),
    /// A tree of files to pack.
    TreeOut(Box<TreeOutOpening>),
}

/// A command to start. Data is its standard input and its standard output. No byte is dropped: the command waits for the reader. If the host
/// disconnects, the command continues, and its output is kept as for any other command.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecOpening {
    /// The command. With `tty` or `stdin_open` its input comes over the stream.
    pub start: CommandStartParams,
    /// Start the user's login shell in their home, instead of `command` or `argv`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub login_shell: bool,
}

/// A command to attach to. The client that writes to it gets its output without gaps, and the command waits for that client; the others only watch,
/// and are told how much they missed ([`Notice::Missed`]). If the host disconnects, the command continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachOpening {
    /// The command.
    pub id: CommandId,
    /// Also write to it, if no other client does; the answer says whether that worked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write: bool,
    /// With `write`: take over from the present writer, which continues to watch.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub take_over: bool,
    /// How much of the newest kept output to send first, of each stream, in bytes (default: all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scroll_back: Option<u64>,
}

/// A TCP connection. Data is its content in both directions; `end` is its half-close. If the host disconnects, it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TcpOpening {
    /// The port on 127.0.0.1, or on ::1 if nothing listens there.
    pub port: u16,
}

/// The answer to an [`Opening`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The stream is open.
    Ok(Opened),
    /// The stream was not opened; the connection is closed.
    Error(ToolError),
}

/// Facts about an opened stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<CommandId>,
    /// Whether it has a terminal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    /// Whether the command gets what the client sends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writer: bool,
    /// Whether the tree that follows is a directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_directory: bool,
}

/// The host's messages while a command's stream is open: the payload of a control frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Control {
    /// Sets the terminal's size; only the writer can do this.
    Resize {
        /// The width in columns.
        cols: u16,
        /// The height in rows.
        rows: u16,
    },
    /// Send a signal to the command's process group.
    Signal {
        /// The signal's name, such as `INT`, or its number.
        signal: String,
    },
    /// End the stream; the command continues. The guest answers with a [`Done`] that has `detached`.
    Detach {},
}

/// The guest's messages while a command's stream is open: the payload of a control frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// The client has become the writer, or no longer is.
    Writer {
        /// Whether it is.
        writer: bool,
    },
    /// Output is missing here: it was dropped before it could be sent.
    Missed {
        /// The number of missing bytes.
        bytes: u64,
    },
    /// A control frame failed.
    Refused(ToolError),
}

/// How a stream ended: the payload of the last frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    /// Successfully.
    Ok(Ended),
    /// Something failed.
    Error(ToolError),
}

/// Facts about a successfully ended stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The command's status as a shell reports it: the exit code, or 128 and the number of the signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// The name of the signal that ended it, such as `SIGKILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether it was killed after its timeout.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// Whether only the stream has ended, and the command continues.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
    /// The copied tree, if the stream was for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<Box<TreeEnded>>,
}

impl Opening {
    /// Parses the line of an opening; the error describes what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, ToolError> {
        /// The part that all versions have in common.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let refuse = |error: serde_json::Error| ToolError::invalid(format!("open a stream: {error}"));
        let wrong = match serde_json::from_slice::<Self>(line) {
            Ok(opening) if opening.version == VERSION => return Ok(opening),
            Ok(_) => None,
            Err(error) => Some(error),
        };
        // What another version opens may be unknown here.
        let Versioned { version } = serde_json::from_slice(line).map_err(refuse)?;
        match wrong {
            Some(error) if version == VERSION => Err(refuse(error)),
            _ => {
                let text = format!("streams of version {version} are not supported, only version {VERSION}");
                Err(ToolError::invalid(text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Opening, ToolError> {
        Opening::parse(line.as_bytes())
    }

    #[test]
    fn openings_are_what_is_documented() {
        let id = CommandId::of_boot(2, 1).unwrap();
        for (line, open) in [
            (
                r#"{"version":1,"open":{"exec":{"start":{"argv":["cat"],"stdin_open":true}}}}"#.to_owned(),
                Open::Exec(Box::new(ExecOpening {
                    start: CommandStartParams {
                        argv: Some(vec!["cat".into()]),
                        stdin_open: true,
                        ..CommandStartParams::default()
                    },
                    login_shell: false,
                })),
            ),
            (
                format!(r#"{{"version":1,"open":{{"attach":{{"id":"{id}","write":true}}}}}}"#),
                Open::Attach(AttachOpening { id, write: true, take_over: false, scroll_back: None }),
            ),
            (r#"{"version":1,"open":{"tcp":{"port":80}}}"#.to_owned(), Open::Tcp(TcpOpening { port: 80 })),
        ] {
            let opening = parse(&line).unwrap();
            assert_eq!(opening, Opening { version: 1, client: None, open });
            assert_eq!(serde_json::to_string(&opening).unwrap(), line);
        }
    }

    #[test]
    fn what_is_no_opening_is_refused_with_words() {
        for (line, words) in [
            ("", "EOF while parsing"),
            ("GET / HTTP/1.1", "expected value"),
            ("{}", "missing field `version`"),
            (r#"{"version":2,"open":{"sftp":{}}}"#, "streams of version 2 are not supported"),
            (r#"{"version":1}"#, "missing field `open`"),
            (r#"{"version":1,"open":{"sftp":{}}}"#, "unknown variant `sftp`"),
            (r#"{"version":1,"open":{"tcp":{"port":80}},"x":1}"#, "unknown field `x`"),
            (r#"{"version":1,"open":{"tcp":{"port":70000}}}"#, "invalid value"),
            (r#"{"version":1,"open":{"tcp":{"port":80,"host":"x"}}}"#, "unknown field `host`"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.message.contains(words), "{line}: {error}");
        }
    }

    #[test]
    fn answers_and_messages_are_what_is_documented() {
        let text = |value: serde_json::Result<String>| value.unwrap();
        assert_eq!(text(serde_json::to_string(&Answer::Ok(Opened::default()))), r#"{"ok":{}}"#);
        let error = ToolError::invalid("no");
        assert_eq!(
            text(serde_json::to_string(&Answer::Error(error))),
            r#"{"error":{"code":"invalid_argument","message":"no","retryable":false,"class":"usage"}}"#
        );
        let resize = Control::Resize { cols: 80, rows: 24 };
        assert_eq!(text(serde_json::to_string(&resize)), r#"{"resize":{"cols":80,"rows":24}}"#);
        assert_eq!(text(serde_json::to_string(&Control::Detach {})), r#"{"detach":{}}"#);
        let ended = Ended { status: Some(137), signal: Some("SIGKILL".into()), ..Ended::default() };
        assert_eq!(
            text(serde_json::to_string(&Done::Ok(ended))),
            r#"{"ok":{"status":137,"signal":"SIGKILL"}}"#
        );
    }
}
