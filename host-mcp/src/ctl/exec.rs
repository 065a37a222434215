//! `nexusctl exec`: runs a command in a VM, like `docker exec`: on request with a terminal, byte for byte, without a size limit.

use std::ffi::OsStr;

use nexus_schema::id::VmKind;
use nexus_schema::stream::{Ended, ExecOpening, Open};
use nexus_schema::tools::command::{CommandStart, CommandStartParams, RunCommandOutput};
use nexus_schema::{Reference, Tool};

use super::client::Options;
use super::error::Error;
use super::guest::{How, Program, not_started, run_program, with_shell_hint};
use super::stream::{self, Attached, DetachKeys, Outcome, detach_keys, is_fresh_file};
use super::{App, moment};

/// The exit code of a command that timed out.
const TIMED_OUT: u8 = 124;

/// What to run where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Forward standard input. Without it the command gets no input, unless a file is redirected (`< FILE`)
    #[arg(short, long, alias = "stdin")]
    interactive: bool,
    /// Allocate a terminal
    #[arg(short, long)]
    tty: bool,
    /// The user to run as: a name or a number [default: root]
    #[arg(short, long)]
    user: Option<String>,
    /// The directory to run in [default: the image's, else the user's home]
    #[arg(short = 'w', long, visible_aliases = ["cwd", "chdir"], short_alias = 'C', value_name = "DIR")]
    workdir: Option<String>,
    /// An environment variable; without a value, the local one
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = variable)]
    env: Vec<(String, Option<String>)>,
    /// Start it in the background and print its id
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// The keys that detach from a command with a terminal, which keeps running
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = detach_keys)]
    detach_keys: DetachKeys,
    /// Kill the command after this long, such as 30s or 5m, with exit code 124; a bare number is seconds, 0 is never
    #[arg(long, value_name = "TIME", default_value_t = 0, value_parser = moment::seconds)]
    timeout: u32,
    /// Do not forward a redirected file
    #[arg(short, long, conflicts_with = "interactive")]
    no_stdin: bool,
    /// A line for the VM's shell, instead of a program with arguments
    #[arg(short = 'c', long = "command", value_name = "LINE", conflicts_with = "argv")]
    line: Option<String>,
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "line")]
    argv: Vec<String>,
}

/// Parses `KEY` or `KEY=VALUE`.
pub(crate) fn variable(text: &str) -> Result<(String, Option<String>), String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    if key.is_empty() { Err(format!("`{text}` is not KEY or KEY=VALUE")) } else { Ok((key.into(), value)) }
}

/// The variables with their values; those that are not set locally are left out.
pub(crate) fn variables(app: &App, env: Vec<(String, Option<String>)>) -> Vec<(String, String)> {
    let value = |key: &str| Some(app.env.get(OsStr::new(key))?.to_str()?.to_owned());
    env.into_iter().filter_map(|(key, given)| Some((key.clone(), given.or_else(|| value(&key))?))).collect()
}

impl Args {
    #[cfg(test)]
    pub(crate) fn argv(&self) -> &[String] {
        &self.argv
    }
}

/// Runs a command in a VM; its exit code is that of the command.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let vm = args.vm.to_string();
    let program = match args.line {
        Some(line) => Program::Line(line),
        None => Program::Argv(args.argv),
    };
    let env = variables(app, args.env);
    let mut client = app.connect().await?;
    if app.ui.is_json() && !args.detach {
        if args.tty {
            return Err(Error::usage("--json does not work with a terminal: omit --tty or --json"));
        }
        let how = How::new(args.workdir, env, args.user, args.timeout, args.interactive, args.no_stdin);
        return run_program(app, &mut client, &vm, program, how).await;
    }
    if args.tty && args.interactive && !stream::is_terminal() {
        return Err(Error::Usage {
            message: "standard input and output are not a terminal".into(),
            hint: Some("omit -t".into()),
        });
    }
    let input = args.interactive || (!args.no_stdin && !args.tty && is_fresh_file(std::io::stdin()));
    let (command, argv) = match program.clone() {
        Program::Line(line) => (Some(line), None),
        Program::Argv(argv) => (None, Some(argv)),
    };
    let size = stream::size().filter(|_| args.tty);
    let start = CommandStartParams {
        command,
        argv,
        cwd: args.workdir,
        env: env.into_iter().collect(),
        user: args.user,
        tty: args.tty,
        cols: size.map(|(cols, _)| cols),
        rows: size.map(|(_, rows)| rows),
        stdin_open: input && !args.tty,
        timeout_s: Some(args.timeout.into()),
        ..CommandStartParams::default()
    };
    let shown = |error: Error| match not_started(&error) {
        Some(code) => {
            app.ui.fail(&with_shell_hint(error, &program, &vm));
            Ok(code)
        }
        None => Err(error),
    };
    if args.detach {
        return match client.call_guest::<CommandStart>(&vm, &start, Options::default()).await {
            Ok(reply) => {
                let facts: RunCommandOutput = reply.facts(CommandStart::NAME, CommandStart::SHAPE)?;
                let id = facts.command_id.map(|id| id.to_string()).unwrap_or_default();
                app.ui.line(&id).map(|()| 0)
            }
            Err(error) => shown(error),
        };
    }
    let open = Open::Exec(Box::new(ExecOpening { start, login_shell: false }));
    let stream = match stream::open(app, &mut client, &args.vm, open).await {
        Ok(stream) => stream,
        Err(error) => return shown(error),
    };
    // The stream no longer needs it.
    drop(client);
    let attached = Attached { app, vm, stream, input, tty: args.tty, keys: args.detach_keys };
    let vm = attached.vm.clone();
    Ok(code(app, &vm, attached.run().await?, args.timeout))
}

/// Reports how it ended if that needs words, and returns the exit code.
pub(crate) fn code(app: &App, vm: &str, outcome: Outcome, timeout_s: u32) -> u8 {
    match outcome {
        Outcome::Ended(Ended { timed_out: true, .. }) => {
            app.ui.warn(&format!("the command was killed after {timeout_s} s"));
            TIMED_OUT
        }
        Outcome::Ended(ended) => ended.status.unwrap_or(u8::MAX),
        Outcome::Detached { command, is_taken_over } => {
            let who = if is_taken_over { "another client took over; " } else { "" };
            let id = command.map(|id| id.to_string()).unwrap_or_default();
            app.ui.say(&format!("\n{who}the command keeps running: `nexusctl shell {vm} --attach {id}`"));
            0
        }
    }
}
