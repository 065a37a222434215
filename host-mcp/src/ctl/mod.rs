//! `nexusctl`: an MCP client like any other, for people and scripts. A file per noun.
//!
//! It knows the daemon's socket and the vocabulary, and nothing of the daemon's inside: it never uses `nexus_core`. Results
//! go to stdout, talk to stderr; errors become text and an exit code in one place ([`error`]).

mod args;
mod asset;
mod bridge;
mod build;
mod call;
mod client;
mod completion;
mod connect;
mod drive;
mod each;
mod error;
mod follow;
mod format;
mod guest;
mod hint;
mod image;
mod launch;
mod list;
mod mcp;
mod mcp_config;
mod op;
mod plan;
mod provider;
mod prune;
mod settings;
mod source;
mod system;
mod template;
mod ui;
mod vm;

use std::ffi::OsString;
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
    let uid = rustix::process::geteuid().as_raw();
    run(std::env::args_os(), uid, dirs::environment(uid))
}

/// Runs one command line for a user in an environment.
fn run(args: impl IntoIterator<Item = OsString>, uid: u32, env: Env) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do when even this cannot be printed.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
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
            // A read of a terminal may still be blocked.
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

async fn dispatch(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Vm(command) => vm::run(app, command).await,
        Command::Guest(command) => guest::run(app, command).await,
        Command::Drive(command) => drive::run(app, command).await,
        Command::Image(command) => image::run(app, command).await,
        Command::Template(command) => template::run(app, command).await,
        Command::Build(command) => build::run(app, command).await,
        Command::Asset(command) => asset::run(app, command).await,
        Command::Kernel(verb) => asset::run(app, verb.of(AssetKind::Kernel)).await,
        Command::Rootfs(verb) => asset::run(app, verb.of(AssetKind::Rootfs)).await,
        Command::Firecracker(verb) => asset::run(app, verb.of(AssetKind::Vmm)).await,
        Command::Provider(command) => provider::run(app, command).await,
        Command::Op(command) => op::run(app, command).await,
        Command::Settings(command) => settings::run(app, command).await,
        Command::Prune(args) => prune::run(app, args).await,
        Command::Doctor => system::doctor(app).await,
        Command::Status => system::status(app).await,
        Command::Version => system::version(app).await,
        Command::Call(args) => call::run(app, args).await,
        Command::Mcp(args) => mcp::run(app, args).await,
        Command::Completion(args) => completion::run(app, args),
        Command::Ps(args) => vm::list(app, args).await,
        Command::Rm(args) => vm::delete(app, args).await,
        Command::Exec(args) => guest::exec(app, args).await,
        Command::LaunchDaemon(args) => launch::exec(args),
    }
}

/// What every command is given.
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

    /// Connects to the daemon.
    async fn connect(&self) -> Result<Client, Error> {
        Client::connect(&self.socket()?).await
    }
}
