//! Processors that do not fall asleep while something short is measured.

use std::fs::File;
use std::io::Write;

/// Where a process asks for processors that are there at once; as long as it keeps the file open.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Keeps the processors awake while it lives.
///
/// A virtual processor that falls asleep leaves it to its host when it wakes: tens of microseconds, for each of the four times
/// that a call through the daemon wakes somebody. That says something about the host, not about the program.
pub(crate) struct Awake(#[expect(dead_code, reason = "what counts is that it is open")] File);

impl Awake {
    /// `None` where the system does not let this user ask for it.
    pub(crate) fn keep() -> Option<Self> {
        let mut file = File::options().write(true).open(LATENCY).ok()?;
        file.write_all(&0_i32.to_ne_bytes()).ok()?;
        Some(Self(file))
    }
}
