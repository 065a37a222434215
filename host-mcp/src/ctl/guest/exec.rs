//! `nexusctl guest run`: a command in a VM, with its exact bytes and its exit code.

use std::io::Read;
use std::os::fd::AsFd;

use clap::Args;
use data_encoding::BASE64;
use nexus_schema::id::VmKind;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::{RunCommandOutput, RunCommandParams, StreamFacts};
use nexus_schema::{ErrorCode, Reference, ToolError};
use rustix::fs::FileType;
use serde_json::{Value, json};

use super::live::{self, Stream};
use crate::ctl::App;
use crate::ctl::args::pair;
use crate::ctl::client::raw;
use crate::ctl::error::Error;
use crate::ctl::format;

/// The most input that fits in one call with room to spare, in bytes.
const STDIN_MAX: usize = 8 << 20;
/// The exit code of a command whose time was up.
const TIMED_OUT: u8 = 124;
/// The exit code of a program that is there and cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The exit code of a program that is not there.
const NOT_FOUND: u8 = 127;

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A line for the VM's shell, instead of a program with arguments
    #[arg(short = 'c', long = "command", value_name = "LINE", conflicts_with = "argv")]
    line: Option<String>,
    /// The directory to run in [default: the user's home]
    #[arg(short = 'C', long, alias = "workdir", value_name = "DIR")]
    cwd: Option<String>,
    /// An environment variable
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// The user to run as: a name or a number [default: root]
    #[arg(short, long)]
    user: Option<String>,
    /// After how many seconds it is killed, with exit code 124
    #[arg(short, long, value_name = "SECONDS", default_value_t = 3600,
        value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    /// Do not pass standard input on
    #[arg(short, long)]
    no_stdin: bool,
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "line")]
    argv: Vec<String>,
}

impl RunArgs {
    #[cfg(test)]
    pub(crate) fn argv(&self) -> &[String] {
        &self.argv
    }
}

/// Runs a command in a VM; its exit code is that of the command.
pub(crate) async fn exec(app: &App, args: RunArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let stdin = if args.no_stdin { None } else { piped_stdin().await? };
    let params = RunCommandParams {
        command: args.line,
        argv: Some(args.argv).filter(|argv| !argv.is_empty()),
        cwd: args.cwd,
        env: args.env.into_iter().collect(),
        user: args.user,
        stdin: stdin.as_deref().map(|bytes| BASE64.encode(bytes)),
        stdin_encoding: stdin.is_some().then_some(ContentEncoding::Base64),
        timeout_s: Some(args.timeout.into()),
        ..RunCommandParams::default()
    };
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let is_json = app.ui.is_json();
    let sink = |stream, bytes: &[u8]| match (stream, is_json) {
        (Stream::Stdout, false) => app.ui.bytes(bytes),
        (Stream::Stderr, false) => app.ui.error_bytes(bytes),
        (Stream::Stdout, true) => Ok(stdout.extend_from_slice(bytes)),
        (Stream::Stderr, true) => Ok(stderr.extend_from_slice(bytes)),
    };
    let facts = match live::run(&mut client, &args.vm.to_string(), params, sink).await {
        Ok(facts) => facts,
        Err(error) => {
            let Some(code) = not_started(&error) else { return Err(error) };
            app.ui.fail(&error);
            return Ok(code);
        }
    };
    if is_json {
        app.ui.json(&raw(&as_json(&facts, &stdout, &stderr))?)?;
    } else {
        for (name, facts) in [("stdout", facts.stdout), ("stderr", facts.stderr)] {
            if facts.omitted_bytes > 0 {
                app.ui.warn(&omitted(name, facts));
            }
        }
        if !facts.oom_killed.is_empty() {
            let who = facts.oom_killed.join(", ");
            app.ui.warn(&format!(
                "the VM ran out of memory, and the kernel killed {who}; results may be wrong"
            ));
        }
        if facts.timed_out {
            app.ui.warn(&format!("the command was killed after {} s", args.timeout));
        }
    }
    Ok(exit_code(&facts))
}

fn omitted(name: &str, facts: StreamFacts) -> String {
    format!(
        "{} of the {} of {name} were left out of the middle; write it to a file in the VM and read that",
        format::size(facts.omitted_bytes),
        format::size(facts.total_bytes),
    )
}

/// A guest that gives another result than it was asked for.
pub(super) fn not_asked_for(what: &str) -> Error {
    ToolError::new(ErrorCode::GuestMisbehaved, what).into()
}

/// The facts with what was written: as text where it is text, else as base64.
fn as_json(facts: &RunCommandOutput, stdout: &[u8], stderr: &[u8]) -> Value {
    let mut value = json!(facts);
    for (name, bytes) in [("stdout", stdout), ("stderr", stderr)] {
        match std::str::from_utf8(bytes) {
            Ok(text) => value[name]["text"] = text.into(),
            Err(_) => value[name]["base64"] = BASE64.encode(bytes).into(),
        }
    }
    value
}

/// The exit code that a shell would give for a program that did not start.
fn not_started(error: &Error) -> Option<u8> {
    match error {
        Error::Guest(error) if error.code == ErrorCode::ProgramNotFound => Some(NOT_FOUND),
        Error::Guest(error) if error.code == ErrorCode::ProgramNotExecutable => Some(NOT_EXECUTABLE),
        _ => None,
    }
}

/// The exit code that a shell would give.
fn exit_code(facts: &RunCommandOutput) -> u8 {
    if facts.timed_out {
        return TIMED_OUT;
    }
    match (facts.exit_code, facts.signal.as_deref()) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        (None, Some(signal)) => signal_number(signal).map_or(u8::MAX, |number| number.saturating_add(128)),
        (None, None) => u8::MAX,
    }
}

/// The number of a signal by its name (Linux, x86_64 and aarch64), or of one that has a number only, such as `SIG34`.
fn signal_number(name: &str) -> Option<u8> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let name = name.strip_prefix("SIG").unwrap_or(name);
    let named = NAMES.iter().position(|known| *known == name).and_then(|at| u8::try_from(at + 1).ok());
    named.or_else(|| name.parse().ok())
}

/// Everything on standard input, where that is a pipe, a file or a socket.
async fn piped_stdin() -> Result<Option<Vec<u8>>, Error> {
    if !is_piped(std::io::stdin()) {
        return Ok(None);
    }
    let reading =
        tokio::task::spawn_blocking(|| read_all(std::io::stdin().lock(), STDIN_MAX, "standard input"));
    tokio::select! {
        result = reading => match result {
            Ok(read) => read.map(Some),
            Err(_) => Err(Error::Unexpected { what: "the reader of standard input was lost".into() }),
        },
        _ = tokio::signal::ctrl_c() => Err(Error::Interrupted),
    }
}

fn is_piped(fd: impl AsFd) -> bool {
    let kind = rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::RegularFile | FileType::Socket))
}

/// Reads all there is, up to a cap.
pub(super) fn read_all(reader: impl Read, max: usize, what: &str) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    reader.take(limit).read_to_end(&mut bytes).map_err(|source| Error::Input { source })?;
    if bytes.len() > max {
        let max = format::size(u64::try_from(max).unwrap_or(u64::MAX));
        return Err(Error::Usage {
            message: format!("{what} is more than {max}"),
            hint: Some("bring it in with `nexusctl guest write` first".into()),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(exit_code: Option<i32>, signal: Option<&str>, timed_out: bool) -> RunCommandOutput {
        RunCommandOutput {
            exit_code,
            signal: signal.map(str::to_owned),
            timed_out,
            duration_ms: 1,
            stdout: StreamFacts::default(),
            stderr: StreamFacts::default(),
            ..RunCommandOutput::default()
        }
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(exit_code(&ended(Some(0), None, false)), 0);
        assert_eq!(exit_code(&ended(Some(42), None, false)), 42);
        assert_eq!(exit_code(&ended(None, Some("SIGKILL"), false)), 137);
        assert_eq!(exit_code(&ended(None, Some("SIGTERM"), false)), 143);
        assert_eq!(exit_code(&ended(None, Some("SIG34"), false)), 162);
        assert_eq!(exit_code(&ended(None, Some("SIGNONSENSE"), false)), 255);
        assert_eq!(exit_code(&ended(None, Some("SIGKILL"), true)), 124);
    }

    #[test]
    fn json_holds_text_or_base64() {
        let value = as_json(&ended(Some(0), None, false), b"hello\n", &[0xff, 0x00]);
        assert_eq!(value["stdout"]["text"], "hello\n");
        assert_eq!(value["stderr"]["base64"], "/wA=");
        assert_eq!(value["exit_code"], 0);
    }

    #[test]
    fn input_is_capped() {
        assert_eq!(read_all(&b"abc"[..], 3, "input").unwrap(), b"abc");
        assert_eq!(read_all(&b"abcd"[..], 3, "input").unwrap_err().exit_code(), 2);
    }
}
