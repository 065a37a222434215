//! Running firecracker under its jailer.
//!
//! The jailer makes `jail/<binary>/<id>/root` in the VM's directory the root directory of the process, gives it a user of its own and
//! starts firecracker there. What firecracker shall find in that directory is put there before:
//!
//! ```text
//! VM's directory                 jail/firecracker/ID/root
//! drives, kernel, initramfs ──>  kernel, initramfs, drive-ID    bind mounts, seen by shim and VMM only
//! v.sock            <──────────  v.sock                         hard link, once firecracker has made it
//! v.sock_1024       <── relay ── v.sock_1024
//! vmm.log           <── shim ─── vmm.pipe
//! ```
//! Firecracker owns that directory: nothing in it is followed blindly once it runs.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{AtFlags, CWD};

use super::LOG_OPTIONS;
use super::relay;
use super::requests::Files;
use crate::os::own_mounts;
use crate::os::paths::{PROGRAM_DIRECTORIES, vm_files};
use crate::os::socket::bind_in;
use crate::os::tool::is_program;
use crate::vmm::control::Job;
use crate::vmm::process::CommandLine;

/// Users from here on belong to nobody: above those that containers get, below those that do not fit 31 bits. Each VM has
/// its own, by its context id.
const UID_FIRST: u32 = 0x7000_0000;
const UID_COUNT: u32 = 0x0fff_0000;

/// What fails while a jail is made. It holds paths relative to the VM's directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    #[error("make mounts of this VM's own")]
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
    #[error("the jail's {name} is not a socket")]
    NoSocket { name: &'static str },
}

fn file<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> JailError + 'a {
    move |source| JailError::File { action, path: path.to_owned(), source }
}

/// The jailer for a firecracker binary, which only root can use: the one beside it or beside what it is a link to, else an
/// installed one.
pub(crate) fn find_jailer(binary: &Path) -> Option<PathBuf> {
    let beside = [Some(binary.to_owned()), std::fs::canonicalize(binary).ok()].into_iter().flatten();
    let installed = PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join("jailer"));
    let mut jailers = beside.map(|binary| binary.with_file_name("jailer")).chain(installed);
    jailers.find(|path| is_program(path))
}

/// A jail, ready for the jailer.
#[derive(Debug)]
pub(super) struct Jail {
    jailer: PathBuf,
    /// Firecracker itself, not a link to it: the jailer names the directory after that.
    binary: PathBuf,
    root: PathBuf,
    uid: u32,
    files: Files,
}

impl Jail {
    /// Makes the jail of a VM in the working directory. From here on, this process has mounts of its own.
    pub(super) fn make(job: &Job, jailer: PathBuf) -> Result<Self, JailError> {
        let plan = &job.plan;
        let binary = std::fs::canonicalize(&plan.binary).map_err(file("find", &plan.binary))?;
        let name = binary.file_name().unwrap_or_default();
        own_mounts::begin().map_err(|source| JailError::Mounts { source })?;

        let base = Path::new(vm_files::JAIL);
        remove(base)?;
        let root = base.join(name).join(plan.vm.to_string()).join("root");
        std::fs::create_dir_all(&root).map_err(file("make", &root))?;
        let uid = UID_FIRST + plan.cid % UID_COUNT;
        // Directories on the way are made by this process with its umask; the jail's user has to get through them.
        for directory in [base, &base.join(name), &base.join(name).join(plan.vm.to_string())] {
            std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o711))
                .map_err(file("open to the jail's user", directory))?;
        }
        chown(&root, Some(uid), Some(uid)).map_err(file("give to the jail's user", &root))?;

        let mut jail = Self { jailer, binary, root, uid, files: Files::of(plan) };
        jail.files.kernel = jail.bring(&plan.kernel, "kernel", false)?;
        jail.files.initramfs = jail.bring(&plan.initramfs, "initramfs", false)?;
        for (index, drive) in plan.drives.iter().enumerate() {
            let inside = jail.bring(&drive.path, &format!("drive-{}", drive.id), !drive.read_only)?;
            jail.files.drives[index] = inside;
        }
        let hello = bind_in(&jail.root, vm_files::HELLO).map_err(file("bind", Path::new(vm_files::HELLO)))?;
        jail.give(&jail.root.join(vm_files::HELLO))?;
        relay::start(hello, vm_files::HELLO.into()).map_err(file("serve", Path::new(vm_files::HELLO)))?;
        Ok(jail)
    }

    /// Makes a file visible inside; its path there.
    fn bring(&self, outside: &Path, name: &str, is_written: bool) -> Result<PathBuf, JailError> {
        let inside = self.root.join(name);
        std::fs::File::create_new(&inside).map_err(file("make", &inside))?;
        let none: Option<&str> = None;
        let bind = |flags| mount(Some(outside), &inside, none, flags, none).map_err(io::Error::from);
        bind(MsFlags::MS_BIND).map_err(file("show the jail", outside))?;
        if is_written {
            chown(&inside, Some(self.uid), Some(self.uid))
                .map_err(file("give to the jail's user", outside))?;
        } else {
            // Kernels, initramfs files and read-only drives are shared by VMs, and hold no secret of one of them.
            let mode = std::fs::metadata(&inside).map_err(file("look at", outside))?.permissions().mode();
            if mode & 0o004 == 0 {
                std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(mode | 0o444))
                    .map_err(file("make readable", outside))?;
            }
            bind(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)
                .map_err(file("protect", outside))?;
        }
        Ok(Path::new("/").join(name))
    }

    /// Gives a file of the jail to its user.
    pub(super) fn give(&self, path: &Path) -> Result<(), JailError> {
        chown(path, Some(self.uid), Some(self.uid)).map_err(file("give to the jail's user", path))
    }

    /// The jail's root directory, relative to the VM's.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where things are inside.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// The command line that starts firecracker inside.
    pub(super) fn command(&self, job: &Job) -> CommandLine {
        let id = job.plan.vm.to_string();
        let uid = self.uid.to_string();
        let mut arguments: Vec<std::ffi::OsString> = vec!["--id".into(), id.into(), "--exec-file".into()];
        arguments.push(self.binary.clone().into());
        let rest = ["--uid", &uid, "--gid", &uid, "--chroot-base-dir", vm_files::JAIL, "--", "--api-sock"];
        arguments.extend(rest.map(Into::into));
        // Its root directory is its working directory.
        arguments.push(vm_files::API.into());
        arguments.extend(LOG_OPTIONS.map(Into::into));
        CommandLine { program: self.jailer.clone(), arguments }
    }

    /// Lets the host reach the vsock device that firecracker has made.
    pub(super) fn open_to_host(&self) -> Result<(), JailError> {
        let (inside, outside) = (self.root.join(vm_files::VSOCK), Path::new(vm_files::VSOCK));
        // The link is to what is there now; what it is, is looked at where firecracker cannot change it.
        rustix::fs::linkat(CWD, &inside, CWD, outside, AtFlags::empty())
            .map_err(io::Error::from)
            .map_err(file("link", &inside))?;
        let metadata = std::fs::symlink_metadata(outside).map_err(file("look at", outside))?;
        if metadata.file_type().is_socket() && metadata.uid() == self.uid {
            return Ok(());
        }
        std::fs::remove_file(outside).map_err(file("remove", outside))?;
        Err(JailError::NoSocket { name: vm_files::VSOCK })
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        if let Err(error) = remove(Path::new(vm_files::JAIL)) {
            tracing::warn!(%error, "a jail is left behind");
        }
    }
}

/// Removes a jail with everything in it but what is mounted there.
fn remove(base: &Path) -> Result<(), JailError> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let here = std::fs::canonicalize(base).unwrap_or_default();
    // Field 5 is where it is mounted; blanks in it are written as octal numbers.
    for mounted in mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape) {
        if !here.as_os_str().is_empty() && Path::new(&mounted).starts_with(&here) {
            umount2(Path::new(&mounted), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .map_err(|source| JailError::Mounts { source })?;
        }
    }
    match std::fs::remove_dir_all(base) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file("remove", base)(e)),
        _ => Ok(()),
    }
}

/// A path as `/proc/self/mountinfo` writes it.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::plan::tests::plan;

    #[test]
    fn command_line_of_the_jailer() {
        let jail = Jail {
            jailer: "/opt/jailer".into(),
            binary: "/opt/firecracker".into(),
            root: "jail-of-the-test/root".into(),
            uid: 0x7000_0003,
            files: Files::of(&plan()),
        };
        let command = jail.command(&Job { plan: plan(), tsc_khz: None });
        let words: Vec<_> = command.arguments.iter().map(|word| word.to_str().unwrap()).collect();
        insta::assert_snapshot!("jailer", format!("{} {}", command.program.display(), words.join(" ")));
        std::mem::forget(jail);
    }

    #[test]
    fn mounted_paths_are_read_as_written() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    }
}
