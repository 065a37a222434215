//! The errors of commands: one type, translated to text and exit code in one place.

use std::io;
use std::path::PathBuf;

use nexus_schema::error::ErrorClass;
use nexus_schema::{ErrorCode, ToolError};

use super::hint::About;
use crate::dirs::DirsError;

/// The exit code of a command that was interrupted from the keyboard.
const INTERRUPTED: u8 = 130;
/// The exit code of a command whose reader closed the pipe.
const BROKEN_PIPE: u8 = 141;

/// The exit code of a call that failed inside the VM, as its guest reports.
const INSIDE: u8 = 7;
/// The exit code of a command in a VM whose output is incomplete, as of other programs that run a command and fail themselves.
const INCOMPLETE: u8 = 125;

/// A failed call, and what it concerned.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    /// The error of the tool.
    pub(crate) error: ToolError,
    /// What the call concerned, for hints that name it.
    pub(crate) about: About,
}

impl Refusal {
    /// A hint with commands instead of tools.
    fn hint(&self, hint: Option<&str>) -> Option<String> {
        hint.map(|hint| super::hint::for_shell(hint, &self.about))
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The daemon refused or failed the call.
    #[error("{}", .0.error.message)]
    Tool(Refusal),
    /// The call failed inside the VM, as its guest reports.
    #[error("{}", .0.error.message)]
    Guest(Refusal),
    /// A command in a VM wrote more output than a result can hold.
    #[error("the output is incomplete: {what} (the command itself ended with exit code {code})")]
    Incomplete { what: String, code: u8, vm: String },
    /// Arguments that are valid separately, but not together.
    #[error("{message}")]
    Usage { message: String, hint: Option<String> },
    /// No daemon is listening on the socket.
    #[error("no daemon is listening on {}", socket.display())]
    DaemonDown { socket: PathBuf, hint: String },
    /// Access to the socket was denied.
    #[error("no access to the daemon's socket {}", socket.display())]
    NoAccess { socket: PathBuf, source: io::Error },
    /// The socket could not be used for another reason.
    #[error("connect to {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    /// The peer is not a Nexus daemon.
    #[error("not a Nexus daemon at {}: {what}", socket.display())]
    NotNexus { socket: PathBuf, what: String },
    /// The connection was lost during a call.
    #[error("the connection to the daemon was lost during {during}")]
    Lost { during: String, source: Option<io::Error> },
    /// A stream into a VM was interrupted.
    #[error("the stream into {vm} was interrupted")]
    Cut { vm: String, command: Option<String>, source: Option<Box<dyn std::error::Error + Send + Sync>> },
    /// A local port is not available.
    #[error("listen on port {port} of this host")]
    Listen { port: u16, source: io::Error },
    /// The daemon sent an invalid answer.
    #[error("malformed answer of the daemon to {during}")]
    Garbled { during: String, source: serde_json::Error },
    /// The daemon sent a line that is too long.
    #[error("the daemon sent a line of more than {max} bytes")]
    LineTooLong { max: usize },
    /// The request itself was refused.
    #[error("{message}")]
    Protocol { code: i64, message: String },
    /// The answer timed out.
    #[error("no answer to {during} within {seconds} s")]
    Timeout { during: String, seconds: u64 },
    /// The operation did not end within the timeout.
    #[error("operation {op} is not done after {seconds} s ({step})")]
    OpPending { op: String, step: String, seconds: u64 },
    /// Interrupted from the keyboard.
    #[error("interrupted")]
    Interrupted,
    /// A local file operation failed.
    #[error("{what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    /// Standard input could not be read.
    #[error("read standard input")]
    Input { source: io::Error },
    /// Standard output could not be written.
    #[error("write to standard output")]
    Output { source: io::Error },
    /// The daemon's answer cannot be shown.
    #[error("{what}")]
    Unexpected { what: String },
    /// The place of the socket or the state is unknown.
    #[error(transparent)]
    Dirs(#[from] DirsError),
    /// The daemon could not be started.
    #[error("start the daemon: {what}")]
    Launch { what: String, hint: Option<String>, source: Option<io::Error> },
}

impl From<ToolError> for Error {
    fn from(error: ToolError) -> Self {
        Self::Tool(Refusal { error, about: About::default() })
    }
}

impl Error {
    /// Arguments that do not fit together.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: None }
    }

    /// The same error for a call, unless it already says what it concerns.
    pub(crate) fn about(mut self, about: &About) -> Self {
        if let Self::Tool(refusal) | Self::Guest(refusal) = &mut self
            && refusal.about == About::default()
        {
            refusal.about = about.clone();
        }
        self
    }

    /// The exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        let class = match self {
            Self::Interrupted => return INTERRUPTED,
            Self::Guest(_) => return INSIDE,
            Self::Incomplete { .. } => return INCOMPLETE,
            Self::Output { source } if source.kind() == io::ErrorKind::BrokenPipe => return BROKEN_PIPE,
            Self::Tool(refusal) => return refusal.error.code.exit_code(),
            Self::Usage { .. } | Self::Protocol { code: -32602 | -32601, .. } | Self::Dirs(_) => {
                ErrorClass::Usage
            }
            Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorClass::NotFound,
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => ErrorClass::Conflict,
            Self::File { .. }
            | Self::Input { .. }
            | Self::Output { .. }
            | Self::Launch { .. }
            | Self::Listen { .. } => ErrorClass::Failed,
            Self::DaemonDown { .. }
            | Self::NoAccess { .. }
            | Self::Connect { .. }
            | Self::Lost { .. }
            | Self::Cut { .. } => ErrorClass::Unavailable,
            Self::Timeout { .. } | Self::OpPending { .. } => ErrorClass::Timeout,
            Self::NotNexus { .. }
            | Self::Garbled { .. }
            | Self::LineTooLong { .. }
            | Self::Protocol { .. }
            | Self::Unexpected { .. } => ErrorClass::Internal,
        };
        class.exit_code()
    }

    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Tool(refusal) => refusal.hint(refusal.error.hint.as_deref()),
            // What the guest answers to the opening of a stream has no advice.
            Self::Guest(refusal) => refusal.hint(refusal.error.clone().with_advice().hint.as_deref()),
            Self::Incomplete { vm, .. } => Some(format!(
                "write the output to a file in the VM and read that, which has no limit: \
                 `nexusctl guest run {vm} -c 'COMMAND > /tmp/out'`, then `nexusctl guest read {vm} /tmp/out`"
            )),
            Self::Usage { hint, .. } | Self::Launch { hint, .. } => hint.clone(),
            Self::DaemonDown { hint, .. } => Some(hint.clone()),
            Self::NoAccess { .. } => Some(
                "run nexusctl as the user who runs the daemon, or use another socket with --socket".into(),
            ),
            Self::NotNexus { .. } => Some("set the daemon's socket with --socket or NEXUS_SOCKET".into()),
            Self::Lost { .. } => {
                Some("the call may have been executed: check with `nexusctl vm list`".into())
            }
            Self::Cut { vm, command: Some(id), .. } => Some(format!(
                "the command keeps running if the VM does; reattach with `nexusctl shell {vm} --attach {id}`"
            )),
            Self::Cut { vm, .. } => Some(format!("check the VM: `nexusctl vm inspect {vm}`")),
            Self::Listen { .. } => Some("choose another port, or 0 for any free one: `0:PORT`".into()),
            Self::OpPending { op, .. } => {
                Some(format!("it is still running: follow it with `nexusctl op get {op}`"))
            }
            Self::Connect { .. }
            | Self::Garbled { .. }
            | Self::LineTooLong { .. }
            | Self::Protocol { .. }
            | Self::Timeout { .. }
            | Self::Interrupted
            | Self::File { .. }
            | Self::Input { .. }
            | Self::Output { .. }
            | Self::Unexpected { .. }
            | Self::Dirs(_) => None,
        }
    }

    /// Whether nothing should be printed.
    pub(crate) fn is_silent(&self) -> bool {
        self.exit_code() == BROKEN_PIPE
    }

    /// The message with its causes.
    pub(crate) fn message(&self) -> String {
        nexus_schema::error::chain(self)
    }

    /// The error in the form for programs.
    pub(crate) fn to_tool_error(&self) -> ToolError {
        let code = match self {
            Self::Tool(refusal) => return refusal.error.clone(),
            Self::Guest(refusal) => return refusal.error.clone().with_advice(),
            Self::Incomplete { .. } => ErrorCode::TooLarge,
            Self::Usage { .. } | Self::Dirs(_) => ErrorCode::InvalidArgument,
            Self::Protocol { code: -32602 | -32601, .. } => ErrorCode::InvalidArgument,
            Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorCode::FileNotFound,
            Self::File { .. } | Self::Input { .. } | Self::Output { .. } => ErrorCode::FileRefused,
            Self::Cut { .. } => ErrorCode::GuestUnreachable,
            Self::Listen { .. } => ErrorCode::InUse,
            Self::DaemonDown { .. }
            | Self::NoAccess { .. }
            | Self::Connect { .. }
            | Self::Lost { .. }
            | Self::Launch { .. } => ErrorCode::DaemonDown,
            Self::Timeout { .. } | Self::OpPending { .. } => ErrorCode::Timeout,
            Self::Interrupted => ErrorCode::Cancelled,
            Self::NotNexus { .. }
            | Self::Garbled { .. }
            | Self::LineTooLong { .. }
            | Self::Protocol { .. }
            | Self::Unexpected { .. } => ErrorCode::Internal,
        };
        let error = ToolError::new(code, self.message());
        match self.hint() {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(kind: io::ErrorKind) -> io::Error {
        kind.into()
    }

    #[test]
    fn exit_codes_follow_the_class() {
        for code in ErrorCode::ALL {
            let error = Error::from(ToolError::new(*code, "x"));
            assert_eq!(error.exit_code(), code.exit_code(), "{code}");
            assert_ne!(error.exit_code(), INSIDE, "{code}");
            let error = ToolError::new(*code, "x");
            assert_eq!(Error::Guest(Refusal { error, about: About::default() }).exit_code(), INSIDE);
        }
        let down = Error::DaemonDown { socket: "/s".into(), hint: "start it".into() };
        assert_eq!((down.exit_code(), down.to_tool_error().code), (6, ErrorCode::DaemonDown));
        assert_eq!(Error::usage("x").exit_code(), 2);
        assert_eq!(Error::Interrupted.exit_code(), 130);
        assert_eq!(Error::Timeout { during: "x".into(), seconds: 1 }.exit_code(), 5);
        assert_eq!(Error::Protocol { code: -32602, message: "unknown tool".into() }.exit_code(), 2);
        assert_eq!(Error::Protocol { code: -32603, message: "oops".into() }.exit_code(), 70);
        let gone = Error::Output { source: io(io::ErrorKind::BrokenPipe) };
        assert!(gone.is_silent());
        assert_eq!(gone.exit_code(), 141);
    }

    #[test]
    fn a_guests_error_has_at_least_the_hint_of_its_code() {
        let guest = |error| Error::Guest(Refusal { error, about: About::default() });
        let bare = guest(ToolError::new(ErrorCode::CwdNotFound, "x"));
        assert_eq!(bare.hint().as_deref(), Some("give another cwd, or create it first"));
        assert_eq!(bare.to_tool_error().hint, bare.hint());
        let own = guest(ToolError::new(ErrorCode::CwdNotFound, "x").hint("do y"));
        assert_eq!(own.hint().as_deref(), Some("do y"));
    }

    #[test]
    fn causes_are_told_once() {
        let error = Error::File { what: "read", path: "/x".into(), source: io::Error::other("no luck") };
        assert_eq!(error.message(), "read /x: no luck");
    }
}
