//! Commands in the guest: `run_command` here, those that outlive their call in [`live`].

mod live;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use live::{
    CommandEntry, CommandInput, CommandInputParams, CommandList, CommandListOutput, CommandListParams,
    CommandOutput, CommandOutputParams, CommandSignal, CommandSignalOutput, CommandSignalParams,
    CommandStart, CommandStartParams, OutputStream,
};

use crate::id::CommandId;
use crate::limits::{WAIT_MAX, YIELD_DEFAULT};
use crate::network::DenyReason;
use crate::tool::{Effect, ResultShape, TimeLimit, Tool};
use crate::tools::ContentEncoding;

/// Runs a command, and waits for its end for a limited time.
pub enum RunCommand {}

/// Arguments of `run_command`: either `command` or `argv`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunCommandParams {
    /// A command line for the VM's shell (bash where there is one, else sh); at most 2 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// A program with its arguments, run without a shell. Instead of `command`. Linux takes less than 128 KiB in each, and about
    /// 2 MiB in all with `env`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// The directory to run in (default: the image's working directory, else the user's home).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment variables; they override those of the VM, which override those of the image. Each less than 128 KiB.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The user to run as: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Its standard input (default: nothing).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// How `stdin` is encoded (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_encoding: Option<ContentEncoding>,
    /// A file in the VM that is its standard input. Instead of `stdin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_path: Option<String>,
    /// Keep standard input open for `command_input`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stdin_open: bool,
    /// How many seconds this call waits (default 30, at most 45; 0: not at all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 45))]
    pub yield_after_s: Option<f64>,
    /// Seconds until the command and all that it started are killed (default 3600; 0: never).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub timeout_s: Option<f64>,
    /// How many seconds after a SIGTERM the timeout kills (default 0: at once).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 600))]
    pub kill_grace_s: Option<f64>,
    /// Kill what the command leaves running when it ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kill_descendants: bool,
    /// How much of stdout and of stderr to show, in bytes: beyond it the middle is left out (default 32768, at most 48000;
    /// with base64 at most 262144).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 262144))]
    pub max_output_bytes: Option<u32>,
    /// How stdout and stderr are shown (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// Both streams as stdout, in the order written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub merge: bool,
    /// Bytes of each stream kept for `command_output`: head and tail (default 2 MiB, at most 16 MiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 16_777_216))]
    pub keep_bytes: Option<u32>,
    /// Never drop output: the command waits while so much of it is unread by `command_output`; `run_command` yields then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossless: bool,
    /// A file in the VM that gets all output as well; overwritten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// Take a checkpoint first, for vm_rollback.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checkpoint: bool,
}

/// The state of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CommandState {
    /// Its main process is running.
    Running,
    /// Its main process has ended.
    #[default]
    Ended,
    /// The process that held it was killed; how it ended is unknown.
    Lost,
}

/// The structured result of `run_command` and the related tools.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunCommandOutput {
    /// The command's id, for `command_output` and the like. Valid until the VM's next boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<CommandId>,
    /// Its state.
    #[serde(default)]
    pub state: CommandState,
    /// Its status as a shell reports it: the exit code, or 128 and the number of the signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// The exit code, if the command ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The name of the signal that ended it, such as `SIGKILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether it was killed after its timeout.
    pub timed_out: bool,
    /// How long it ran, or has run so far, in milliseconds.
    pub duration_ms: u64,
    /// Its standard output.
    pub stdout: StreamFacts,
    /// Its standard error.
    pub stderr: StreamFacts,
    /// The cursor to continue with in `command_output`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Whether there is already more to read at the cursor.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Processes of the command that are still running after its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descendants: Option<Descendants>,
    /// Why it failed, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<FailureCause>,
    /// The directory that it was started in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The number of its main process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The file that gets all of its output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<LogFacts>,
    /// How many bytes of the input it has accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written_bytes: Option<u64>,
    /// The processes that the kernel killed because the VM ran out of memory while the command ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub oom_killed: Vec<String>,
    /// Connections of the VM that were refused by policy while this call waited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_denied: Vec<RefusedConnection>,
}

/// Connections to one destination that were refused by policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RefusedConnection {
    /// The name or the address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Why.
    pub reason: DenyReason,
    /// How many.
    pub count: u32,
}

/// Processes that a command left behind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Descendants {
    /// How many.
    pub count: u32,
    /// Their names, such as `sleep (pid 77)`; the first 16.
    pub names: Vec<String>,
}

/// Facts about the file that gets all of a command's output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LogFacts {
    /// Where it is.
    pub path: String,
    /// How much was written to it, in bytes.
    pub written_bytes: u64,
    /// Why it is incomplete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Why a command failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureCause {
    /// The VM has no network.
    NoNetwork,
    /// The VM has only a proxy, and the program did not use it.
    ProxyOnly,
}

impl FailureCause {
    /// Explains the cause, and what to do about it.
    pub const fn explained(self) -> &'static str {
        match self {
            Self::NoNetwork => {
                "this VM has no network: install packages when its image is made (template_create with packages, or an \
                 `oci:` image), copy files in (file_write), or ask for vm_update network={\"mode\":\"proxy\"}"
            }
            Self::ProxyOnly => {
                "this VM reaches other machines by its proxy only: have the program use the one that http_proxy, https_proxy and \
                 all_proxy name (names are resolved there)"
            }
        }
    }
}

/// Facts about one output stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamFacts {
    /// The total size, in bytes.
    pub total_bytes: u64,
    /// Bytes left out of the middle, or before `offset`.
    pub omitted_bytes: u64,
    /// Whether bytes that are not UTF-8 were replaced.
    pub lossy: bool,
    /// Whether the text is shown without escape sequences, and without what a carriage return or backspace overwrote.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub folded: bool,
    /// The offset at which the shown part starts.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: u64,
    /// The offset of the bytes left out of the middle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub omitted_at: Option<u64>,
    /// Bytes of the middle that were dropped and cannot be read any more.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped_bytes: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Tool for RunCommand {
    const NAME: &'static str = "run_command";
    const TITLE: &'static str = "Run a command in the VM";
    const DESCRIPTION: &'static str = "Runs a command inside the VM (never on the host) and returns its exit code, stdout and \
        stderr; use it for anything a shell can do. Give `command` (a shell line) or \
        `argv` (no shell). A non-zero exit is a normal result. What still runs after `yield_after_s` goes on: the reply has \
        `command_id`, for command_output. The call ends with the main process; children that go on are named and keep running, \
        unless `kill_descendants`. A timeout, a cancelled call and command_signal end them too.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    const TIME_LIMIT: TimeLimit =
        TimeLimit::Argument { name: "yield_after_s", default: YIELD_DEFAULT, max: WAIT_MAX };
    type Params = RunCommandParams;
    type Output = RunCommandOutput;
}
