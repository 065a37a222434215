//! What the daemon is told about its place on the host. Reading files and the environment is the binary's job.

use std::path::PathBuf;

/// The configuration of one [`crate::Nexus`].
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything lasting is kept.
    pub state_dir: PathBuf,
    /// The guest binary, as built for the guest's target.
    pub agent: &'static [u8],
    /// The daemon's own binary, from which shims are started.
    pub shim_binary: PathBuf,
    /// The driver of VMs that ask for `auto`.
    pub driver: DriverSetting,
    /// The root of the host's apt configuration: `/`, or a directory laid out like it (for tests).
    pub apt_root: PathBuf,
    /// Path of `qemu-system-x86_64`, if not the one in `PATH`.
    pub qemu: Option<PathBuf>,
    /// Path of `firecracker`, if not the one in `PATH`.
    pub firecracker: Option<PathBuf>,
    /// How long a guest may take to say hello under KVM, in seconds.
    pub boot_timeout_s: u32,
    /// How long a guest may take to say hello under software emulation, in seconds.
    pub boot_timeout_tcg_s: u32,
    /// How long a guest may take to shut down by itself, in seconds.
    pub stop_timeout_s: u32,
}

/// Which driver runs VMs that ask for `auto`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DriverSetting {
    /// Firecracker where hardware KVM works and it is installed, else QEMU.
    #[default]
    Auto,
    /// Always QEMU.
    Qemu,
    /// Always Firecracker.
    Firecracker,
    /// No VM at all: the given guest binary as an ordinary process of this host, with this user's rights. For tests and
    /// benchmarks of everything around the VM only.
    Process {
        /// Path of a `nexus-guest` that runs on the host.
        guest: PathBuf,
    },
}
