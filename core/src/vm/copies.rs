//! Copies of a VM's drives as they are at one moment, for what goes on without the VM: an image of it, a comparison with a checkpoint.

use nexus_schema::ToolError;

use super::policy;
use super::wait::ask;
use crate::context::{Command, CopyDrives, Handle};

/// Copies drives of a VM: of a stopped one as they are; a running guest syncs, stands still while they are copied, and goes on whatever happens. Holes
/// stay holes, and where the filesystem can, the copies share their data with the drives. A copy may need its journal to be applied. After an error, files that
/// were begun are left to the caller.
///
/// # Errors
///
/// The VM is in no state for it or does not have the drive, its driver cannot hold a guest, the disk is full, it was cancelled, or the host was too busy to keep
/// the guest still.
pub(crate) async fn copy_drives(handle: &Handle, copy: CopyDrives) -> Result<(), ToolError> {
    // Here too, so that what cannot be is refused before the VM's task has time for it.
    {
        let view = handle.view.borrow();
        policy::copy_drives(&view.record)?;
    }
    let copy = Box::new(copy);
    ask(handle, |reply| Command::CopyDrives { copy, reply }).await
}
