//! `nexusctl mcp`: the stdio bridge, and ready-made configuration for clients.

use clap::Subcommand;
use nexus_schema::Reference;
use nexus_schema::id::VmKind;

use super::error::Error;
use super::{App, bridge, mcp_config};

/// The bridge's options, or `config`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// One VM only: its guest tools, without a `vm` argument
    #[arg(long, value_name = "VM")]
    vm: Option<Reference<VmKind>>,
    /// The tools to offer: work, images, drives, admin, all, read-only, or several separated by commas [default: work, or `tools` of
    /// nexus.toml]; with --vm only `own`: what a program in the VM offers by itself
    #[arg(long, value_name = "SET")]
    tools: Option<String>,
    /// Do not start the daemon if it is not running
    #[arg(long)]
    no_start: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print ready-made configuration for an MCP client
    Config(mcp_config::Args),
    /// Write it into the client's own file (or remove it again); the file before is kept as FILE.bak
    Install(mcp_config::InstallArgs),
}

/// Runs the bridge until its client disconnects, or prints configuration.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    match args.command {
        Some(Command::Config(args)) => mcp_config::run(app, args),
        Some(Command::Install(args)) => mcp_config::install(app, args),
        None => bridge::run(app, args.vm.map(|vm| vm.to_string()), args.tools, !args.no_start).await,
    }
}
