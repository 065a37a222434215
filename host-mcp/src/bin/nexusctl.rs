//! The admin CLI and stdio bridge of Nexus.

use std::process::ExitCode;

fn main() -> ExitCode {
    nexus_host::ctl::main()
}
