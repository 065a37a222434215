//! `nexusctl man`: its manual pages, for packages.

use std::path::PathBuf;

use clap::CommandFactory;

use super::args::Cli;
use super::error::Error;
use crate::man;

/// Where to.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory, made if it is missing
    directory: PathBuf,
}

/// Writes a page for each command.
pub(crate) fn run(args: Args) -> Result<u8, Error> {
    man::write(Cli::command(), man::USERS, &args.directory).map_err(|source| Error::File {
        what: "write manual pages to",
        path: args.directory,
        source,
    })?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        run(Args { directory: directory.path().into() }).unwrap();
        for name in ["nexusctl.1", "nexusctl-vm-create.1", "nexusctl-exec.1", "nexusctl-mcp-config.1"] {
            assert!(directory.path().join(name).is_file(), "{name}");
        }
        assert!(!directory.path().join("nexusctl-launch-daemon.1").exists());
    }
}
