//! A VM that goes on from a checkpoint: what runs of it ends, its drives become as they were, and its VMM starts with the memory that was saved.

use std::path::PathBuf;

use data_encoding::{BASE64, HEXLOWER};
use nexus_schema::id::{BootId, DriveId};
use nexus_schema::link::{Configure, Resume, ResumeKind};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ErrorCode, ToolError};

use super::Actor;
use crate::context::{RestoreFrom, drive_error};
use crate::guest::Restored;
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::{failpoint, random};
use crate::store::StoreError;
use crate::store::drives;
use crate::vm::policy;
use crate::vmm::{Restore, SavedKind};

/// Returns what the VMM and the daemon need for a restore, and tells the guest what to renew.
pub(super) fn begin(from: &RestoreFrom, configure: &mut Configure) -> (Restore, Restored) {
    let nonce = random::token();
    let mut entropy = [0; 32];
    random::fill(&mut entropy);
    let is_fork = from.kind == ResumeKind::Fork;
    let machine_id = is_fork.then(|| {
        let mut id = [0; 16];
        random::fill(&mut id);
        HEXLOWER.encode(&id)
    });
    configure.resume = Some(Resume {
        kind: from.kind,
        entropy_base64: BASE64.encode(&entropy),
        machine_id,
        run_hooks: from.kind != ResumeKind::Wake,
    });
    configure.wait_for_init_s = 0;
    // They were written when the VM was made, and drives are mounted in the memory that is restored.
    configure.files.clear();
    configure.mounts.clear();
    let restore = Restore {
        state: from.directory.join(checkpoint_files::STATE),
        ram: from.directory.join(checkpoint_files::RAM),
        kind: if from.manifest.private { SavedKind::Private } else { SavedKind::Shared },
        nonce: nonce.clone(),
    };
    (restore, Restored { nonce, token: from.token.clone() })
}

impl Actor {
    /// Ends what runs of the VM, and starts it from a checkpoint.
    pub(super) async fn restore(&mut self, from: &RestoreFrom) -> Result<BootId, ToolError> {
        let name = self.record.name.clone();
        self.same_boot(from.if_boot)?;
        policy::restore(name.as_str(), self.record.state)?;
        // They were compared before; one may have been detached since, and be another VM's now.
        let has_them = from.drives.iter().all(|(id, ..)| self.drives.iter().any(|drive| drive.id == *id));
        if !has_them {
            let message = format!("{name} has other drives than at the checkpoint");
            return Err(ToolError::new(ErrorCode::Changed, message)
                .hint("attach the drives that it had, in their order"));
        }
        let staged = self.stage_drives(from).await?;
        if self.boot.is_some() {
            from.progress.step("ending the VMM");
            if self.record.state != VmState::Stopping {
                self.transition(VmState::Stopping, None, "rollback requested", &from.who).await?;
            }
            self.kill_boot().await;
            failpoint::reach("rollback-down");
            self.settle(VmState::Stopped, None, "ended for its rollback").await;
        }
        self.put_drives_in_place(staged).await?;
        failpoint::reach("rollback-drives");
        // A fault of the emulator must not make a cold start of it.
        self.had_mishap = true;
        let why = match from.kind {
            ResumeKind::Fork => format!("forked from checkpoint {}", from.manifest.checkpoint),
            ResumeKind::Rollback => format!("rolled back to checkpoint {}", from.manifest.checkpoint),
            ResumeKind::Wake => "woken".to_owned(),
        };
        self.record.lineage.checkpoint = Some(from.manifest.checkpoint);
        self.launch_from(Some(from), &from.who, &why, &from.progress).await
    }

    /// Copies the checkpoint's drives, before anything of the VM changes.
    async fn stage_drives(&self, from: &RestoreFrom) -> Result<Vec<Staged>, ToolError> {
        let mut staged = Vec::with_capacity(from.drives.len());
        for (id, file, size) in &from.drives {
            from.progress.step("copying the drives of the checkpoint");
            match self.shared.drives.stage_copy(file, *size, &from.progress).await {
                Ok(path) => staged.push(Staged { drive: *id, path, size: *size }),
                Err(error) => {
                    self.forget(staged).await;
                    return Err(drive_error(error));
                }
            }
        }
        Ok(staged)
    }

    async fn put_drives_in_place(&mut self, staged: Vec<Staged>) -> Result<(), ToolError> {
        if staged.is_empty() {
            return Ok(());
        }
        let _locked = match self.lock_drives().await {
            Ok(locked) => locked,
            Err(error) => {
                self.forget(staged).await;
                return Err(error);
            }
        };
        let sizes: Vec<_> = staged.iter().map(|staged| (staged.drive, staged.size)).collect();
        for Staged { drive, path, .. } in &staged {
            let placed = self.shared.drives.put_in_place(&self.shared.paths.drive(*drive), path).await;
            placed.map_err(drive_error)?;
        }
        for (drive, size) in &sizes {
            for known in self.drives.iter_mut().filter(|known| known.id == *drive) {
                known.size = *size;
            }
        }
        let written = self.shared.store.write(move |tx| -> Result<(), StoreError> {
            sizes.iter().try_for_each(|(drive, size)| drives::set_size(tx, *drive, *size))
        });
        written.await.map_err(store_error)
    }

    /// Removes copies that are not used; what cannot be removed is removed at the daemon's next start.
    async fn forget(&self, staged: Vec<Staged>) {
        for Staged { path, .. } in staged {
            if let Err(error) = self.shared.drives.delete(&path).await {
                tracing::warn!(path = %path.display(), %error, "cannot remove the copy of a drive");
            }
        }
    }
}

/// A copy of a drive under a temporary name.
struct Staged {
    drive: DriveId,
    path: PathBuf,
    size: ByteSize,
}
