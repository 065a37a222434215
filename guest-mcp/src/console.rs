//! What the guest has to say to people: lines on stderr, which is the console in a VM.

use std::fmt;
use std::io::Write;

/// Writes one line. A console that is gone is nobody's error.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    let mut text = String::from("nexus-guest: ");
    // Writing into a `String` cannot fail.
    let _ = fmt::write(&mut text, line);
    text.push('\n');
    let _ = std::io::stderr().write_all(text.as_bytes());
}
