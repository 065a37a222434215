//! The errors of calls: a stable code, a message that says what failed on what, and a hint that says what to do next.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The key under `_meta` of a failed tool result that holds the [`ToolError`] as an object.
pub const ERROR_META: &str = "dev.nexus/error";
/// The key under `_meta` of a failed tool result that says where it failed, if not on the host: [`GUEST`].
pub const FROM_META: &str = "dev.nexus/from";
/// The value of [`FROM_META`] for an error that a guest reported: its words are not the host's.
pub const GUEST: &str = "guest";
/// The key under `_meta` of a text-first tool result that holds the structured result as an object.
pub const RESULT_META: &str = "dev.nexus/result";
/// The key under `_meta` of every reply about a VM: `{id, name, boot_id}`.
pub const VM_META: &str = "dev.nexus/vm";
/// The key under `_meta` of a command's reply: the checkpoint that was taken before it, `{id, name, expires_at}`.
pub const CHECKPOINT_META: &str = "dev.nexus/checkpoint";
/// The key under `_meta` of a content block: which stream it holds (`stdout`, `stderr`, `content`).
pub const STREAM_META: &str = "dev.nexus/stream";

/// Returns an error with its causes, on one line. A cause that the text already ends with is not repeated.
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
            /// All codes.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Returns the code as it is on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {$(Self::$variant => $text,)*}
            }

            /// Returns its class, used if nothing more exact is known.
            pub const fn class(self) -> ErrorClass {
                match self {$(Self::$variant => ErrorClass::$class,)*}
            }

            /// Returns whether the same call may succeed later without a change.
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
    Forbidden = "forbidden", Permission, retryable: false;
    /// No such VM.
    VmNotFound = "vm_not_found", NotFound, retryable: false;
    /// No such image.
    ImageNotFound = "image_not_found", NotFound, retryable: false;
    /// No such asset, installed or available.
    AssetNotFound = "asset_not_found", NotFound, retryable: false;
    /// No such drive.
    DriveNotFound = "drive_not_found", NotFound, retryable: false;
    /// No such checkpoint.
    CheckpointNotFound = "checkpoint_not_found", NotFound, retryable: false;
    /// No such template, or no such version of it.
    TemplateNotFound = "template_not_found", NotFound, retryable: false;
    /// No such build.
    BuildNotFound = "build_not_found", NotFound, retryable: false;
    /// No such operation.
    OpNotFound = "op_not_found", NotFound, retryable: false;
    /// No such file or directory in the guest.
    FileNotFound = "file_not_found", NotFound, retryable: false;
    /// No such command in the guest, or it was forgotten.
    CommandNotFound = "command_not_found", NotFound, retryable: false;
    /// No such user in the guest.
    UserNotFound = "user_not_found", NotFound, retryable: false;
    /// The working directory of a command does not exist, or its user may not enter it.
    CwdNotFound = "cwd_not_found", NotFound, retryable: false;
    /// No such access token.
    TokenNotFound = "token_not_found", NotFound, retryable: false;
    /// The port of the guest is not published.
    NotPublished = "not_published", NotFound, retryable: false;
    /// The command in the guest has ended.
    CommandEnded = "command_ended", Conflict, retryable: false;
    /// The command in the guest does not read input, or no longer does.
    InputClosed = "input_closed", Conflict, retryable: false;
    /// The VM has booted anew since the caller looked: `if_boot_id` is an earlier boot.
    BootChanged = "boot_changed", Conflict, retryable: false;
    /// Another thing of the kind has the name.
    NameTaken = "name_taken", Conflict, retryable: false;
    /// The VM's state does not allow the call.
    VmWrongState = "vm_wrong_state", Conflict, retryable: false;
    /// The VM is not running.
    VmNotRunning = "vm_not_running", Unavailable, retryable: false;
    /// The VM is running, but its agent is not ready yet.
    VmNotReady = "vm_not_ready", Unavailable, retryable: true;
    /// The VM is paused.
    VmPaused = "vm_paused", Unavailable, retryable: false;
    /// The VM is protected against deletion.
    VmProtected = "vm_protected", Conflict, retryable: false;
    /// The call cannot be undone, and needs a confirmation of exactly what it would do.
    ConfirmationRequired = "confirmation_required", Conflict, retryable: false;
    /// The token's quota does not allow more.
    QuotaExceeded = "quota_exceeded", Conflict, retryable: false;
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
    /// A file in the guest does not contain what an edit or a patch expects.
    EditMismatch = "edit_mismatch", Conflict, retryable: false;
    /// The command could not be started in the guest.
    CommandFailed = "command_failed", Failed, retryable: false;
    /// A server in the guest did not answer an HTTP request.
    RequestFailed = "request_failed", Failed, retryable: true;
    /// The guest's agent failed.
    GuestFailed = "guest_failed", Failed, retryable: false;
    /// The guest has no such program.
    ProgramNotFound = "program_not_found", NotFound, retryable: false;
    /// The guest has the program, but it cannot be executed.
    ProgramNotExecutable = "program_not_executable", Conflict, retryable: false;
    /// Nothing is listening on the port in the guest.
    ConnectionRefused = "connection_refused", Failed, retryable: true;
    /// The VM failed to boot.
    BootFailed = "boot_failed", Failed, retryable: true;
    /// The VM ended during the call.
    VmGone = "vm_gone", Unavailable, retryable: true;
    /// A downloaded or given file is damaged, or not the expected one.
    VerificationFailed = "verification_failed", Failed, retryable: true;
    /// The download failed.
    DownloadFailed = "download_failed", Failed, retryable: true;
    /// The image could not be built.
    ImageFailed = "image_failed", Failed, retryable: false;
    /// Not enough room on the disk.
    DiskFull = "disk_full", Failed, retryable: true;
    /// The host has too little free memory.
    HostOutOfMemory = "host_out_of_memory", Failed, retryable: true;
    /// The host lacks a program, a device or a permission.
    HostUnsuitable = "host_unsuitable", Failed, retryable: false;
    /// The guest speaks an older or newer protocol that this daemon does not support.
    GuestOutdated = "guest_outdated", Failed, retryable: false;
    /// The guest sent an invalid answer.
    GuestMisbehaved = "guest_misbehaved", Failed, retryable: true;
    /// The result is too large to be sent.
    TooLarge = "too_large", TooLarge, retryable: false;
    /// The link to the guest is down.
    GuestUnreachable = "guest_unreachable", Unavailable, retryable: true;
    /// The deadline passed.
    Timeout = "timeout", Timeout, retryable: true;
    /// The daemon is shutting down.
    ShuttingDown = "shutting_down", Unavailable, retryable: true;
    /// The daemon cannot be reached (reported by the CLI and the bridge).
    DaemonDown = "daemon_down", Unavailable, retryable: true;
    /// Too many calls or operations at the same time.
    Busy = "busy", Unavailable, retryable: true;
    /// A bug in Nexus.
    Internal = "internal", Internal, retryable: false;
}

impl ErrorCode {
    /// Returns whether a guest may report it for a failure inside its VM. Only the host may report the others.
    pub const fn may_be_of_guest(self) -> bool {
        matches!(
            self,
            Self::InvalidArgument
                | Self::FileNotFound
                | Self::FileRefused
                | Self::CommandFailed
                | Self::RequestFailed
                | Self::EditMismatch
                | Self::UserNotFound
                | Self::CwdNotFound
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

    /// Returns the exit code of the CLI for it.
    pub const fn exit_code(self) -> u8 {
        match self {
            // So that scripts can distinguish a VM in the wrong state from a missing daemon.
            Self::VmNotRunning | Self::VmNotReady => ErrorClass::Conflict.exit_code(),
            Self::VmGone => ErrorClass::Failed.exit_code(),
            other => other.class().exit_code(),
        }
    }
}

/// The classes of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// The call itself is invalid.
    Usage,
    /// The thing does not exist.
    NotFound,
    /// Permission is missing.
    Permission,
    /// A directory is where a file is needed.
    IsADirectory,
    /// The present state does not allow it.
    Conflict,
    /// Something is too large.
    TooLarge,
    /// The attempt failed.
    Failed,
    /// The daemon, VM or guest is not available.
    Unavailable,
    /// The timeout has expired.
    Timeout,
    /// A bug in Nexus.
    Internal,
}

impl ErrorClass {
    /// Returns whether a guest may report it for a failure inside its VM. Only the host may report the others.
    pub const fn may_be_of_guest(self) -> bool {
        !matches!(self, Self::Unavailable | Self::Internal)
    }

    /// Returns the class of a Linux error, by its name such as `EACCES`; `None` if the name is not specific enough.
    pub fn of_errno(errno: &str) -> Option<Self> {
        Some(match errno {
            "ENOENT" => Self::NotFound,
            "EACCES" | "EPERM" | "EROFS" => Self::Permission,
            "EISDIR" => Self::IsADirectory,
            "EFBIG" | "E2BIG" | "ENAMETOOLONG" | "EOVERFLOW" => Self::TooLarge,
            "ETIMEDOUT" => Self::Timeout,
            "ENOSPC" | "EDQUOT" | "EIO" | "ENOMEM" | "EMFILE" | "ENFILE" => Self::Failed,
            _ => return None,
        })
    }
}

impl ErrorClass {
    /// Returns the exit code of the CLI for failures of this class.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed | Self::TooLarge => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict | Self::IsADirectory => 4,
            Self::Timeout => 5,
            Self::Unavailable => 6,
            Self::Internal => 70,
            Self::Permission => 77,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A failed call, in the form that all interfaces show.
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
    /// What sort of failure it is; absent where it was reported by a version that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub class: Option<ErrorClass>,
    /// The name of the error of Linux behind it, such as `EACCES`, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    /// Of `confirmation_required`: what confirms the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub confirm: Option<Box<Confirm>>,
}

/// What confirms a call that cannot be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirm {
    /// The argument `confirm` of the second call; it confirms this plan only, once.
    pub token: String,
    /// What the call would do, a sentence each.
    pub plan: Vec<String>,
    /// How long the token is valid, in seconds.
    pub expires_in_s: u32,
}

/// Returns whether text has the form of a Linux error name: `EACCES`.
pub fn is_errno(text: &str) -> bool {
    let mut letters = text.bytes();
    letters.next() == Some(b'E')
        && (2..=16).contains(&text.len())
        && letters.all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

impl ToolError {
    /// Creates an error with a code and a message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retryable: code.is_retryable(),
            hint: None,
            class: Some(code.class()),
            errno: None,
            confirm: None,
        }
    }

    /// Adds the Linux error that caused it, by its name such as `EACCES`. It may determine the class more exactly than the code.
    #[must_use]
    pub fn errno(mut self, errno: impl Into<String>) -> Self {
        let errno = errno.into();
        self.class = ErrorClass::of_errno(&errno).or(self.class);
        self.errno = Some(errno);
        self
    }

    /// Adds the next thing to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Creates the error of a malformed or impossible argument.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
    }

    /// Creates the error of a bug in Nexus.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }
}

impl fmt::Display for ToolError {
    /// Writes `code: message`, and the hint on a line of its own.
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
    fn what_is_not_allowed_is_no_usage_error() {
        assert_eq!(ErrorCode::InvalidArgument.exit_code(), 2);
        assert_eq!(ErrorCode::VmProtected.exit_code(), 4);
        assert_eq!(ErrorCode::Forbidden.exit_code(), 77);
    }

    #[test]
    fn an_errno_says_more_than_the_code() {
        let error = |errno: &str| ToolError::new(ErrorCode::FileRefused, "x").errno(errno);
        for (errno, class) in [
            ("EACCES", "permission"),
            ("EROFS", "permission"),
            ("EISDIR", "is_a_directory"),
            ("ENOTDIR", "conflict"),
            ("ENOSPC", "failed"),
            ("ENAMETOOLONG", "too_large"),
        ] {
            let value = serde_json::to_value(error(errno)).unwrap();
            assert_eq!((&value["errno"], &value["class"]), (&errno.into(), &class.into()));
            assert!(is_errno(errno));
        }
        for bad in ["", "E", "eacces", "EACCES ", "X", "E\u{1b}", "EABCDEFGHIJKLMNOPQ"] {
            assert!(!is_errno(bad), "{bad:?}");
        }
        // An error of an older version, which has neither field.
        let old: ToolError =
            serde_json::from_str(r#"{"code":"timeout","message":"x","retryable":true}"#).unwrap();
        assert_eq!((old.class, old.errno), (None, None));
    }

    #[test]
    fn text_has_the_hint_on_its_own_line() {
        let error = ToolError::new(ErrorCode::VmNotRunning, "web-1 is stopped").hint("call vm_start");
        assert_eq!(error.to_string(), "vm_not_running: web-1 is stopped\ncall vm_start");
    }
}
