//! The confinement of a VMM and its shim under a daemon of an ordinary user: Landlock, seccomp, `no_new_privs`. Under root's daemon, the
//! drivers make jails instead.
//!
//! The guest of the `process` driver is an ordinary process that may start any program: it is not confined.

use std::io;
use std::path::{Path, PathBuf};

use nexus_schema::DriverKind;

use super::control::Job;
use super::driver;
use crate::os::confine::{self, ConfineError, Syscalls, VmmFiles, Walls};
use crate::os::paths::vm_files;

/// Files in the VM's directory that some drivers make for their VMM: the pipe of its log, and those of saved guests.
const OF_VMM: [&str; 5] = [
    vm_files::VMM_PIPE,
    vm_files::SAVED_STATE,
    vm_files::SAVED_RAM,
    vm_files::LOADED_STATE,
    vm_files::LOADED_RAM,
];

/// Returns whether this confinement applies to a job.
fn has_walls(job: &Job) -> bool {
    !confine::is_root() && job.plan.driver != DriverKind::Process
}

/// Returns the files that the VMM of a job and its shim open. The working directory is the VM's.
fn files_of(job: &Job) -> VmmFiles {
    let plan = &job.plan;
    let drives = |read_only| {
        plan.drives.iter().filter(move |drive| drive.read_only == read_only).map(|drive| drive.path.clone())
    };
    let kernel = [plan.kernel.clone(), plan.initramfs.clone()];
    // A restored guest has its kernel in its memory.
    let kernel = if plan.restore.is_some() { Vec::new() } else { Vec::from(kernel) };
    let saved = plan.restore.iter().flat_map(|restore| [restore.state.clone(), restore.ram.clone()]);
    // What the driver has made for its VMM.
    let made = OF_VMM.map(PathBuf::from).into_iter().filter(|path| path.exists());
    VmmFiles {
        binary: plan.binary.clone(),
        directory: Path::new(".").to_owned(),
        read: kernel.into_iter().chain(drives(true)).collect(),
        write: drives(false).chain(made).collect(),
        dials: driver::facts(plan.driver).dials,
        read_by_shim: saved.collect(),
    }
}

/// Returns the confinement of a VMM, to be prepared right before it is spawned; `None` if this kind does not apply.
pub(super) fn of_vmm(job: &Job) -> Result<Option<Walls>, ConfineError> {
    has_walls(job).then(|| confine::vmm(&files_of(job)).prepare()).transpose()
}

/// Confines this process, a shim that has no VMM and no threads yet. Returns a warning if the kernel does not support all of it.
pub(super) fn confine_shim(job: &Job) -> io::Result<Option<&'static str>> {
    if !has_walls(job) {
        return Ok(None);
    }
    confine::shim(&files_of(job)).prepare()?.apply()?;
    Ok(confine::landlock_abi().is_none().then_some(
        "this kernel has no Landlock, or Landlock is disabled: the VMM can open all files of its user",
    ))
}

/// Drops permissions that this shim no longer needs once its VMM runs: it can no longer start programs, nor do what a VMM may not do.
pub(super) fn forbid_programs(job: &Job, is_jailed: bool) -> io::Result<()> {
    if has_walls(job) || is_jailed { Syscalls::Shim.apply_to_all_threads() } else { Ok(()) }
}
