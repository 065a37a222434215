//! Messages of the guest for people: lines on stderr, which is the console in a VM.

use std::error::Error;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use rustix::system::RebootCommand;

/// Writes one line. A missing console is not an error.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    let mut text = String::from("nexus-guest: ");
    // Writing into a `String` cannot fail.
    let _ = fmt::write(&mut text, line);
    text.push('\n');
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Waits until the console has printed everything.
pub(crate) fn flush() {
    // Not every console is a terminal.
    let _ = nix::sys::termios::tcdrain(std::io::stderr());
}

/// Prints why PID 1 cannot continue, and ends the VM.
pub(crate) fn last_words(error: &dyn Error) -> ExitCode {
    say(format_args!("cannot boot: {}", nexus_schema::error::chain(error)));
    flush();
    rustix::fs::sync();
    // If even this fails, the kernel panics when PID 1 returns, which ends the VM too.
    let _ = rustix::system::reboot(RebootCommand::Restart);
    ExitCode::FAILURE
}
