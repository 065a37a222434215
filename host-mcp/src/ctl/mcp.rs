//! `nexusctl mcp`: the stdio bridge, and ready-made configuration for clients.

use clap::Subcommand;
use nexus_schema::Reference;
use nexus_schema::id::VmKind;
use nexus_schema::toolset::{Toolset, UnknownToolset};

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
    #[arg(long, value_name = "SET", value_parser = tools_word)]
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

/// The set of tools that a program in a VM offers by itself.
const OWN: &str = "own";

/// A set of tools, or `own`.
fn tools_word(word: &str) -> Result<String, UnknownToolset> {
    if word == OWN { Ok(word.to_owned()) } else { word.parse::<Toolset>().map(|set| set.to_string()) }
}

/// Runs the bridge until its client disconnects, or prints configuration.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    match args.command {
        Some(Command::Config(args)) => mcp_config::run(app, args).await,
        Some(Command::Install(args)) => mcp_config::install(app, args).await,
        None => {
            let (vm, tools) = (args.vm.map(|vm| vm.to_string()), args.tools);
            match (&vm, tools.as_deref()) {
                (Some(_), Some(set)) if set != OWN => {
                    return Err(Error::usage(
                        "with --vm the only set of tools is `own`; leave --tools out for the guest tools",
                    ));
                }
                (None, Some(OWN)) => {
                    return Err(Error::usage("the tools `own` are those of one VM: add --vm VM"));
                }
                _ => {}
            }
            bridge::run(app, vm, tools, !args.no_start).await
        }
    }
}
