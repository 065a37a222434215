//! Who is confined how: tools that read what a guest wrote, and VMMs.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sched::CloneFlags;
use rustix::process::Resource;

use super::{Access, CapabilitySet, Confinement, Files, NOBODY, Syscalls};
use crate::os::paths::{KVM, LIBRARIES, PLAIN_DEVICES, PROCESSES, QEMU_FILES};

/// The most memory that a filesystem tool takes, in bytes: `e2fsck` of a terabyte with a million files takes a tenth of it.
const TOOL_MEMORY: u64 = 4 << 30;
/// The most files that a filesystem tool has open.
const TOOL_FILES: u64 = 64;
/// The most files that a VMM has open.
const VMM_FILES: u64 = 4096;

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A program that works on the disk `disk`, which is `length` bytes long, for no more processor time than `timeout`: it may open
/// that file, by [`Access::Read`] or [`Access::Write`], and the host's libraries; it reaches no network and no other process.
/// Where this process is root, it is [`NOBODY`].
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

/// The files of one VM, as its VMM opens them.
#[derive(Debug, Clone, Default)]
pub(crate) struct VmmFiles {
    /// The VMM's binary.
    pub binary: PathBuf,
    /// The directory in which it makes sockets. It reads nothing there.
    pub directory: PathBuf,
    /// Kernel, initramfs and drives that the guest may not write to.
    pub read: Vec<PathBuf>,
    /// Drives that the guest may write to, and pipes.
    pub write: Vec<PathBuf>,
}

/// A VMM: it opens its VM's files, the host's libraries and firmware, and KVM. It may make Unix sockets, but no others. Its user
/// stays as it is: for a VMM of root, `user`, `root` and `namespaces` are to be set.
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
        syscalls: Syscalls::Vmm,
    }
}

/// The parent of a VMM: it may use what its VMM may, everything in the VM's directory, and look at processes. System calls and
/// limits stay: the VMM is still to be started.
pub(crate) fn shim(vm: &VmmFiles) -> Confinement {
    let vmm = vmm(vm);
    let more =
        |files: Files| files.allow(&vm.directory, Access::Manage).allow_if_there(PROCESSES, Access::Read);
    Confinement { files: vmm.files.map(more), syscalls: Syscalls::All, limits: Vec::new(), ..vmm }
}

/// Where a program that is installed below a directory of its own (`/opt/qemu/bin/…`) has its libraries and its firmware.
fn beside(binary: &Path) -> Vec<PathBuf> {
    let binary = std::fs::canonicalize(binary).unwrap_or_else(|_| binary.to_owned());
    let prefix = binary.parent().filter(|directory| directory.ends_with("bin")).and_then(Path::parent);
    let Some(prefix) = prefix else { return Vec::new() };
    let there = |name: &str| prefix.join(name);
    let own = ["lib", "lib64", "share/qemu", "share/qemu-firmware", "share/seabios"].map(there);
    own.into_iter().filter(|path| !LIBRARIES.iter().any(|library| path == Path::new(library))).collect()
}
