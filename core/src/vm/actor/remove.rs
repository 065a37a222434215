//! The deletion of a VM: its rows, then its files.

use nexus_schema::id::DriveId;
use nexus_schema::tools::vm::{DeletedVm, VmState};
use nexus_schema::{Name, ToolError};

use super::{Actor, DAEMON};
use crate::context::Shared;
use crate::os::{failpoint, remove as files};
use crate::store::drives::DriveRecord;
use crate::store::vms::VmRecord;
use crate::store::{StoreError, drives, history, vms};
use crate::vm::policy;

impl Actor {
    pub(super) async fn delete(&mut self, who: &str, force: bool, why: &str) -> Result<DeletedVm, ToolError> {
        policy::delete(self.record.name.as_str(), self.record.state, self.record.protected, force)?;
        self.check_alone().await?;
        self.kill_boot().await?;
        let output = DeletedVm {
            id: self.record.id,
            name: self.record.name.clone(),
            drives: self.own_drives().map(|d| d.name.clone()).collect::<Vec<Name>>(),
        };
        let ids: Vec<DriveId> = self.own_drives().map(|d| d.id).collect();
        if let Err(error) = self.remove(&ids, why, who).await {
            self.down_undeleted(&error).await;
            return Err(error);
        }
        Ok(output)
    }

    /// Removes a VM whose creation or fork did not end well, whatever was set on it meanwhile. `drives` are those that are made for one that is
    /// still being created.
    pub(super) async fn undo(&mut self, drives: &[DriveId], reason: &str) -> Result<(), ToolError> {
        self.kill_boot().await?;
        let own: Vec<DriveId> = match self.record.state {
            VmState::Creating => drives.to_vec(),
            _ => self.own_drives().map(|drive| drive.id).collect(),
        };
        let removed = self.remove(&own, reason, DAEMON).await;
        if let Err(error) = &removed {
            self.down_undeleted(error).await;
        }
        removed
    }

    /// Records that a VM does not run any more: it was killed for its deletion, and the deletion failed.
    async fn down_undeleted(&mut self, error: &ToolError) {
        if self.record.state == VmState::Suspended {
            // Nothing ran of it, and it sleeps on with its memory.
            return;
        }
        if self.sleep_on(&error.message).await {
            return;
        }
        let to = match self.record.state {
            VmState::Starting => VmState::Failed,
            VmState::Running | VmState::Ready | VmState::Unreachable | VmState::Paused => VmState::Crashed,
            VmState::Stopping => VmState::Stopped,
            VmState::Creating
            | VmState::Created
            | VmState::Suspended
            | VmState::Stopped
            | VmState::Crashed
            | VmState::Failed => return,
        };
        let reason = format!("it was killed for its deletion, which failed: {}", error.message);
        self.settle(to, Some(reason), "its deletion failed").await;
    }

    /// Returns the drives that are deleted with the VM; its other drives stay, detached.
    fn own_drives(&self) -> impl Iterator<Item = &DriveRecord> {
        self.drives.iter().filter(|d| d.made_for == Some(self.record.id))
    }

    /// Removes the VM from the store and from memory, then removes its files.
    pub(super) async fn remove(
        &mut self,
        drive_ids: &[DriveId],
        reason: &str,
        who: &str,
    ) -> Result<(), ToolError> {
        self.end_waiting().await;
        failpoint::reach("delete-down");
        remove_rows(&self.shared, &self.record, drive_ids, reason, who).await?;
        failpoint::reach("delete-rows-gone");
        self.deleted = true;
        self.shared.vms.remove(self.record.id, &self.record.name);
        self.shared.egresses.forget(self.record.id);
        drop(self.shared.drive_locks.take_kept(self.record.id));
        self.publish();
        remove_files(&self.shared, &self.record, drive_ids).await;
        Ok(())
    }
}

/// Removes a VM and its drives from the store; its history stays.
pub(in crate::vm) async fn remove_rows(
    shared: &Shared,
    record: &VmRecord,
    drive_ids: &[DriveId],
    reason: &str,
    who: &str,
) -> Result<(), ToolError> {
    let why = reason.to_owned();
    let (row, ids, reason, who) = (record.clone(), drive_ids.to_vec(), reason.to_owned(), who.to_owned());
    let removed = shared
        .store
        .write(move |tx| -> Result<(), StoreError> {
            for id in ids {
                drives::delete(tx, id)?;
            }
            vms::delete(tx, row.id)?;
            history::insert(tx, row.id, &row.name, Some(row.state), None, &reason, &who, row.boot_id)
        })
        .await;
    removed.map_err(crate::op::store_error)?;
    shared.events.deleted(record, &why);
    Ok(())
}

/// Removes the files of a VM whose rows were deleted. If this fails, the daemon removes them at its next start.
pub(in crate::vm) async fn remove_files(shared: &Shared, record: &VmRecord, drive_ids: &[DriveId]) {
    for id in drive_ids {
        if let Err(error) = shared.drives.delete(&shared.paths.drive(*id)).await {
            tracing::warn!(vm = %record.name, drive = %id, %error, "cannot remove a drive's file; nexusd retries at its next start");
        }
    }
    if let Some(memory) = &record.suspended {
        files::tree(&shared.paths.suspended(memory.manifest.checkpoint)).await;
    }
    let directory = shared.paths.vm(record.id);
    if let Err(error) = tokio::task::spawn_blocking(move || match fs_err::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
    .await
    .unwrap_or(Ok(()))
    {
        tracing::warn!(vm = %record.name, %error, "cannot remove the VM's directory; nexusd retries at its next start");
    }
}
