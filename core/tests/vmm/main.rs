//! Shims and drivers with real processes.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod firecracker;
mod lifecycle;
mod pauses;
mod qemu;
mod save_faults;
mod saves;
mod support;
