//! Describes the machine that runs the measurements.

use std::fs;
use std::process::Command;

/// One paragraph: processors, memory, kernel, QEMU, and the load.
pub(crate) fn describe() -> String {
    let processor = line_after("/proc/cpuinfo", "model name");
    let memory: u64 = line_after("/proc/meminfo", "MemTotal")
        .split_whitespace()
        .next()
        .and_then(|kib| kib.parse().ok())
        .unwrap_or(0);
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    let qemu = qemu.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let qemu = qemu.lines().next().unwrap_or("no QEMU").replace("emulator version ", "");
    format!(
        "{count} x {processor}, {} GiB, Linux {}, {qemu}; load {load} at the start",
        memory >> 20,
        release.trim()
    )
}

fn line_after(file: &str, key: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'));
    found.unwrap_or("?").trim().to_owned()
}
