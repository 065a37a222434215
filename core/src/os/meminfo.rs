//! How much memory the host has, and how much of it is available.

use std::io;

/// What `/proc/meminfo` says, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    /// What programs can get without swapping, as the kernel estimates it.
    pub(crate) available: u64,
}

/// Reads it.
pub(crate) fn read() -> io::Result<Memory> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    parse(&text).ok_or_else(|| io::Error::other("/proc/meminfo lacks MemTotal or MemAvailable"))
}

fn parse(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(Memory { total: field("MemTotal")?, available: field("MemAvailable")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        let text = "MemTotal:       16384 kB\nMemFree:            1 kB\nMemAvailable:    4096 kB\n";
        assert_eq!(parse(text), Some(Memory { total: 16 << 20, available: 4 << 20 }));
        assert_eq!(parse("MemTotal: 1 kB\n"), None);
        let here = read().unwrap();
        assert!(here.available > 0 && here.available <= here.total);
    }
}
