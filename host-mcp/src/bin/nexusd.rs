//! The daemon of Nexus.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use nexus_core::host::failpoint;
use nexus_host::settings::{Flags, Settings};
use nexus_host::{daemon, dirs, log, man};

/// Gives AI agents microVMs of their own, as an MCP server.
#[derive(Debug, Parser)]
#[command(name = "nexusd", version, args_conflicts_with_subcommands = false)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// A configuration file, read after the system's and the user's.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where everything lasting is kept.
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<String>,
    /// Where the daemon's socket is.
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<String>,
    /// Serve HTTP on this loopback address too, such as 127.0.0.1:9600; `off` disables it.
    #[arg(long, global = true, value_name = "ADDR")]
    http: Option<String>,
    /// The driver of VMs that ask for none: auto, qemu, firecracker; process (with --guest) runs no VM, for tests.
    #[arg(long, global = true, value_name = "DRIVER")]
    driver: Option<String>,
    /// The nexus-guest of the process driver.
    #[arg(long, global = true, value_name = "FILE")]
    guest: Option<String>,
    /// What is logged to stderr, such as debug or info,nexus_core=debug.
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// Serve the client on stdin and stdout too, or bridge it to a running daemon.
    #[arg(long)]
    stdio: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon (the default).
    Run,
    /// Say what this host can run, and what it lacks.
    Doctor {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write the manual page of nexusd into a directory, for packages.
    #[command(hide = true)]
    Man {
        /// The directory, made if it is missing.
        directory: PathBuf,
    },
    /// Be the parent of one VM's VMM (started by the daemon).
    #[command(hide = true)]
    VmShim {
        /// The VM's directory.
        directory: PathBuf,
    },
}

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    match cli.command.take() {
        Some(Command::VmShim { directory }) => daemon::shim(&directory),
        Some(Command::Man { directory }) => {
            match man::write(Cli::command(), man::ADMINISTRATORS, &directory) {
                Ok(()) => ExitCode::SUCCESS,
                Err(source) => {
                    let directory = directory.display().to_string();
                    daemon::complain(&daemon::DaemonError::Directory { directory, source }, 1)
                }
            }
        }
        Some(Command::Doctor { json }) => {
            with_settings(cli, |settings, _| Ok(daemon::doctor(&settings, json)))
        }
        Some(Command::Run) | None => with_settings(cli, daemon::run),
    }
}

fn with_settings(
    cli: Cli,
    run: impl FnOnce(Settings, bool) -> Result<ExitCode, daemon::DaemonError>,
) -> ExitCode {
    let stdio = cli.stdio;
    let flags = [
        ("state_dir", cli.state_dir),
        ("runtime_dir", cli.runtime_dir),
        ("http", cli.http),
        ("driver", cli.driver),
        ("guest", cli.guest),
        ("log", cli.log),
    ];
    let flags: Flags = flags.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let uid = rustix::process::getuid().as_raw();
    let env = dirs::environment(uid);
    let settings = match Settings::load(uid, &env, cli.config, &flags) {
        Ok(settings) => settings,
        Err(error) => return daemon::complain(&error, 2),
    };
    log::start(&settings.log);
    // For tests of crashes; release builds have no failpoints.
    if let Some(point) = env.get(OsStr::new("NEXUS_FAILPOINT")).and_then(|point| point.to_str()) {
        failpoint::arm(point);
    }
    let code = run(settings, stdio).unwrap_or_else(|error| daemon::complain(&error, 1));
    log::flush();
    code
}
