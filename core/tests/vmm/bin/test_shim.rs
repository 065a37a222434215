//! What `nexusd vm-shim DIR` does, without the daemon around it.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [word, directory] if word == "vm-shim" => nexus_core::shim_main(directory.as_ref()),
        _ => ExitCode::from(2),
    }
}
