//! Running firecracker under its jailer.
//!
//! The jailer makes `jail/<binary>/<id>/root` in the VM's directory the root directory of the process, changes to the VM's user and
//! starts firecracker there. The files that firecracker needs in that directory are put there before:
//!
//! ```text
//! VM's directory                 jail/firecracker/ID/root
//! drives, kernel, initramfs ──>  kernel, initramfs, drive-ID    bind mounts, seen by shim and VMM only
//! v.sock            <──────────  v.sock                         hard link, once firecracker has made it
//! v.sock_1024, 1025 <── relay ── v.sock_1024, v.sock_1025
//! vmm.log           <── shim ─── vmm.pipe
//! checkpoint        <── shim ─── saved.state, saved.ram         held open by the shim
//! checkpoint        ─── shim ──> loaded.state, loaded.ram       copies, unlinked once they are loaded
//! ```
//! Firecracker owns that directory and may change it while it runs. So nothing in it is trusted from then on.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nexus_schema::egress::CONNECTIONS_MAX;
use nexus_schema::tools::system::{DoctorCheck, DoctorStatus};
use rustix::fs::{AtFlags, CWD};

use super::{LOG_OPTIONS, relay};
use crate::os::confine::program::interpreter;
use crate::os::paths::{PROGRAM_DIRECTORIES, vm_files};
use crate::os::socket::bind_in;
use crate::os::tool::is_program;
use crate::vmm::control::Job;
use crate::vmm::driver::Closer;
use crate::vmm::jail::{Jail, JailError, file};
use crate::vmm::process::CommandLine;

/// Name of the jailer.
pub(super) const JAILER: &str = "jailer";

/// Checks a firecracker binary beyond its version: whether it can run in a jail, and whether there is a jailer.
pub(super) fn look_closer(binary: &Path) -> Closer {
    let check = |status, found: String, fix: Option<String>| {
        Some(DoctorCheck { name: JAILER.to_owned(), status, found, fix })
    };
    let Some(jailer) = find_jailer(binary) else {
        let found = "not found: firecracker runs as root, confined only by its own seccomp filter".to_owned();
        let fix = "put the jailer of firecracker's release into the directory of firecracker".to_owned();
        return Closer { unjailable: None, for_root: check(DoctorStatus::Warn, found, Some(fix)) };
    };
    // Its jail contains no loader.
    let unjailable = interpreter(binary).ok().flatten().map(|loader| {
        let why = format!("needs the loader {}, which is not in its jail", loader.display());
        (why, "install firecracker's release binary, which is linked statically".to_owned())
    });
    Closer { unjailable, for_root: check(DoctorStatus::Ok, jailer.display().to_string(), None) }
}

/// Finds the jailer for a firecracker binary: in the directory of the binary or of the file that it links to, else an installed one.
/// Only root can use it.
pub(super) fn find_jailer(binary: &Path) -> Option<PathBuf> {
    let beside = [Some(binary.to_owned()), std::fs::canonicalize(binary).ok()].into_iter().flatten();
    let installed = PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join(JAILER));
    let mut jailers = beside.map(|binary| binary.with_file_name(JAILER)).chain(installed);
    jailers.find(|path| is_program(path))
}

/// A jail, ready for the jailer.
#[derive(Debug)]
pub(super) struct Jailed {
    jailer: PathBuf,
    /// Firecracker with links resolved: the jailer names the directory after this file.
    binary: PathBuf,
    jail: Jail,
}

impl Jailed {
    /// Makes the jail of a VM in the working directory. From here on, this process has its own mount namespace.
    pub(super) fn make(job: &Job, jailer: PathBuf) -> Result<Self, JailError> {
        let plan = &job.plan;
        let binary = std::fs::canonicalize(&plan.binary).map_err(file("find", &plan.binary))?;
        let name = binary.file_name().unwrap_or_default();
        let jail = Jail::make(plan, &Path::new(name).join(plan.vm.to_string()).join("root"), false)?;
        for (name, most) in
            [(vm_files::HELLO, relay::HELLO_CONNECTIONS_MAX), (vm_files::EGRESS, CONNECTIONS_MAX)]
        {
            let listener = bind_in(jail.root(), name).map_err(file("bind", Path::new(name)))?;
            jail.give(&jail.root().join(name))?;
            relay::start(listener, name.into(), most).map_err(file("serve", Path::new(name)))?;
        }
        Ok(Self { jailer, binary, jail })
    }

    /// Returns the jail itself.
    pub(super) fn jail(&self) -> &Jail {
        &self.jail
    }

    /// Returns the command line that starts firecracker inside.
    pub(super) fn command(&self, job: &Job) -> CommandLine {
        command(&self.jailer, &self.binary, &job.plan.vm.to_string(), &self.jail.uid().to_string())
    }

    /// Links the socket of the vsock device that firecracker has made into the VM's directory.
    pub(super) fn open_to_host(&self) -> Result<(), JailError> {
        let (inside, outside) = (self.jail.root().join(vm_files::VSOCK), Path::new(vm_files::VSOCK));
        // The hard link refers to the present file. Its type is then checked where firecracker cannot replace it.
        rustix::fs::linkat(CWD, &inside, CWD, outside, AtFlags::empty())
            .map_err(io::Error::from)
            .map_err(file("link", &inside))?;
        let metadata = std::fs::symlink_metadata(outside).map_err(file("stat", outside))?;
        if metadata.file_type().is_socket() && metadata.uid() == self.jail.uid() {
            return Ok(());
        }
        std::fs::remove_file(outside).map_err(file("remove", outside))?;
        Err(JailError::NoSocket { name: vm_files::VSOCK })
    }
}

fn command(jailer: &Path, binary: &Path, id: &str, uid: &str) -> CommandLine {
    let mut arguments: Vec<std::ffi::OsString> = vec!["--id".into(), id.into(), "--exec-file".into()];
    arguments.push(binary.into());
    let rest = ["--uid", uid, "--gid", uid, "--chroot-base-dir", vm_files::JAIL, "--", "--api-sock"];
    arguments.extend(rest.map(Into::into));
    // Its root directory is its working directory.
    arguments.push(vm_files::API.into());
    arguments.extend(LOG_OPTIONS.map(Into::into));
    CommandLine { program: jailer.to_owned(), arguments }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::plan::tests::plan;

    #[test]
    fn a_dynamically_linked_firecracker_is_not_put_in_a_jail() {
        let directory = tempfile::tempdir().unwrap();
        let binary = directory.path().join("firecracker");
        // Any dynamically linked program will do for both.
        for name in ["firecracker", JAILER] {
            std::fs::copy("/bin/sh", directory.path().join(name)).unwrap();
        }
        let (why, _) = look_closer(&binary).unjailable.unwrap();
        assert!(why.starts_with("needs the loader /lib"), "{why}");
        assert_eq!(look_closer(&binary).for_root.unwrap().status, DoctorStatus::Ok);
    }

    #[test]
    fn command_line_of_the_jailer() {
        let jailed = |uid: &str| {
            command(Path::new("/opt/jailer"), Path::new("/opt/firecracker"), "aaaaaaaaaaaac", uid)
        };
        let command = jailed(&crate::vmm::jail::uid_of(&plan()).to_string());
        let words: Vec<_> = command.arguments.iter().map(|word| word.to_str().unwrap()).collect();
        insta::assert_snapshot!("jailer", format!("{} {}", command.program.display(), words.join(" ")));
    }
}
