//! A VM's part in a copy of its drives.
//!
//! ```text
//! quiesce ─> hold: paused ─> drives copied, the hold renewed ─> release ─> thaw
//! ```
//! It is a checkpoint without the memory (`save`), with the same ends: shim and guest go on by themselves if this daemon does not tell them to.

use std::path::PathBuf;
use std::time::Instant;

use nexus_schema::{ErrorCode, ToolError};

use super::Actor;
use super::save::{COPY_MAX, HOLD, copy_held, held_by, hold_failed, quiesce, thaw};
use crate::context::{CopyDrives, Decision, drive_error};
use crate::drive::{DISK, DriveError, copy_file};
use crate::os::failpoint;
use crate::vm::policy;

impl Actor {
    /// Copies drives of the VM. Whatever happens, a running guest goes on afterwards.
    pub(super) async fn copy_drives(&mut self, copy: &CopyDrives) -> Result<(), ToolError> {
        let name = self.record.name.clone();
        let decision = policy::copy_drives(&self.record)?;
        self.check_alone().await?;
        let files = self.files_to_copy(copy)?;
        // Nobody resizes, labels or copies them meanwhile.
        let _locked = self.lock_drives().await?;
        if decision == Decision::Already {
            copy.progress.step("copying the drives");
            let watched = copy.progress.clone();
            let copying = tokio::task::spawn_blocking(move || -> Result<(), DriveError> {
                files.iter().try_for_each(|(from, to)| copy_file(from, to, &watched))
            });
            let copied = copying.await;
            let copied = copied.map_err(|e| ToolError::internal(format!("copy drives of {name}: {e}")))?;
            failpoint::reach("copy-made");
            return copied.map_err(drive_error);
        }
        let Some(boot) = &mut self.boot else {
            return Err(ToolError::internal(format!("{name} is ready, but has no boot")));
        };
        if boot.bye.is_some() {
            let message = format!("{name} is going down: its guest has said goodbye");
            return Err(ToolError::new(ErrorCode::VmWrongState, message).hint("wait until it is stopped"));
        }
        copy.progress.step("stopping the guest's commands");
        if let Some(link) = &boot.link {
            quiesce(link).await;
        }
        boot.hold();
        failpoint::reach("copy-quiet");
        copy.progress.step("copying the drives");
        let held_until = Instant::now() + HOLD;
        let copied = match boot.shim.hold_guest(HOLD).await {
            Ok(()) => copy_held(files, held_by(&boot.shim), held_until, COPY_MAX, &copy.progress).await,
            Err(error) => Err(hold_failed(&error)),
        };
        failpoint::reach("copy-made");
        if let Err(error) = boot.shim.release_guest().await {
            tracing::warn!(vm = %name, %error, "cannot resume a vm after a copy of its drives; its shim does it");
        }
        boot.let_go(&self.shared, &self.record);
        if let Some(link) = &boot.link {
            thaw(link).await;
        }
        copied
    }

    /// The files of the drives, each with its copy.
    fn files_to_copy(&self, copy: &CopyDrives) -> Result<Vec<(PathBuf, PathBuf)>, ToolError> {
        let own = copy.drives.iter().map(|(id, to)| match self.drives.iter().any(|drive| drive.id == *id) {
            true => Ok((self.shared.paths.drive(*id).join(DISK), to.clone())),
            false => {
                let message = format!("{} does not have the drive {id} any more", self.record.name);
                Err(ToolError::new(ErrorCode::DriveNotFound, message)
                    .hint("call vm_inspect to see its drives"))
            }
        });
        own.collect()
    }
}
