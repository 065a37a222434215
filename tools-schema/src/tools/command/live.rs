//! Commands that outlive the call that started them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{CommandState, Descendants, RunCommandOutput};
use crate::id::CommandId;
use crate::time::Timestamp;
use crate::tool::{Effect, ResultShape, Tool};
use crate::tools::ContentEncoding;

/// Starts a command and does not wait for it.
pub enum CommandStart {}

/// Arguments of `command_start`: either `command` or `argv`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandStartParams {
    /// A command line for the VM's shell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// A program with its arguments, without a shell. Instead of `command`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// The directory to run in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment variables.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The user to run as: name, uid, `uid:gid`, or `image` (the image's); default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Give it a terminal: one stream, stdout, and its standard input stays open.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    /// The terminal's width (default 80).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub cols: Option<u16>,
    /// The terminal's height (default 24).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub rows: Option<u16>,
    /// Text for its standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// A file in the VM that is its standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_path: Option<String>,
    /// Keep standard input open for command_input.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stdin_open: bool,
    /// Seconds until it and all that it started are killed (default 3600; 0: never).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub timeout_s: Option<f64>,
    /// How many seconds after a SIGTERM the timeout kills (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 600))]
    pub kill_grace_s: Option<f64>,
    /// Kill what it leaves running when it ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kill_descendants: bool,
    /// Both streams as stdout, in order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub merge: bool,
    /// Bytes kept of each stream (default 2 MiB, at most 16 MiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 16_777_216))]
    pub keep_bytes: Option<u32>,
    /// Never drop output: the command waits while so much of it is unread by `command_output`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossless: bool,
    /// A file in the VM that gets all output as well; overwritten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
}

impl Tool for CommandStart {
    const NAME: &'static str = "command_start";
    const TITLE: &'static str = "Start a command in the VM";
    const DESCRIPTION: &'static str = "Starts a command inside the VM and answers at once with its `command_id`; use it for \
        servers, long work, and programs that want a terminal or input. It outlives this connection. Then: command_output, \
        command_input, command_signal, command_list.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    type Params = CommandStartParams;
    type Output = RunCommandOutput;
}

/// One of a command's output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output; all output of a command with a terminal or with `merge`.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Reads the output of a command.
pub enum CommandOutput {}

/// Arguments of `command_output`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandOutputParams {
    /// The `command_id`.
    pub id: CommandId,
    /// Where to go on: `cursor` of the reply before (default: the start).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Milliseconds to wait for new output or the end (default 0, at most 45000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45_000))]
    pub wait_ms: Option<u32>,
    /// Wait for the end and not for new output (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub until_end: bool,
    /// Only this stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<OutputStream>,
    /// Where to start in `stream`, in bytes. Instead of `cursor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Bytes of each stream to show (default 32768, at most 48000; with base64 at most 262144, of one stream 720896).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 720_896))]
    pub limit: Option<u32>,
    /// How output is shown (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
}

impl CommandOutputParams {
    /// Everything that is kept of a command, without waiting.
    pub const fn of(id: CommandId) -> Self {
        Self {
            id,
            cursor: None,
            wait_ms: None,
            until_end: false,
            stream: None,
            offset: None,
            limit: None,
            encoding: None,
        }
    }
}

impl Tool for CommandOutput {
    const NAME: &'static str = "command_output";
    const TITLE: &'static str = "Read a command's output in the VM";
    const DESCRIPTION: &'static str = "Reads what a command in the VM wrote, and how it is or ended; use it to follow one that \
        run_command or command_start left running, with `cursor` and `wait_ms`, or to read any part that is kept.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = CommandOutputParams;
    type Output = RunCommandOutput;
}

/// Writes to a command's standard input or terminal.
pub enum CommandInput {}

/// Arguments of `command_input`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandInputParams {
    /// The `command_id`.
    pub id: CommandId,
    /// What to write; at most 2 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// How `input` is encoded (default text); the output comes the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// Then close standard input; in a terminal: type Ctrl-D.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub eof: bool,
    /// Milliseconds to wait for new output or the end (default 0, at most 45000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45_000))]
    pub wait_ms: Option<u32>,
    /// Where to go on reading (default: what comes after the input).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// The terminal's new width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub cols: Option<u16>,
    /// The terminal's new height.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub rows: Option<u16>,
}

impl Tool for CommandInput {
    const NAME: &'static str = "command_input";
    const TITLE: &'static str = "Write to a command in the VM";
    const DESCRIPTION: &'static str = "Writes to the standard input or terminal of a command in the VM and answers with new \
        output; use it for programs that ask or are typed to. Works with `stdin_open` and `tty`. Says `written_bytes`: give the \
        rest again if that is less.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    type Params = CommandInputParams;
    type Output = RunCommandOutput;
}

/// Sends a signal to a command.
pub enum CommandSignal {}

/// Arguments of `command_signal`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandSignalParams {
    /// The `command_id`.
    pub id: CommandId,
    /// The signal: a name such as `INT`, or a number (default TERM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
}

/// The result of `command_signal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandSignalOutput {
    /// The command.
    pub command_id: CommandId,
    /// The signal that was sent.
    pub signal: String,
    /// The state of the command after that.
    pub state: CommandState,
}

impl Tool for CommandSignal {
    const NAME: &'static str = "command_signal";
    const TITLE: &'static str = "Signal a command in the VM";
    const DESCRIPTION: &'static str = "Sends a signal to the process group of a command in the VM; use it to end or interrupt \
        one. KILL reaches all that it started; after its end, so does every signal.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    type Params = CommandSignalParams;
    type Output = CommandSignalOutput;
}

/// Lists commands.
pub enum CommandList {}

/// Arguments of `command_list`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandListParams {
    /// How many at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// One command of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CommandEntry {
    /// Its id.
    pub command_id: CommandId,
    /// The command line, cut to 200 characters.
    pub command: String,
    /// Who started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// The name of the service, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// When.
    pub started_at: Timestamp,
    /// Where.
    pub cwd: String,
    /// As whom.
    pub user: String,
    /// The number of its main process.
    pub pid: u32,
    /// Whether it has a terminal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    /// Its state.
    pub state: CommandState,
    /// Its status as a shell reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// Whether it was killed after its timeout.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// How long it ran, or has run so far, in milliseconds.
    pub duration_ms: u64,
    /// The total size of its output, in bytes.
    pub output_bytes: u64,
    /// Processes that it left running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descendants: Option<Descendants>,
    /// Why it is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The result of `command_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CommandListOutput {
    /// The commands: the running ones first, then the newest first.
    pub commands: Vec<CommandEntry>,
    /// The cursor of the next page, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for CommandList {
    const NAME: &'static str = "command_list";
    const TITLE: &'static str = "List the commands in the VM";
    const DESCRIPTION: &'static str = "Lists the commands that run in the VM and those that ended lately, with who started them \
        and when; use it to find one again.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = CommandListParams;
    type Output = CommandListOutput;
}
