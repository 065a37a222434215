//! What to do about a failure of which nothing more exact is known, code by code.

use crate::error::{ErrorCode, ToolError};

/// What a caller can do about errors of one code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// The next step; it may name tools.
    Try(&'static str),
    /// There is none, and why.
    Nothing(&'static str),
}

impl ErrorCode {
    /// What to do about an error of this code that has no hint of its own.
    pub const fn advice(self) -> Advice {
        use Advice::{Nothing, Try};
        match self {
            Self::InvalidArgument => Try("correct the argument that the message names, then call again"),
            Self::Forbidden => Try("use an endpoint or a token that may do this"),
            Self::VmNotFound => Try("call vm_list to see the VMs"),
            Self::ImageNotFound => Try("call image_list to see the images"),
            Self::AssetNotFound => Try("call asset_list to see what is installed and available"),
            Self::DriveNotFound => Try("call drive_list to see the drives"),
            Self::CheckpointNotFound => Try("call checkpoint_list to see the checkpoints"),
            Self::TemplateNotFound => Try("call template_list to see the templates"),
            Self::BuildNotFound => Try("call build_list to see the builds"),
            Self::OpNotFound => Try("call op_list to see the operations"),
            Self::TokenNotFound => Try("call token_list to see the tokens"),
            Self::ConfirmationRequired => Try("ask your user, then call again with the confirm token"),
            Self::QuotaExceeded => Try("delete what is no longer needed, or use a token with a larger quota"),
            Self::FileNotFound => Try("look at its directory with guest_file_list"),
            Self::CommandNotFound => Try("call guest_command_list to see the commands of this boot"),
            Self::UserNotFound => Try("the VM's users are in its /etc/passwd: read it with guest_file_read"),
            Self::CwdNotFound => Try("give another cwd, or create it first"),
            Self::NotPublished => Try("call vm_inspect to see what is published"),
            Self::CommandEnded => Try("read what it wrote with guest_command_output"),
            Self::InputClosed => Try("start it again with guest_command_start and stdin_open: true"),
            Self::BootChanged => {
                Try("look at the VM with vm_inspect, then call again with its boot_id, or without if_boot_id")
            }
            Self::NameTaken => Try("choose another name"),
            Self::VmWrongState => Try("call vm_inspect to see its state"),
            Self::VmNotRunning => Try("call vm_start"),
            Self::VmNotReady => Try("call vm_start: it waits until the VM is ready"),
            Self::VmPaused => Try("call vm_start: it resumes the VM"),
            Self::VmProtected => Try("call vm_update with protected: false first"),
            Self::IdempotencyConflict => Try("use another key, or the arguments of the first call"),
            Self::InUse => Try("free it first, or choose another"),
            Self::Changed => Try("try again"),
            Self::Cancelled => Nothing("somebody wanted it to end"),
            Self::FileRefused => Try("check the path, its type and its owner with guest_file_list"),
            Self::EditMismatch => Try("read the file again with guest_file_read, then repeat the edit"),
            Self::CommandFailed => Try("check the program and the arguments that the message names"),
            Self::RequestFailed => {
                Try("check that the server is running with guest_command_list, then try again")
            }
            Self::GuestFailed => Try("try again; vm_restart starts the agent anew"),
            Self::ProgramNotFound => Try("install it in the VM, or give its whole path"),
            Self::ProgramNotExecutable => Try("make it executable, or run it with its interpreter"),
            Self::ConnectionRefused => {
                Try("start a server on that port in the VM first: guest_command_start")
            }
            Self::BootFailed => Try("read the console with vm_logs, then call vm_start"),
            Self::VmGone => Try("look at the VM with vm_inspect; vm_start brings it back"),
            Self::VerificationFailed => Try("try again; if it fails the same way, use another source"),
            Self::DownloadFailed => Try("check that the host of nexusd can reach the source, then try again"),
            Self::ImageFailed => Try("correct what the message names, then try again"),
            Self::DiskFull => Try("free disk space on the host, for example with prune, then try again"),
            Self::HostOutOfMemory => Try("stop or suspend a VM that is not needed, then try again"),
            Self::HostUnsuitable => Try("call system_info: it says what the host lacks"),
            Self::GuestOutdated => Try("call vm_restart: the VM gets the agent of this daemon"),
            Self::GuestMisbehaved => Try("try again; vm_restart starts the agent anew"),
            Self::TooLarge => Try("ask for less at once: a limit, an offset, or output into a file"),
            Self::GuestUnreachable => {
                Try("look at the VM with vm_inspect; vm_restart with force: true brings it back")
            }
            Self::Timeout => Try("try again, or allow more time"),
            Self::ShuttingDown => Try("try again in a moment, when nexusd runs again"),
            Self::DaemonDown => Try("start nexusd"),
            Self::Busy => Try("wait for calls that are under way to end, then try again"),
            Self::Internal => Nothing("it is a bug in nexusd, whose log says more"),
        }
    }
}

impl ErrorCode {
    /// What to do about an error of this code at the endpoint of one VM, where there are no tools for the VM itself.
    pub const fn advice_inside(self) -> &'static str {
        match self {
            Self::VmNotFound => "the VM is gone: ask whoever gave you this endpoint for another one",
            Self::VmNotRunning | Self::VmNotReady | Self::VmWrongState | Self::VmGone | Self::BootFailed => {
                "ask whoever gave you this endpoint to start the VM, then try again"
            }
            Self::GuestUnreachable
            | Self::GuestFailed
            | Self::GuestMisbehaved
            | Self::GuestOutdated
            | Self::BootChanged => {
                "try again; if it keeps failing, ask whoever gave you this endpoint to restart the VM"
            }
            _ => "ask whoever gave you this endpoint: it has no tools for the VM itself",
        }
    }
}

impl ToolError {
    /// The same with what to do next: its own hint, or else that of its code.
    #[must_use]
    pub fn with_advice(mut self) -> Self {
        if self.hint.is_none()
            && let Advice::Try(what) = self.code.advice()
        {
            self.hint = Some(what.to_owned());
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools;

    /// Words in the form of a tool's name that are no tool.
    const NO_TOOLS: [&str; 4] = ["stdin_open", "boot_id", "if_boot_id", "not_published"];

    #[test]
    fn every_code_has_a_next_step_or_says_why_there_is_none() {
        let known: Vec<String> =
            tools::host().into_iter().chain(tools::guest_on_host()).map(|info| info.name).collect();
        for code in ErrorCode::ALL {
            let (Advice::Try(text) | Advice::Nothing(text)) = code.advice();
            assert!(text.len() > 8, "{code}");
            let words = text.split(|c: char| !c.is_ascii_lowercase() && c != '_');
            for word in words.filter(|word| word.contains('_') && !NO_TOOLS.contains(word)) {
                assert!(known.iter().any(|name| name == word), "{code}: there is no tool {word}");
            }
        }
        let nothing = ErrorCode::ALL.iter().filter(|code| matches!(code.advice(), Advice::Nothing(_)));
        assert_eq!(nothing.copied().collect::<Vec<_>>(), [ErrorCode::Cancelled, ErrorCode::Internal]);
    }

    #[test]
    fn an_own_hint_is_kept() {
        let own = ToolError::new(ErrorCode::Changed, "x").hint("do y").with_advice();
        assert_eq!(own.hint.as_deref(), Some("do y"));
        assert_eq!(ToolError::new(ErrorCode::Changed, "x").with_advice().hint.as_deref(), Some("try again"));
        assert_eq!(ToolError::internal("x").with_advice().hint, None);
    }
}
