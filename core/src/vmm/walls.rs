//! The walls around a VMM and its shim that an ordinary user's daemon can put up: Landlock, seccomp, `no_new_privs`. Root's are
//! jails, which the drivers make.
//!
//! The guest of the `process` driver is an ordinary process that starts what it likes: it gets none.

use std::io;
use std::path::{Path, PathBuf};

use nexus_schema::DriverKind;

use super::control::Job;
use crate::os::confine::{self, ConfineError, Syscalls, VmmFiles, Walls};
use crate::os::paths::vm_files;

/// Whether these walls are for a job.
fn has_walls(job: &Job) -> bool {
    !confine::is_root() && job.plan.driver != DriverKind::Process
}

/// What the VMM of a job opens. The working directory is the VM's.
fn files_of(job: &Job) -> VmmFiles {
    let plan = &job.plan;
    let drives = |read_only| {
        plan.drives.iter().filter(move |drive| drive.read_only == read_only).map(|drive| drive.path.clone())
    };
    // What its log goes through, where the driver has made it.
    let pipe = Some(PathBuf::from(vm_files::VMM_PIPE)).filter(|pipe| pipe.exists());
    VmmFiles {
        binary: plan.binary.clone(),
        directory: Path::new(".").to_owned(),
        read: [plan.kernel.clone(), plan.initramfs.clone()].into_iter().chain(drives(true)).collect(),
        write: drives(false).chain(pipe).collect(),
    }
}

/// The walls of a VMM, to be built right before it is spawned; `None` where it gets none of these.
pub(super) fn of_vmm(job: &Job) -> Result<Option<Walls>, ConfineError> {
    has_walls(job).then(|| confine::vmm(&files_of(job)).prepare()).transpose()
}

/// Puts walls around this process, a shim that has no VMM and no threads yet. What this kernel cannot do is handed back in words.
pub(super) fn confine_shim(job: &Job) -> io::Result<Option<&'static str>> {
    if !has_walls(job) {
        return Ok(None);
    }
    confine::shim(&files_of(job)).prepare()?.apply()?;
    Ok(confine::landlock_abi().is_none().then_some(
        "this kernel has no Landlock, or it is switched off: the VMM may open all files of its user",
    ))
}

/// Takes from this shim, whose VMM runs, what it needs no more: starting programs, and all that a VMM may not do either.
pub(super) fn forbid_programs(job: &Job, is_jailed: bool) -> io::Result<()> {
    if has_walls(job) || is_jailed { Syscalls::Shim.apply_to_all_threads() } else { Ok(()) }
}
