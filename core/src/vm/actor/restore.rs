//! A VM that goes on from a checkpoint: what runs of it ends, its drives become as they were, and its VMM starts with the memory that was saved.

use std::path::PathBuf;

use data_encoding::{BASE64, HEXLOWER};
use nexus_schema::id::{BootId, DriveId};
use nexus_schema::link::{Configure, Resume, ResumeKind};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ErrorCode, ToolError};

use super::Actor;
use crate::context::{RestoreFrom, drive_error};
use crate::drive::Locked;
use crate::guest::Restored;
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::{failpoint, random};
use crate::store::restores::{self, RollbackRecord, StagedDrive};
use crate::vm::stop::Rung;
use crate::vm::{checkpoint, policy};
use crate::vmm::{Restore, SavedKind};

/// Returns what the VMM and the daemon need for a restore, and tells the guest what to renew.
pub(super) fn begin(from: &RestoreFrom, configure: &mut Configure) -> (Restore, Restored) {
    let nonce = random::token();
    let mut entropy = [0; 32];
    random::fill(&mut entropy);
    let is_new = matches!(from.kind, ResumeKind::Fork | ResumeKind::Warm);
    let machine_id = is_new.then(|| {
        let mut id = [0; 16];
        random::fill(&mut id);
        HEXLOWER.encode(&id)
    });
    configure.resume = Some(Resume {
        kind: from.kind,
        entropy_base64: BASE64.encode(&entropy),
        machine_id,
        // Those of a woken VM have run, and a warm start is one for the image.
        run_hooks: matches!(from.kind, ResumeKind::Fork | ResumeKind::Rollback),
    });
    configure.wait_for_init_s = 0;
    // They were written when the VM was made, unless that is now, and drives are mounted in the memory that is restored.
    if from.kind != ResumeKind::Warm {
        configure.files.clear();
    }
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
        checkpoint::restorable(&self.record)?;
        self.check_alone().await?;
        // They were compared before; one may have been detached since, and be another VM's now.
        let has_them = from.drives.iter().all(|(id, ..)| self.drives.iter().any(|drive| drive.id == *id));
        if !has_them {
            let message = format!("{name} has other drives than at the checkpoint");
            return Err(ToolError::new(ErrorCode::Changed, message)
                .hint("attach the drives that it had, in their order"));
        }
        Box::pin(self.finish_rollback()).await?;
        // What only the start would find missing, after the drives were replaced.
        self.needs(Some(from)).await?;
        // Before the VM ends: whoever has a drive by then may wait for this task, and the rollback would fail.
        let locked = match from.drives.is_empty() {
            true => None,
            false => Some(self.lock_drives().await?),
        };
        let staged = self.stage_drives(from).await?;
        failpoint::reach("rollback-staged");
        if let Err(error) = self.end_for_restore(from).await {
            self.forget(staged).await;
            return Err(error);
        }
        if let Some(locked) = locked {
            self.put_drives_in_place(from, staged, locked).await?;
        }
        // A fault of the emulator must not make a cold start of it.
        self.had_mishap = true;
        let why = match from.kind {
            ResumeKind::Fork => format!("forked from checkpoint {}", from.manifest.checkpoint),
            ResumeKind::Rollback => format!("rolled back to checkpoint {}", from.manifest.checkpoint),
            ResumeKind::Wake => "woken".to_owned(),
            ResumeKind::Warm => "started from a prepared machine".to_owned(),
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

    /// Ends what runs of the VM. If that fails, it is going down or runs on, and nothing of its drives has changed.
    async fn end_for_restore(&mut self, from: &RestoreFrom) -> Result<(), ToolError> {
        if self.boot.is_none() {
            return Ok(());
        }
        from.progress.step("ending the VMM");
        let (state, reason) = (self.record.state, self.record.reason.clone());
        if state != VmState::Stopping
            && let Err(error) =
                self.transition(VmState::Stopping, None, "rollback requested", &from.who).await
        {
            // A rollback that cannot be recorded does not happen.
            (self.record.state, self.record.reason) = (state, reason);
            self.unwritten = None;
            self.publish();
            return Err(error);
        }
        if let Err(error) = self.kill_boot().await {
            // Drives are never replaced under a VMM that runs. It is stopped as by a forced stop.
            self.climb(Rung::Kill).await;
            return Err(error);
        }
        failpoint::reach("rollback-down");
        self.settle(VmState::Stopped, None, "ended for its rollback").await;
        Ok(())
    }

    /// Replaces the VM's drives, which are locked, by copies that are on the disk. From its first change on it is finished, by a later start or daemon if
    /// necessary.
    async fn put_drives_in_place(
        &mut self,
        from: &RestoreFrom,
        staged: Vec<Staged>,
        locked: Locked,
    ) -> Result<(), ToolError> {
        let drives = staged.iter().map(|staged| StagedDrive {
            drive: staged.drive,
            staged: staged.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            size_bytes: staged.size.as_bytes(),
        });
        let rollback = RollbackRecord {
            vm: self.record.id,
            checkpoint: from.manifest.checkpoint,
            drives: drives.collect(),
        };
        let begun = rollback.clone();
        // From here on nothing may use them until they are all in place, also if this panics.
        self.shared.drive_locks.keep(self.record.id, locked);
        let written = self.shared.store.write(move |tx| restores::begin_rollback(tx, &begun)).await;
        if let Err(error) = written {
            drop(self.shared.drive_locks.take_kept(self.record.id));
            self.forget(staged).await;
            return Err(store_error(error));
        }
        failpoint::reach("rollback-placing");
        self.place(&rollback).await
    }

    /// Puts the drives of a rollback in place, which are kept locked until that is done.
    async fn place(&mut self, rollback: &RollbackRecord) -> Result<(), ToolError> {
        if let Err(error) = checkpoint::finish(&self.shared, rollback).await {
            let reason = checkpoint::not_finished(&error);
            self.record.reason = Some(reason.clone());
            self.note(&reason).await;
            return Err(ToolError::new(error.code, format!("{}: {reason}", self.record.name))
                .hint("vm_start tries it again; until then nothing can use its drives"));
        }
        drop(self.shared.drive_locks.take_kept(self.record.id));
        for staged in &rollback.drives {
            for known in self.drives.iter_mut().filter(|known| known.id == staged.drive) {
                known.size = ByteSize::bytes(staged.size_bytes);
            }
        }
        self.record.lineage.checkpoint = Some(rollback.checkpoint);
        self.publish();
        Ok(())
    }

    /// Finishes a rollback that could not be finished before, if there is one. Nothing may use the drives until then.
    pub(super) async fn finish_rollback(&mut self) -> Result<(), ToolError> {
        let id = self.record.id;
        let found = self.shared.store.read(move |db| restores::rollback_of(db, id)).await;
        let found = found.map_err(store_error)?;
        let kept = self.shared.drive_locks.take_kept(id);
        // Those that one kept which panicked before it began are free again.
        let Some(rollback) = found else { return Ok(()) };
        let locked = match kept {
            Some(locked) => locked,
            None => self.lock_drives().await?,
        };
        self.shared.drive_locks.keep(id, locked);
        self.place(&rollback).await
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
