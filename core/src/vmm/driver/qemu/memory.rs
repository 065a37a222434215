//! The memory of a guest that can be saved: a file that the shim holds, and that QEMU opens by a name.
//!
//! QEMU leaves memory out of the saved state only if it has a name. Where there is `/proc`, that is the one of a passed descriptor; a jail has a
//! file system in memory instead.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::vmm::driver::{DriverError, jail_failed};
use crate::vmm::jail::Jail;
use crate::vmm::plan::LaunchPlan;
use crate::vmm::ram;

/// Makes the memory of a guest, all zeros. Also returns its name for QEMU, which has it as descriptor `fd`.
pub(super) fn make(plan: &LaunchPlan, jail: Option<&Jail>, fd: i32) -> Result<(File, PathBuf), DriverError> {
    let bytes = plan.memory.as_bytes();
    let Some(jail) = jail else {
        return Ok((anonymous(bytes).map_err(failed)?, PathBuf::from(format!("/proc/self/fd/{fd}"))));
    };
    let (file, name) = jail.make_memory(bytes).map_err(jail_failed)?;
    file.set_len(bytes).map_err(failed)?;
    Ok((file, name))
}

/// Makes a memory of a length that not even its VMM can change.
pub(super) fn anonymous(bytes: u64) -> io::Result<File> {
    let memory = File::from(memfd_create(ram::MEMFD, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    memory.set_len(bytes)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory)
}

fn failed(source: io::Error) -> DriverError {
    DriverError::Memory { source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn the_length_of_a_memory_cannot_be_changed_and_its_pages_can() {
        let memory = anonymous(1 << 20).unwrap();
        for length in [0, 4096, 2 << 20] {
            assert_eq!(memory.set_len(length).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        memory.set_len(1 << 20).unwrap();
        memory.write_all_at(&[7; 4096], (1 << 20) - 4096).unwrap();
        memory.write_all_at(&[7], 1 << 20).unwrap_err();
        assert!(fcntl_add_seals(&memory, SealFlags::WRITE).is_err());
    }
}
