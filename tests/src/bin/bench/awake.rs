//! Keeps processors awake while something short is measured.

use std::fs::File;
use std::io::Write;

/// While this file is open, the processors respond at once.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Keeps the processors awake until it is dropped.
///
/// When a virtual processor wakes from sleep, its host is involved: tens of microseconds for each of the four wake-ups of a
/// call through the daemon. That measures the host, not the program.
pub(crate) struct Awake(#[expect(dead_code, reason = "what counts is that it is open")] File);

impl Awake {
    /// `None` if the system does not allow it for this user.
    pub(crate) fn keep() -> Option<Self> {
        let mut file = File::options().write(true).open(LATENCY).ok()?;
        file.write_all(&0_i32.to_ne_bytes()).ok()?;
        Some(Self(file))
    }
}
