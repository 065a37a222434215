//! `nexus-guest`: the program that runs in every VM. One static binary with several roles:
//!
//! ```text
//! initramfs ──> init (PID 1) ──> agent          init mode `agent`
//!           └─> the image's init + supervise ──> agent          init mode `system`
//!                                             agent ──> hold: the commands, which outlive the agent
//! nexus-guest --unix DIR                         the agent alone, as an ordinary process
//! poweroff, reboot, halt, shutdown               ask PID 1
//! ```

mod agent;
mod commands;
mod console;
mod ext4;
mod holder;
mod identity;
mod init;
mod initramfs;
mod memory;
mod os;
mod places;
mod proxy;
mod role;
mod runtime;
mod sys;
mod system;
mod tools;
mod tree;

use std::process::ExitCode;

fn main() -> ExitCode {
    match role::Role::of_process() {
        Ok(role) => role.run(),
        Err(usage) => {
            console::say(format_args!("{usage}"));
            ExitCode::from(2)
        }
    }
}
