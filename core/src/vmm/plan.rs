//! The launch plan: everything that a shim needs to know, as `plan.json` in the VM's directory.

use std::path::PathBuf;

use nexus_schema::id::{BootId, VmId};
use nexus_schema::network::Bandwidth;
use nexus_schema::{Arch, ByteSize, DriverKind, Name};
use serde::{Deserialize, Serialize};

/// How the guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// By the hardware.
    Kvm,
    /// By software emulation (QEMU's TCG).
    Tcg,
}

impl Accel {
    /// Returns its name on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What carries the connections between host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// A vsock device. QEMU cannot save its state.
    #[default]
    Vsock,
    /// The ports of a virtio-serial device, for VMs that can be checkpointed. Their memory is in a file that the shim holds.
    Serial,
}

impl Link {
    fn is_vsock(&self) -> bool {
        *self == Self::Vsock
    }
}

/// One boot of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchPlan {
    /// The VM's id.
    pub vm: VmId,
    /// The VM's name, for process titles and logs.
    pub name: Name,
    /// This boot.
    pub boot_id: BootId,
    /// The VMM.
    pub driver: DriverKind,
    /// The VMM's binary (for [`DriverKind::Process`]: the guest's).
    pub binary: PathBuf,
    /// The VM's architecture. VMs of another one than the host's are emulated.
    #[serde(default, skip_serializing_if = "Arch::is_host")]
    pub arch: Arch,
    /// How instructions are executed.
    pub accel: Accel,
    /// The VM's directory, absolute. It is the working directory of shim and VMM, and holds all their files.
    pub directory: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, whole mebibytes.
    pub memory: ByteSize,
    /// The kernel, uncompressed: an ELF file, or an image of arm64.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Words of the kernel's command line in addition to the driver's own.
    pub cmdline: Vec<String>,
    /// Drives in the order of their devices; the root drive comes first.
    pub drives: Vec<PlanDrive>,
    /// The vsock context id, 3 or more.
    pub cid: u32,
    /// What carries the connections between host and guest.
    #[serde(default, skip_serializing_if = "Link::is_vsock")]
    pub link: Link,
    /// Its network interface, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<PlanInterface>,
    /// Whether the VMM runs in a jail if the daemon is root's.
    #[serde(default = "jailed")]
    pub jail: bool,
    /// Size at which the console's file is rotated. One rotated file is kept.
    pub console_bytes: ByteSize,
    /// The saved guest that goes on, instead of a boot of the kernel. Size, drives and interface of the plan must be as when it was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restore>,
}

/// A saved guest to go on with. The caller has verified the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// The file with the state of its devices and processors. Only the shim reads it.
    pub state: PathBuf,
    /// The file with its memory. Only the shim reads it.
    pub ram: PathBuf,
    /// How its memory was saved.
    pub kind: SavedKind,
    /// What the guest's agent has to repeat, so that it is known to be this guest after this restore.
    pub nonce: String,
}

/// How a guest's memory was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavedKind {
    /// From the memory file that VMM and shim share.
    Shared,
    /// From the VMM's private pages over another guest's memory file. No driver saves or restores these.
    Private,
}

fn jailed() -> bool {
    true
}

/// One drive of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanDrive {
    /// A short name, `[a-z0-9]+`.
    pub id: String,
    /// The raw image file.
    pub path: PathBuf,
    /// Whether it is read-only for the guest.
    pub read_only: bool,
}

/// The network interface of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanInterface {
    /// The TAP device of the host that it is connected to; the VM's user owns it.
    pub tap: String,
    /// Its hardware address in the guest.
    pub mac: String,
    /// The directory of the `nexus-net` that hands the device over; without one it is in the host's network namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Its limits, for VMMs that hold traffic to them themselves; `nexus-net` does so in any case.
    #[serde(default, skip_serializing_if = "Bandwidth::is_empty")]
    pub bandwidth: Bandwidth,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns an interface for the plan.
    pub(crate) fn interface() -> PlanInterface {
        let bandwidth = Bandwidth::default();
        PlanInterface { tap: "nx3".into(), mac: "02:4e:58:00:00:01".into(), from: None, bandwidth }
    }

    /// Returns a plan to vary in tests.
    pub(crate) fn plan() -> LaunchPlan {
        LaunchPlan {
            vm: VmId::from_i64(1).unwrap(),
            name: "web-1".parse().unwrap(),
            boot_id: BootId::from_i64(2).unwrap(),
            driver: DriverKind::Qemu,
            binary: "/usr/bin/qemu-system-x86_64".into(),
            arch: Arch::X86_64,
            accel: Accel::Tcg,
            directory: "/var/lib/nexus/vms/aaaaaaaaaaaac".into(),
            vcpus: 1,
            memory: ByteSize::mib(512),
            kernel: "/var/lib/nexus/assets/k/vmlinux".into(),
            initramfs: "/var/lib/nexus/cache/initramfs-1".into(),
            cmdline: vec!["nexus.init=agent".into(), "nexus.root=/dev/vda".into()],
            drives: vec![PlanDrive {
                id: "root".into(),
                path: "/var/lib/nexus/drives/d/disk.ext4".into(),
                read_only: false,
            }],
            cid: 3,
            link: Link::Vsock,
            interface: None,
            jail: true,
            console_bytes: ByteSize::mib(1),
            restore: None,
        }
    }
}
