//! `/init` of the initramfs: from a bare kernel to the root drive.
//!
//! ```text
//! mount proc, sys, dev ─> load modules ─> wait for the root drive ─> mount and grow it ─> mount all modules in it
//!   ─> mount /run in it, filled with what the image has there, and /tmp if that is to be in memory
//!   ─> bind this binary to /run/nexus/nexus-guest ─> switch root ─┬─> become PID 1                  (init mode `agent`)
//!                                                                 └─> supervise + the image's init  (init mode `system`)
//! ```
//! Any failure is printed on the console and ends the VM, so that the host sees it at once.

pub(crate) mod drive;
mod fill;
mod image;
mod modules;
mod switch;
mod tree;

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::ExitCode;

use nexus_schema::link::InitMode;

use crate::console;
use crate::init::InitError;
use crate::os::{MountError, mount, read_small};

/// Why starting from the root drive failed.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("{what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the root drive {device} did not appear within {seconds} s{}", without_modules(*.modules))]
    NoDrive { device: String, seconds: u64, modules: usize },
    #[error("mount the root drive {device}")]
    Root {
        device: String,
        #[source]
        source: std::io::Error,
    },
    #[error("switch to the root drive")]
    Switch(#[source] std::io::Error),
    #[error(transparent)]
    Init(#[from] InitError),
    #[error("nexus.init on the kernel's command line is `{word}`, not agent or system")]
    Mode { word: String },
    #[error("the root drive has no init: none of {tried}")]
    NoInit { tried: String },
}

/// Names the likely cause if no modules were loaded.
fn without_modules(modules: usize) -> &'static str {
    match modules {
        0 => {
            ": the kernel was booted without modules, so virtio_mmio, virtio_blk, ext4 and virtio's vsock must be built into it"
        }
        _ => "",
    }
}

/// Boots the system. Returns only after a failure.
pub(crate) fn run() -> ExitCode {
    let Err(error) = boot();
    console::last_words(&error)
}

/// The options on the kernel's command line.
#[derive(Debug, PartialEq, Eq)]
struct Orders {
    device: String,
    init: InitMode,
    /// The UUID of the filesystem with the kernel's modules.
    modules: Option<String>,
    /// Whether /tmp is in memory instead of on the root drive.
    tmp_in_memory: bool,
}

impl Orders {
    fn parse(cmdline: &str) -> Result<Self, BootError> {
        let mut orders =
            Self { device: "/dev/vda".into(), init: InitMode::Agent, modules: None, tmp_in_memory: false };
        for word in cmdline.split_whitespace() {
            if let Some(device) = word.strip_prefix("nexus.root=") {
                orders.device = device.into();
            } else if word == "nexus.tmp=tmpfs" {
                orders.tmp_in_memory = true;
            } else if let Some(uuid) = word.strip_prefix("nexus.modules=") {
                orders.modules = Some(uuid.into());
            } else if let Some(mode) = word.strip_prefix("nexus.init=") {
                orders.init = match mode {
                    "agent" => InitMode::Agent,
                    "system" => InitMode::System,
                    other => return Err(BootError::Mode { word: other.into() }),
                };
            }
        }
        Ok(orders)
    }
}

fn boot() -> Result<Infallible, BootError> {
    mount("devtmpfs", "/dev", "devtmpfs", "mode=755")?;
    mount("proc", "/proc", "proc", "")?;
    mount("sysfs", "/sys", "sysfs", "")?;
    let orders = Orders::parse(&read_small("/proc/cmdline", 16 << 10).unwrap_or_default())?;

    let events = drive::Events::listen();
    let modules = modules::load()?;
    drive::wait_for(&orders.device, &events, modules)?;
    let mut problems = Vec::new();
    drive::mount_root(&orders.device, switch::NEW_ROOT, &mut problems)?;
    if let Some(uuid) = &orders.modules {
        tree::mount(uuid, switch::NEW_ROOT, &events, &mut problems);
    }
    drop(events);
    let root = switch::prepare(&orders, &mut problems)?;
    switch::switch(&root)?;
    switch::start(orders.init)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_come_from_the_command_line() {
        let parse = |line| Orders::parse(line).unwrap();
        let quiet =
            Orders { device: "/dev/vda".into(), init: InitMode::Agent, modules: None, tmp_in_memory: false };
        assert_eq!(parse("quiet\n"), quiet);
        assert_eq!(
            parse(
                "console=ttyS0 nexus.init=system nexus.root=/dev/vdb nexus.modules=u-u nexus.tmp=tmpfs x=1\n"
            ),
            Orders {
                device: "/dev/vdb".into(),
                init: InitMode::System,
                modules: Some("u-u".into()),
                tmp_in_memory: true
            }
        );
        assert!(Orders::parse("nexus.init=other").is_err());
    }
}
