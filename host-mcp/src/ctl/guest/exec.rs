//! `nexusctl guest run`: runs a command in a VM, with its exact output and its exit code.

pub(super) mod output;
mod stdin;

use clap::Args;
use data_encoding::BASE64;
use nexus_schema::id::VmKind;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::RunCommandParams;
use nexus_schema::{ErrorCode, Reference, ToolError};

use self::output::Output;
use super::live;
use crate::ctl::args::pair;
use crate::ctl::client::Client;
use crate::ctl::error::{Error, Refusal};
use crate::ctl::{App, format, moment};

/// The exit code if a program cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The exit code if a program does not exist.
const NOT_FOUND: u8 = 127;

/// What to run where.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A line for the VM's shell, instead of a program with arguments
    #[arg(short = 'c', long = "command", value_name = "LINE", conflicts_with = "argv")]
    line: Option<String>,
    /// Take a checkpoint first, kept for an hour: `vm rollback` undoes the command then
    #[arg(long)]
    checkpoint: bool,
    #[command(flatten)]
    how: How,
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "line")]
    argv: Vec<String>,
}

/// How to run it.
#[derive(Debug, Args)]
pub(crate) struct How {
    /// The directory to run in [default: the image's, else the user's home]
    #[arg(short = 'C', long, aliases = ["workdir", "chdir"], value_name = "DIR")]
    cwd: Option<String>,
    /// An environment variable
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// The user to run as: a name or a number [default: root]
    #[arg(short, long)]
    user: Option<String>,
    /// Kill the command after this long, such as 30s or 5m, with exit code 124; a bare number is seconds, 0 is never
    #[arg(short, long, value_name = "TIME", default_value_t = 3600, value_parser = moment::seconds)]
    timeout: u32,
    /// Forward standard input. Without it the command gets no input, unless a file is redirected (`< FILE`); pipes and
    /// terminals are not read
    #[arg(short = 'i', long = "stdin", alias = "interactive", conflicts_with = "no_stdin")]
    stdin: bool,
    /// Do not forward a redirected file
    #[arg(short, long)]
    no_stdin: bool,
    /// Whether a checkpoint is taken first.
    #[arg(skip)]
    checkpoint: bool,
}

impl How {
    /// Used by other verbs.
    pub(crate) fn new(
        cwd: Option<String>,
        env: Vec<(String, String)>,
        user: Option<String>,
        timeout: u32,
        stdin: bool,
        no_stdin: bool,
    ) -> Self {
        Self { cwd, env, user, timeout, stdin, no_stdin, checkpoint: false }
    }

    /// The same, with another default user.
    pub(crate) fn or_user(self, user: Option<String>) -> Self {
        Self { user: self.user.or(user), ..self }
    }
}

/// What to run: a line for the shell, or a program with its arguments.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    Line(String),
    Argv(Vec<String>),
}

/// Runs a command in a VM; its exit code is that of the command.
pub(crate) async fn exec(app: &App, args: RunArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let program = match args.line {
        Some(line) => Program::Line(line),
        None => Program::Argv(args.argv),
    };
    let how = How { checkpoint: args.checkpoint, ..args.how };
    run(app, &mut client, &args.vm.to_string(), program, how).await
}

/// Runs a program in a VM.
pub(crate) async fn run(
    app: &App,
    client: &mut Client,
    vm: &str,
    program: Program,
    how: How,
) -> Result<u8, Error> {
    let stdin = stdin::read(how.stdin, how.no_stdin).await?;
    let mut output = Output::new(app, vm.to_owned(), how.timeout);
    let (command, argv) = match program.clone() {
        Program::Line(line) => (Some(line), None),
        Program::Argv(argv) => (None, Some(argv)),
    };
    let params = RunCommandParams {
        command,
        argv,
        cwd: how.cwd,
        env: how.env.into_iter().collect(),
        user: how.user,
        stdin: stdin.as_deref().map(|bytes| BASE64.encode(bytes)),
        stdin_encoding: stdin.is_some().then_some(ContentEncoding::Base64),
        timeout_s: Some(how.timeout.into()),
        checkpoint: how.checkpoint,
        ..RunCommandParams::default()
    };
    let taken = |name: &str| {
        let name = format::tame(name);
        app.ui.say(&format!(
            "checkpoint {name} taken; undo the command with `nexusctl vm rollback {vm} {name}`"
        ));
    };
    match live::run(client, vm, params, taken, |stream, bytes| output.piece(stream, bytes)).await {
        Ok(facts) => output.end(&facts),
        Err(error) => {
            let Some(code) = not_started(&error) else { return Err(error) };
            app.ui.fail(&with_shell_hint(error, &program, vm));
            Ok(code)
        }
    }
}

/// The error for a guest whose result is not what was requested.
pub(super) fn not_asked_for(what: &str) -> Error {
    ToolError::new(ErrorCode::GuestMisbehaved, what).into()
}

/// The exit code of a shell for a program that did not start.
pub(crate) fn not_started(error: &Error) -> Option<u8> {
    match error {
        Error::Guest(refusal) => match refusal.error.code {
            ErrorCode::ProgramNotFound => Some(NOT_FOUND),
            ErrorCode::ProgramNotExecutable => Some(NOT_EXECUTABLE),
            _ => None,
        },
        _ => None,
    }
}

/// Adds a hint: a whole line in a single argument is probably meant for the shell.
pub(crate) fn with_shell_hint(error: Error, program: &Program, vm: &str) -> Error {
    match (error, program) {
        (Error::Guest(refusal), Program::Argv(argv)) if argv.len() == 1 && argv[0].contains(' ') => {
            let line = argv[0].replace('\'', r"'\''");
            let hint = format!(
                "this is a single argument; for a shell line use `nexusctl guest run {vm} -c '{line}'`"
            );
            Error::Guest(Refusal { error: refusal.error.hint(hint), ..refusal })
        }
        (error, _) => error,
    }
}
