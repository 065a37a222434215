//! How calls fail: a stable code, a message that says what failed on what, and a hint that says what to do next.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The key under `_meta` of a failed tool result that holds the [`ToolError`] as an object.
pub const ERROR_META: &str = "dev.nexus/error";
/// The key under `_meta` of a failed tool result that says who failed, where that is not the host: [`GUEST`].
pub const FROM_META: &str = "dev.nexus/from";
/// The value of [`FROM_META`] for an error that a guest reported: its words are not the host's.
pub const GUEST: &str = "guest";
/// The key under `_meta` of a text-first tool result that holds the facts as an object.
pub const RESULT_META: &str = "dev.nexus/result";
/// The key under `_meta` of every reply about a VM: `{id, name, boot_id}`.
pub const VM_META: &str = "dev.nexus/vm";
/// The key under `_meta` of a content block: which stream it holds (`stdout`, `stderr`, `content`).
pub const STREAM_META: &str = "dev.nexus/stream";

/// An error with its causes, on one line. A cause that the text before it ends with is not said again.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = cause.source();
    }
    text
}

/// Declares the codes with their classes.
macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $class:ident, retryable: $retry:literal;)*) => {
        /// A stable code that programs can match on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl ErrorCode {
            /// Every code there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The code as it is on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {$(Self::$variant => $text,)*}
            }

            /// What sort of failure it is; the CLI's exit code follows from it.
            pub const fn class(self) -> ErrorClass {
                match self {$(Self::$variant => ErrorClass::$class,)*}
            }

            /// Whether the same call may succeed later without a change.
            pub const fn is_retryable(self) -> bool {
                match self {$(Self::$variant => $retry,)*}
            }
        }
    };
}

codes! {
    /// An argument is malformed or impossible.
    InvalidArgument = "invalid_argument", Usage, retryable: false;
    /// The caller may not do this through this endpoint.
    Forbidden = "forbidden", Usage, retryable: false;
    /// No such VM.
    VmNotFound = "vm_not_found", NotFound, retryable: false;
    /// No such image.
    ImageNotFound = "image_not_found", NotFound, retryable: false;
    /// No such asset, installed or available.
    AssetNotFound = "asset_not_found", NotFound, retryable: false;
    /// No such drive.
    DriveNotFound = "drive_not_found", NotFound, retryable: false;
    /// No such template, or no such version of it.
    TemplateNotFound = "template_not_found", NotFound, retryable: false;
    /// No such build.
    BuildNotFound = "build_not_found", NotFound, retryable: false;
    /// No such operation.
    OpNotFound = "op_not_found", NotFound, retryable: false;
    /// No such file or directory in the guest.
    FileNotFound = "file_not_found", NotFound, retryable: false;
    /// No such command in the guest, or none any more.
    CommandNotFound = "command_not_found", NotFound, retryable: false;
    /// The command in the guest has ended.
    CommandEnded = "command_ended", Conflict, retryable: false;
    /// The command in the guest takes no input, or no more.
    InputClosed = "input_closed", Conflict, retryable: false;
    /// Another thing of the kind has the name.
    NameTaken = "name_taken", Conflict, retryable: false;
    /// The VM's state does not allow the call.
    VmWrongState = "vm_wrong_state", Conflict, retryable: false;
    /// The VM does not run.
    VmNotRunning = "vm_not_running", Conflict, retryable: false;
    /// The VM runs, but its agent is not ready yet.
    VmNotReady = "vm_not_ready", Conflict, retryable: true;
    /// The VM is protected against deletion.
    VmProtected = "vm_protected", Conflict, retryable: false;
    /// The same idempotency key was used with other arguments.
    IdempotencyConflict = "idempotency_conflict", Conflict, retryable: false;
    /// The thing is in use.
    InUse = "in_use", Conflict, retryable: false;
    /// The thing changed while the call ran.
    Changed = "changed", Conflict, retryable: true;
    /// The operation was cancelled.
    Cancelled = "cancelled", Conflict, retryable: false;
    /// A file or directory exists, is of another type, or permission is missing in the guest.
    FileRefused = "file_refused", Conflict, retryable: false;
    /// The command could not be started in the guest.
    CommandFailed = "command_failed", Failed, retryable: false;
    /// The guest's agent failed.
    GuestFailed = "guest_failed", Failed, retryable: false;
    /// The guest has no such program.
    ProgramNotFound = "program_not_found", NotFound, retryable: false;
    /// The guest has the program, and it cannot be executed.
    ProgramNotExecutable = "program_not_executable", Conflict, retryable: false;
    /// Nothing listens on the port in the guest.
    ConnectionRefused = "connection_refused", Failed, retryable: true;
    /// The VM failed to boot.
    BootFailed = "boot_failed", Failed, retryable: true;
    /// The VM ended during the call.
    VmGone = "vm_gone", Failed, retryable: true;
    /// Something that was downloaded or given is damaged or not what was promised.
    VerificationFailed = "verification_failed", Failed, retryable: true;
    /// The download failed.
    DownloadFailed = "download_failed", Failed, retryable: true;
    /// The image could not be built.
    ImageFailed = "image_failed", Failed, retryable: false;
    /// Not enough room on the disk.
    DiskFull = "disk_full", Failed, retryable: true;
    /// The host lacks a program, a device or a permission.
    HostUnsuitable = "host_unsuitable", Failed, retryable: false;
    /// The guest speaks a protocol, older or newer, that this daemon does not understand.
    GuestOutdated = "guest_outdated", Failed, retryable: false;
    /// The guest answered with something that is not an answer.
    GuestMisbehaved = "guest_misbehaved", Failed, retryable: true;
    /// The result is larger than may be sent.
    TooLarge = "too_large", Failed, retryable: false;
    /// The link to the guest is down.
    GuestUnreachable = "guest_unreachable", Unavailable, retryable: true;
    /// The deadline passed.
    Timeout = "timeout", Timeout, retryable: true;
    /// The daemon is shutting down.
    ShuttingDown = "shutting_down", Unavailable, retryable: true;
    /// The daemon cannot be reached (said by the CLI and the bridge).
    DaemonDown = "daemon_down", Unavailable, retryable: true;
    /// Too much at once.
    Busy = "busy", Unavailable, retryable: true;
    /// A defect of Nexus.
    Internal = "internal", Internal, retryable: false;
}

impl ErrorCode {
    /// Whether a guest may give it for a failure inside its VM. All others are the host's alone.
    pub const fn may_be_of_guest(self) -> bool {
        matches!(
            self,
            Self::InvalidArgument
                | Self::FileNotFound
                | Self::FileRefused
                | Self::CommandFailed
                | Self::CommandNotFound
                | Self::CommandEnded
                | Self::InputClosed
                | Self::ProgramNotFound
                | Self::ProgramNotExecutable
                | Self::ConnectionRefused
                | Self::GuestFailed
                | Self::Changed
                | Self::Cancelled
                | Self::DiskFull
                | Self::Timeout
                | Self::TooLarge
        )
    }
}

/// A sort of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The call itself is wrong.
    Usage,
    /// The thing does not exist.
    NotFound,
    /// The state of things does not allow it.
    Conflict,
    /// It was tried and failed.
    Failed,
    /// The other side is not there.
    Unavailable,
    /// It took too long.
    Timeout,
    /// A defect of Nexus.
    Internal,
}

impl ErrorClass {
    /// The exit code of the CLI for failures of this class.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Timeout => 5,
            Self::Unavailable => 6,
            Self::Internal => 70,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A failed call, as every edge shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ToolError {
    /// The stable code.
    pub code: ErrorCode,
    /// What failed, on what and why: lower case, no full stop.
    pub message: String,
    /// Whether the same call may succeed later without a change.
    pub retryable: bool,
    /// The next thing to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ToolError {
    /// An error with a code and a message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retryable: code.is_retryable(), hint: None }
    }

    /// The same with the next thing to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An argument that is malformed or impossible.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
    }

    /// A defect of Nexus.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }
}

impl fmt::Display for ToolError {
    /// `code: message`, and the hint on a line of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n{hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ToolError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_serialize_as_their_text() {
        let mut seen = std::collections::BTreeSet::new();
        for code in ErrorCode::ALL {
            assert!(seen.insert(code.as_str()), "{code}");
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }

    #[test]
    fn text_has_the_hint_on_its_own_line() {
        let error = ToolError::new(ErrorCode::VmNotRunning, "web-1 is stopped").hint("call vm_start");
        assert_eq!(error.to_string(), "vm_not_running: web-1 is stopped\ncall vm_start");
    }
}
