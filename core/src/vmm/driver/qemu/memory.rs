//! The memory of a guest that can be saved: a file that the shim holds, and that QEMU opens by a name.
//!
//! QEMU leaves memory out of the saved state only if it has a name. Where there is `/proc`, that is the one of a passed descriptor; a jail has a
//! file system in memory instead.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use rustix::fs::MemfdFlags;

use crate::vmm::driver::{DriverError, jail_failed};
use crate::vmm::jail::Jail;
use crate::vmm::plan::LaunchPlan;

/// Makes the memory of a guest, all zeros. Also returns its name for QEMU, which has it as descriptor `fd`.
pub(super) fn make(plan: &LaunchPlan, jail: Option<&Jail>, fd: i32) -> Result<(File, PathBuf), DriverError> {
    let bytes = plan.memory.as_bytes();
    let (file, name) = match jail {
        Some(jail) => jail.make_memory(bytes).map_err(jail_failed)?,
        None => (anonymous().map_err(failed)?, PathBuf::from(format!("/proc/self/fd/{fd}"))),
    };
    file.set_len(bytes).map_err(failed)?;
    Ok((file, name))
}

fn anonymous() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC)?.into())
}

fn failed(source: io::Error) -> DriverError {
    DriverError::Memory { source }
}
