//! `nexusctl`: an MCP client like any other, for people and scripts. One file per noun.
//!
//! It uses only the daemon's socket and the vocabulary, never `nexus_core`. Results go to stdout, messages to stderr;
//! errors become text and an exit code in one place ([`error`]).

mod args;
mod asset;
mod audit;
mod bridge;
mod build;
mod call;
mod checkpoint;
mod client;
mod completion;
mod confirm;
mod connect;
mod cp;
#[cfg(test)]
mod documented;
mod drive;
mod each;
mod error;
mod events;
mod exec;
mod firewall;
mod follow;
mod format;
mod forward;
mod guest;
mod hint;
mod image;
mod image_export;
mod kernel;
mod launch;
mod list;
mod man;
mod mcp;
mod mcp_config;
mod mistakes;
mod moment;
mod network;
mod op;
mod plan;
mod provider;
mod prune;
#[cfg(test)]
mod reference;
mod rows;
mod run;
mod settings;
mod shell;
mod source;
mod steps;
mod stream;
mod system;
mod table;
mod template;
mod token;
mod ui;
mod unread;
mod vm;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use nexus_schema::tools::asset::AssetKind;

use self::args::{Cli, Command};
use self::client::Client;
use self::error::Error;
use self::ui::{Format, Ui};
use crate::dirs::{self, Env};

/// Runs the CLI of this process to its end.
pub fn main() -> ExitCode {
    // Answers a shell's completion request, which ends this process.
    completion::answer();
    let uid = rustix::process::geteuid().as_raw();
    run(std::env::args_os(), uid, dirs::environment(uid))
}

/// Runs one command line for a user in an environment.
fn run(args: impl IntoIterator<Item = OsString>, uid: u32, env: Env) -> ExitCode {
    let words: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(error) => return refuse(error, &words, &env),
    };
    let format = match (cli.json, cli.quiet) {
        (true, _) => Format::Json,
        (false, true) => Format::Quiet,
        (false, false) => Format::Human,
    };
    let ui = Ui::of_process(format, &env);
    let app = App { ui, uid, env, socket: cli.socket };
    let result = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let result = runtime.block_on(dispatch(&app, cli.command));
            // A read from a terminal may still be blocked.
            runtime.shutdown_background();
            result
        }
        Err(source) => Err(Error::Launch { what: "make a runtime".into(), hint: None, source: Some(source) }),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            app.ui.fail(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints what is wrong with a command line, or the requested help.
fn refuse(error: clap::Error, words: &[OsString], env: &Env) -> ExitCode {
    let code = ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    if !error.use_stderr() {
        // If this fails, nothing is left to do.
        drop(error.print());
        return code;
    }
    let error = mistakes::explain(error, words);
    match mistakes::asks_for_json(words) {
        true => Ui::of_process(Format::Json, env).fail(&mistakes::to_error(&error)),
        false => drop(error.print()),
    }
    code
}

async fn dispatch(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Vm(command) => vm::run(app, command).await,
        Command::Guest(command) => guest::run(app, command).await,
        Command::Checkpoint(command) => checkpoint::run(app, command).await,
        Command::Drive(command) => drive::run(app, command).await,
        Command::Image(command) => image::run(app, command).await,
        Command::Template(command) => template::run(app, command).await,
        Command::Build(command) => build::run(app, command).await,
        Command::Asset(command) => asset::run(app, command).await,
        Command::Kernel(command) => kernel::run(app, command).await,
        Command::Rootfs(verb) => asset::run(app, verb.of(AssetKind::Rootfs)).await,
        Command::Firecracker(verb) => asset::run(app, verb.of(AssetKind::Vmm)).await,
        Command::Provider(command) => provider::run(app, command).await,
        Command::Network(command) => network::run(app, command).await,
        Command::SetupFirewall(args) => firewall::run(app, args).await,
        Command::Op(command) => op::run(app, command).await,
        Command::Settings(command) => settings::run(app, command).await,
        Command::Prune(args) => prune::run(app, args).await,
        Command::Token(command) => token::run(app, command).await,
        Command::Audit(args) => audit::run(app, args).await,
        Command::Events(args) => events::run(app, args).await,
        Command::Doctor => system::doctor(app).await,
        Command::Status => system::status(app).await,
        Command::Version => system::version(app).await,
        Command::Call(args) => call::run(app, args).await,
        Command::Mcp(args) => mcp::run(app, args).await,
        Command::Completion(args) => completion::run(app, args),
        Command::Man(args) => man::run(args),
        Command::Run(args) => run::run(app, *args).await,
        Command::Exec(args) => exec::run(app, *args).await,
        Command::Shell(args) => shell::run(app, args).await,
        Command::Forward(args) => forward::run(app, args).await,
        Command::Cp(args) => cp::run(app, args).await,
        Command::Ps(args) => vm::ps(app, args).await,
        Command::Ls(args) => vm::list(app, args).await,
        Command::Start(args) => vm::start(app, args).await,
        Command::Pause(args) => vm::pause(app, args).await,
        Command::Resume(args) => vm::resume(app, args).await,
        Command::Stop(args) => vm::stop(app, args).await,
        Command::Restart(args) => vm::restart(app, args).await,
        Command::Wait(args) => vm::wait(app, args).await,
        Command::Kill(args) => vm::kill(app, args).await,
        Command::Rm(args) => vm::delete(app, args).await,
        Command::Rename(args) => vm::rename(app, args).await,
        Command::Logs(args) => vm::logs(app, args).await,
        Command::Stats(args) => vm::stats(app, args).await,
        Command::Images(paging) => image::list(app, paging).await,
        Command::Pull(args) => image::pull(app, args).await,
        Command::LaunchDaemon(args) => launch::exec(args),
    }
}

/// The context of every command.
struct App {
    ui: Ui,
    uid: u32,
    env: Env,
    socket: Option<PathBuf>,
}

impl App {
    /// The daemon's socket.
    fn socket(&self) -> Result<PathBuf, Error> {
        match &self.socket {
            Some(socket) => Ok(socket.clone()),
            None => Ok(dirs::socket(self.uid, &self.env)?),
        }
    }

    /// The access token to use instead of this user's rights, if one is set.
    fn token(&self) -> Result<Option<&str>, Error> {
        let token = self.env.get(OsStr::new(dirs::TOKEN)).filter(|token| !token.is_empty());
        let is_plain = |token: &&str| token.bytes().all(|byte| byte.is_ascii_graphic());
        match token.map(|token| token.to_str().filter(is_plain)) {
            Some(None) => Err(Error::usage("NEXUS_TOKEN is not a token")),
            Some(Some(token)) => Ok(Some(token)),
            None => Ok(None),
        }
    }

    /// Connects to the daemon. If none is running, asks at the terminal whether to start one.
    async fn connect(&self) -> Result<Client, Error> {
        match Client::connect(&self.socket()?, self.token()?).await {
            Err(error @ Error::DaemonDown { .. }) => {
                if !launch::offer(self, &error).await? {
                    return Err(error);
                }
                Client::connect(&self.socket()?, self.token()?).await
            }
            connected => connected,
        }
    }

    /// The same without asking.
    async fn connect_if_up(&self) -> Result<Client, Error> {
        Client::connect(&self.socket()?, self.token()?).await
    }
}
