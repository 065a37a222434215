//! The restrictions of tools that read what a guest wrote, and of VMMs.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sched::CloneFlags;
use rustix::process::Resource;

use super::{Access, CapabilitySet, Confinement, Files, NOBODY, Syscalls};
use crate::os::paths::{KVM, LIBRARIES, PLAIN_DEVICES, PROCESSES, QEMU_FILES};

/// The memory limit of a filesystem tool, in bytes: `e2fsck` of a terabyte with a million files needs a tenth of it.
const TOOL_MEMORY: u64 = 4 << 30;
/// How many files a filesystem tool may have open.
const TOOL_FILES: u64 = 64;
/// How many files a VMM may have open.
const VMM_FILES: u64 = 4096;

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The restrictions of a program for the disk `disk`, which is `length` bytes long. Its CPU time is limited to `timeout`. It
/// may open that file with [`Access::Read`] or [`Access::Write`], and the host's libraries, but no network and no other
/// process. If this process is root, the program runs as [`NOBODY`].
pub(crate) fn tools(
    program: &Path,
    disk: Arc<OwnedFd>,
    access: Access,
    length: u64,
    timeout: Duration,
) -> Confinement {
    let files = Files::default().program(program).allow_open(disk, access).own_mounts();
    let devices = PLAIN_DEVICES.into_iter();
    Confinement {
        namespaces: CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS,
        root: None,
        user: is_root().then_some(NOBODY),
        capabilities: Some(CapabilitySet::empty()),
        limits: vec![
            (Resource::As, TOOL_MEMORY),
            (Resource::Cpu, timeout.as_secs().max(1)),
            (Resource::Fsize, length),
            (Resource::Nofile, TOOL_FILES),
            (Resource::Core, 0),
        ],
        files: Some(devices.fold(files, |files, device| files.allow_if_there(device, Access::Write))),
        syscalls: Syscalls::Tool,
    }
}

/// The files that a VM's VMM opens.
#[derive(Debug, Clone, Default)]
pub(crate) struct VmmFiles {
    /// The VMM's binary.
    pub binary: PathBuf,
    /// The directory for its sockets. It may not read there.
    pub directory: PathBuf,
    /// Kernel, initramfs and read-only drives.
    pub read: Vec<PathBuf>,
    /// Writable drives, and pipes.
    pub write: Vec<PathBuf>,
    /// Whether the VMM connects to sockets of the host.
    pub dials: bool,
    /// What only the VMM's parent reads: a saved guest.
    pub read_by_shim: Vec<PathBuf>,
}

/// The restrictions of a VMM: it may open its VM's files, the host's libraries and firmware, and KVM. It may make Unix sockets,
/// but no other sockets; and only if it `dials`, it may connect to any. Its user is not changed: for a VMM started by root, set `user`, `root` and `namespaces`.
pub(crate) fn vmm(vm: &VmmFiles) -> Confinement {
    let mut files = Files::default().program(&vm.binary).allow(&vm.directory, Access::Sockets);
    files = vm.read.iter().fold(files, |files, path| files.allow(path, Access::Read));
    files = vm.write.iter().fold(files, |files, path| files.allow(path, Access::Write));
    for path in QEMU_FILES {
        files = files.allow_if_there(path, Access::Read);
    }
    for path in beside(&vm.binary) {
        files = files.allow_if_there(path, Access::Read);
    }
    for device in PLAIN_DEVICES {
        files = files.allow_if_there(device, Access::Write);
    }
    Confinement {
        namespaces: CloneFlags::empty(),
        root: None,
        user: None,
        capabilities: Some(CapabilitySet::empty()),
        limits: vec![(Resource::Nofile, VMM_FILES), (Resource::Core, 0)],
        files: Some(files.allow_if_there(KVM, Access::Device)),
        syscalls: if vm.dials { Syscalls::DiallingVmm } else { Syscalls::Vmm },
    }
}

/// The restrictions of a VMM's parent: it may use what its VMM may use and everything in the VM's directory, and may look at
/// processes. System calls and limits are not restricted, because it has yet to start the VMM.
pub(crate) fn shim(vm: &VmmFiles) -> Confinement {
    let vmm = vmm(vm);
    let more = |files: Files| {
        let files = files.allow(&vm.directory, Access::Manage).allow_if_there(PROCESSES, Access::Read);
        vm.read_by_shim.iter().fold(files, |files, path| files.allow(path, Access::Read))
    };
    Confinement { files: vmm.files.map(more), syscalls: Syscalls::All, limits: Vec::new(), ..vmm }
}

/// The libraries and firmware of a program that is installed below a directory of its own (`/opt/qemu/bin/…`).
fn beside(binary: &Path) -> Vec<PathBuf> {
    let binary = std::fs::canonicalize(binary).unwrap_or_else(|_| binary.to_owned());
    let prefix = binary.parent().filter(|directory| directory.ends_with("bin")).and_then(Path::parent);
    let Some(prefix) = prefix else { return Vec::new() };
    let there = |name: &str| prefix.join(name);
    let own = ["lib", "lib64", "share/qemu", "share/qemu-firmware", "share/seabios"].map(there);
    own.into_iter().filter(|path| !LIBRARIES.iter().any(|library| path == Path::new(library))).collect()
}
