//! `nexusctl vm console`: follows a VM's serial console.

use nexus_schema::Reference;
use nexus_schema::id::VmKind;

use super::logs;
use crate::ctl::App;
use crate::ctl::error::Error;

/// Whose console, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Unfiltered, with escape sequences, which can control your terminal
    #[arg(long)]
    raw: bool,
    /// The VM: its name or id
    vm: Reference<VmKind>,
}

/// Follows a console.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    logs::run(app, logs::Args::following(args.vm, args.raw)).await
}
