//! Streams of their own between host and guest: the messages that open, accompany and end one.
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
//! The host sends no frame before it has read the answer. A side that hangs up before `done` gives the stream up; what that means
//! is said with each kind of [`Open`].

mod tree;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ToolError;
use crate::id::CommandId;
use crate::tools::command::CommandStartParams;

pub use self::tree::{
    TreeArrival, TreeEnded, TreeInOpening, TreeOutOpening, TreePart, TreeResume, TreeTrack,
};

/// The version of the openings and frames that this build speaks.
pub const VERSION: u32 = 1;
/// The longest line that opens a stream, and the longest answer to it, in bytes.
pub const LINE_MAX: usize = 64 << 10;
/// How long a side may take to send its line.
pub const OPENING_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// The first line: what the host wants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opening {
    /// [`VERSION`].
    pub version: u32,
    /// Who opens it: the client's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// What it carries.
    pub open: Open,
}

/// What a stream carries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Open {
    /// Start a command and attach to it.
    Exec(Box<ExecOpening>),
    /// Attach to a command that is there.
    Attach(AttachOpening),
    /// A TCP connection to the guest's loopback.
    Tcp(TcpOpening),
    /// A tree of files to unpack.
    TreeIn(Box<TreeInOpening>),
    /// A tree of files to pack.
    TreeOut(Box<TreeOutOpening>),
}

/// A command to start. Data is its standard input, and its standard output; no byte is dropped: the command waits for the
/// reader. If the host hangs up, the command goes on, and its output is kept as that of any other command.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecOpening {
    /// The command. With `tty` or `stdin_open` its input comes over the stream.
    pub start: CommandStartParams,
    /// Instead of `command` or `argv`: the user's login shell, in their home.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub login_shell: bool,
}

/// A command to attach to. The first who writes to it gets its output without a gap, and it waits for them; the others see what
/// comes, and are told what they missed ([`Notice::Missed`]). If the host hangs up, the command goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachOpening {
    /// The command.
    pub id: CommandId,
    /// Write to it as well, if nobody else does; the answer says whether that is so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write: bool,
    /// With `write`: take over from whoever writes, who goes on watching.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub take_over: bool,
    /// How much of the newest kept output to send first, of each stream, in bytes (default: all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scroll_back: Option<u64>,
}

/// A TCP connection. Data is what it carries, both ways; `end` is its half-close. If the host hangs up, it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TcpOpening {
    /// The port on 127.0.0.1, or else on ::1.
    pub port: u16,
}

/// The answer to an [`Opening`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is open.
    Ok(Opened),
    /// It is not; the connection is closed.
    Error(ToolError),
}

/// Facts about a stream that was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<CommandId>,
    /// Whether it has a terminal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    /// Whether what is sent is written to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writer: bool,
    /// Whether the tree that comes is a directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_directory: bool,
}

/// What the host says while a command's stream is under way: the payload of a control frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Control {
    /// The terminal has this size now; from the writer only.
    Resize {
        /// Its width.
        cols: u16,
        /// Its height.
        rows: u16,
    },
    /// Send a signal to the command's process group.
    Signal {
        /// Its name, such as `INT`, or its number.
        signal: String,
    },
    /// End the stream; the command goes on. The guest answers with a [`Done`] that says `detached`.
    Detach {},
}

/// What the guest says while a command's stream is under way: the payload of a control frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// Whether what this side sends is written to the command has changed.
    Writer {
        /// Whether it is.
        writer: bool,
    },
    /// Output is missing here: it was dropped before it could be sent.
    Missed {
        /// How much, in bytes.
        bytes: u64,
    },
    /// A control frame could not be obeyed.
    Refused(ToolError),
}

/// How a stream ended: the payload of the last frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    /// As it should.
    Ok(Ended),
    /// Something failed.
    Error(ToolError),
}

/// Facts about a stream that ended as it should.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// What a shell says of the command's end: the exit code, or 128 and the number of the signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// The name of the signal that ended it, such as `SIGKILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether it was killed because its time was up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// Whether it goes on, and only the stream has ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
    /// What was copied, of a tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<Box<TreeEnded>>,
}

impl Opening {
    /// The opening of a line; words for what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, ToolError> {
        /// What all versions have in common.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let refuse = |error: serde_json::Error| ToolError::invalid(format!("open a stream: {error}"));
        let Versioned { version } = serde_json::from_slice(line).map_err(refuse)?;
        if version != VERSION {
            let text = format!("streams of version {version} are not known, but those of version {VERSION}");
            return Err(ToolError::invalid(text));
        }
        serde_json::from_slice(line).map_err(refuse)
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
            (r#"{"version":2,"open":{"sftp":{}}}"#, "streams of version 2 are not known"),
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
