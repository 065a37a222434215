//! Jails: the part of the host that a VMM of root's daemon can see. A driver lists the files that its VMM needs; this module makes the jail.
//!
//! ```text
//! Jail::make ── root directory (own mounts, its own user) ────── bring, bring_program: bind mounts
//!      │                                                              │
//!      └── confine: namespaces, chroot, user, no capabilities, seccomp ┘     leave_root: the shim becomes that user too
//! ```
//! Only the shim and its VMM see the mounts, which end with them. After a `kill -9` of the shim, a directory with empty files stays on the
//! disk; [`remove`] removes it.

mod program;

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use rustix::fs::{CWD, FileType, Mode};

use super::plan::LaunchPlan;
use crate::os::confine::{self, CapabilitySet, Confinement, User};
use crate::os::own_mounts;
use crate::os::paths::{KVM, PLAIN_DEVICES, vm_files};

/// Start of a range of unused user ids: above the ranges of containers, below the ids that do not fit 31 bits. Each VM has its own
/// user, derived from its context id.
const UID_FIRST: u32 = 0x7000_0000;
const UID_COUNT: u32 = 0x0fff_0000;

/// Size of the file system for a guest's memory beyond that memory, in bytes.
const MEMORY_MORE: u64 = 1 << 20;

/// An error while a jail is made. Its paths are relative to the VM's directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    #[error("make private mounts for this VM")]
    Mounts {
        #[source]
        source: nix::Error,
    },
    #[error("{action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("list the libraries of {program}: {why}")]
    Libraries { program: PathBuf, why: String },
    #[error("the jail's {name} is not a socket")]
    NoSocket { name: &'static str },
    #[error("become the VM's user {uid}")]
    User {
        uid: u32,
        #[source]
        source: nix::Error,
    },
}

pub(crate) fn file<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> JailError + 'a {
    move |source| JailError::File { action, path: path.to_owned(), source }
}

/// Paths of a VM's files, as its VMM sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// In the order of the plan's drives.
    pub drives: Vec<PathBuf>,
    /// The file that is the guest's memory, if it has one.
    pub memory: Option<PathBuf>,
}

impl Files {
    /// Returns the plan's own paths, for a VMM without a jail.
    pub(crate) fn of(plan: &LaunchPlan) -> Self {
        Self {
            kernel: plan.kernel.clone(),
            initramfs: plan.initramfs.clone(),
            drives: plan.drives.iter().map(|drive| drive.path.clone()).collect(),
            memory: None,
        }
    }
}

/// Returns the user id of a VM, which is also its group id.
pub(crate) fn uid_of(plan: &LaunchPlan) -> u32 {
    uid_of_cid(plan.cid)
}

fn uid_of_cid(cid: u32) -> u32 {
    UID_FIRST + cid % UID_COUNT
}

/// Returns the user id that the VMM of a VM with this context id runs as.
pub(crate) fn vmm_uid(cid: u32, jail: bool) -> u32 {
    if jail && confine::is_root() { uid_of_cid(cid) } else { rustix::process::geteuid().as_raw() }
}

/// Returns whether the VMM of a plan runs in a jail: under root's daemon it does, unless the settings disable jails.
pub(crate) fn is_for(plan: &LaunchPlan) -> bool {
    plan.jail && confine::is_root()
}

/// A root directory for one VMM, below [`vm_files::JAIL`] in the VM's directory.
#[derive(Debug)]
pub(crate) struct Jail {
    root: PathBuf,
    uid: u32,
    files: Files,
}

impl Jail {
    /// Makes the jail of a VM in the working directory, with the VM's files in it. `below` is the path of its root directory below
    /// [`vm_files::JAIL`]; with `in_memory` it is on a tmpfs. From here on, this process has its own mount namespace.
    pub(crate) fn make(plan: &LaunchPlan, below: &Path, in_memory: bool) -> Result<Self, JailError> {
        own_mounts::begin().map_err(|source| JailError::Mounts { source })?;
        let base = Path::new(vm_files::JAIL);
        remove(base)?;
        let root = base.join(below);
        if in_memory {
            std::fs::create_dir(base).map_err(file("make", base))?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
            mount(Some("jail"), base, Some("tmpfs"), flags, Some("size=1m,nr_inodes=4k,mode=0711"))
                .map_err(|source| JailError::Mounts { source })?;
        }
        std::fs::create_dir_all(&root).map_err(file("make", &root))?;
        // This process made the parent directories with its umask, but the jail's user has to traverse them.
        let on_the_way = root.ancestors().skip(1).take_while(|directory| directory.starts_with(base));
        for directory in on_the_way {
            open_up(directory)?;
        }
        let uid = uid_of(plan);
        chown(&root, Some(uid), Some(uid)).map_err(file("change the owner of", &root))?;
        let mut jail = Self { root, uid, files: Files::of(plan) };
        // A restored guest has its kernel in its memory.
        if plan.restore.is_none() {
            jail.files.kernel = jail.bring(&plan.kernel, "kernel", false)?;
            jail.files.initramfs = jail.bring(&plan.initramfs, "initramfs", false)?;
        }
        for (index, drive) in plan.drives.iter().enumerate() {
            let inside = jail.bring(&drive.path, &format!("drive-{}", drive.id), !drive.read_only)?;
            jail.files.drives[index] = inside;
        }
        Ok(jail)
    }

    /// Makes one of the VM's files visible inside. Returns its path there.
    fn bring(&self, outside: &Path, name: &str, is_written: bool) -> Result<PathBuf, JailError> {
        let inside = self.root.join(name);
        std::fs::File::create_new(&inside).map_err(file("make", &inside))?;
        if is_written {
            bind(outside, &inside, MsFlags::empty())?;
            chown(&inside, Some(self.uid), Some(self.uid)).map_err(file("change the owner of", outside))?;
        } else {
            // Kernels, initramfs files and read-only drives are shared by VMs and contain no secrets.
            let mode = std::fs::metadata(outside).map_err(file("stat", outside))?.permissions().mode();
            if mode & 0o004 == 0 {
                std::fs::set_permissions(outside, std::fs::Permissions::from_mode(mode | 0o444))
                    .map_err(file("make readable", outside))?;
            }
            bind(outside, &inside, MsFlags::MS_RDONLY)?;
        }
        Ok(Path::new("/").join(name))
    }

    /// Makes a file or directory of the host visible at its own path, if it exists. Only devices are writable.
    fn show(&self, outside: &Path, flags: MsFlags) -> Result<(), JailError> {
        let Ok(found) = std::fs::metadata(outside) else { return Ok(()) };
        let inside = self.root.join(outside.strip_prefix("/").unwrap_or(outside));
        if inside.exists() {
            return Ok(());
        }
        let directory = if found.is_dir() { &*inside } else { inside.parent().unwrap_or(&self.root) };
        let missing: Vec<&Path> = directory.ancestors().take_while(|path| !path.exists()).collect();
        for path in missing.into_iter().rev() {
            std::fs::create_dir(path).map_err(file("make", path))?;
            open_up(path)?;
        }
        if !found.is_dir() {
            std::fs::File::create_new(&inside).map_err(file("make", &inside))?;
        }
        bind(outside, &inside, flags)
    }

    /// Makes a program visible with all that it needs to run: its libraries, the paths in `more`, and the basic devices.
    pub(crate) fn bring_program(
        &self,
        program: &Path,
        more: &[PathBuf],
        with_kvm: bool,
    ) -> Result<(), JailError> {
        let read_only = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        self.show(program, read_only)?;
        for path in program::needs(program)?.iter().chain(more) {
            self.show(path, read_only)?;
        }
        for device in PLAIN_DEVICES {
            self.show(Path::new(device), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC)?;
        }
        if with_kvm {
            self.make_kvm()?;
        }
        // The jail's user must not write to the directory itself, which holds mount points.
        chown(&self.root, Some(0), Some(0)).map_err(file("change the owner of", &self.root))?;
        open_up(&self.root)
    }

    /// Makes a file in memory for so many bytes, which belongs to the jail's user. Also returns its path inside.
    pub(crate) fn make_memory(&self, bytes: u64) -> Result<(File, PathBuf), JailError> {
        let directory = self.root.join("memory");
        std::fs::create_dir(&directory).map_err(file("make", &directory))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
        let options = format!("size={},nr_inodes=8,mode=0711", bytes.saturating_add(MEMORY_MORE));
        mount(Some("memory"), &directory, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(|source| JailError::Mounts { source })?;
        let path = directory.join("guest");
        let memory = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let memory = memory.map_err(file("make", &path))?;
        self.give(&path)?;
        Ok((memory, Path::new("/memory/guest").to_owned()))
    }

    /// Makes a device node of the host's KVM that belongs to the jail's user. The host's own node belongs to root and a group.
    fn make_kvm(&self) -> Result<(), JailError> {
        let host = Path::new(KVM);
        let device = std::fs::metadata(host).map_err(file("stat", host))?.rdev();
        let inside = self.root.join(host.strip_prefix("/").unwrap_or(host));
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, &inside, FileType::CharacterDevice, mode, device)
            .map_err(io::Error::from)
            .map_err(file("make", &inside))?;
        self.give(&inside)
    }

    /// Returns the confinement of a VMM that is started in this jail: that of every VMM, and the jail's.
    pub(crate) fn confine(&self, vmm: Confinement) -> Confinement {
        Confinement {
            namespaces: CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS,
            root: Some(self.root.clone()),
            user: Some(User { uid: self.uid, gid: self.uid }),
            capabilities: Some(CapabilitySet::empty()),
            // No Landlock rules: the jail contains no other files.
            files: None,
            ..vmm
        }
    }

    /// Makes the jail's user the owner of a file.
    pub(crate) fn give(&self, path: &Path) -> Result<(), JailError> {
        chown(path, Some(self.uid), Some(self.uid)).map_err(file("change the owner of", path))
    }

    /// Returns the jail's root directory, relative to the VM's.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the jail's user id.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Returns the paths of the VM's files inside.
    pub(crate) fn files(&self) -> &Files {
        &self.files
    }
}

/// Lets all users traverse a directory.
fn open_up(directory: &Path) -> Result<(), JailError> {
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o711))
        .map_err(file("change the mode of", directory))
}

fn bind(outside: &Path, inside: &Path, flags: MsFlags) -> Result<(), JailError> {
    let none: Option<&str> = None;
    let bind = |flags| mount(Some(outside), inside, none, flags, none).map_err(io::Error::from);
    bind(MsFlags::MS_BIND).map_err(file("bind-mount", outside))?;
    if flags.is_empty() {
        return Ok(());
    }
    bind(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags).map_err(file("remount", outside))
}

/// Changes the user of this process, a shim whose VMM was spawned, to the VM's user, in all of its threads. The VM's directory and its
/// content belong to that user from here on. The shim can still end its VMM, and the VMM still dies with it.
pub(crate) fn leave_root(plan: &LaunchPlan) -> Result<(), JailError> {
    let uid = uid_of(plan);
    let here = Path::new(".");
    for entry in std::fs::read_dir(here).map_err(file("read", here))? {
        let entry = entry.map_err(file("read", here))?;
        if entry.file_name() != vm_files::JAIL {
            let path = entry.path();
            std::os::unix::fs::lchown(&path, Some(uid), Some(uid))
                .map_err(file("change the owner of", &path))?;
        }
    }
    chown(here, Some(uid), Some(uid)).map_err(file("change the owner of", here))?;
    let become_it = || {
        let gid = nix::unistd::Gid::from_raw(uid);
        let user = nix::unistd::Uid::from_raw(uid);
        // These functions of the C library change all threads. All capabilities are dropped with the change from root to another user.
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(gid, gid, gid)?;
        nix::unistd::setresuid(user, user, user)
    };
    become_it().map_err(|source| JailError::User { uid, source })
}

impl Drop for Jail {
    fn drop(&mut self) {
        if let Err(error) = remove(Path::new(vm_files::JAIL)) {
            tracing::debug!(%error, "cannot remove a jail; the daemon will remove it");
        }
    }
}

/// Unmounts everything in a jail, then removes the jail.
pub(crate) fn remove(base: &Path) -> Result<(), JailError> {
    let here = match std::fs::canonicalize(base) {
        Ok(here) => here,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(file("find", base)(error)),
    };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // Field 5 is the mount point; spaces in it are written as octal numbers.
    for mounted in mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape) {
        if Path::new(&mounted).starts_with(&here) {
            umount2(Path::new(&mounted), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .map_err(|source| JailError::Mounts { source })?;
        }
    }
    match std::fs::remove_dir_all(base) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file("remove", base)(e)),
        _ => Ok(()),
    }
}

/// Decodes a path of `/proc/self/mountinfo`.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_paths_are_read_as_written() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    }
}
