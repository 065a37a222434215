//! Commands in the guest.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::limits::{COMMAND_TIMEOUT_DEFAULT, COMMAND_TIMEOUT_MAX};
use crate::tool::{Effect, ResultShape, TimeLimit, Tool};
use crate::tools::ContentEncoding;

/// Runs a command to its end.
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
    /// The user to run as: a name or a number (default root).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What the command reads from its standard input (default: nothing).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// How `stdin` is encoded (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_encoding: Option<ContentEncoding>,
    /// After how many seconds the command and all that it started are killed (default 30, at most 3600).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_s: Option<u32>,
    /// How much of stdout and of stderr to show, in bytes: beyond it the middle is left out (default 32768, at most 48000;
    /// with base64 at most 262144).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 262144))]
    pub max_output_bytes: Option<u32>,
    /// How stdout and stderr are shown (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
}

/// Facts of a `run_command` result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunCommandOutput {
    /// The exit code, if the command ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The name of the signal that ended it, such as `SIGKILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether it was killed because its time was up.
    pub timed_out: bool,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
    /// What it wrote to stdout.
    pub stdout: StreamFacts,
    /// What it wrote to stderr.
    pub stderr: StreamFacts,
    /// The processes that the kernel killed because the VM ran out of memory while the command ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub oom_killed: Vec<String>,
}

/// Facts about one output stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamFacts {
    /// All that was written, in bytes.
    pub total_bytes: u64,
    /// Bytes left out of the middle.
    pub omitted_bytes: u64,
    /// Whether bytes that are not UTF-8 were replaced.
    pub lossy: bool,
}

impl Tool for RunCommand {
    const NAME: &'static str = "run_command";
    const TITLE: &'static str = "Run a command in the VM";
    const DESCRIPTION: &'static str = "Runs a command inside the VM (never on the host) and returns its exit code, stdout and \
        stderr; use it for anything a shell can do: build, test, look around. Give `command` (a shell line) or \
        `argv` (no shell). A non-zero exit is a normal result. The command is killed with all that it started when `timeout_s` \
        is over; long output keeps its head and tail.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    const TIME_LIMIT: TimeLimit =
        TimeLimit::Argument { name: "timeout_s", default: COMMAND_TIMEOUT_DEFAULT, max: COMMAND_TIMEOUT_MAX };
    type Params = RunCommandParams;
    type Output = RunCommandOutput;
}
