//! What a daemon that was killed within a restore leaves: a rollback whose drives are not all in place is finished, and a guest that has not renewed
//! what it shares with others is ended.

use std::time::Duration;

use nexus_schema::ToolError;

use crate::context::{Shared, drive_error};
use crate::op::store_error;
use crate::os::failpoint;
use crate::store::restores::{self, RollbackRecord};
use crate::store::vms::VmRecord;
use crate::vmm::ShimClient;

/// The reason of a VM that [`end_unrenewed`] has ended.
pub(in crate::vm) const UNRENEWED: &str =
    "nexusd ended before the restored guest had renewed what it shares with others, so the VM was ended";
/// Timeout for a VMM to end after it was killed.
const END_MAX: Duration = Duration::from_secs(20);

/// A rollback that could not be finished yet, and why.
#[derive(Debug)]
pub(in crate::vm) struct Unfinished {
    pub(in crate::vm) rollback: RollbackRecord,
    pub(in crate::vm) error: ToolError,
}

/// The reason of a VM whose rollback cannot be finished.
pub(in crate::vm) fn not_finished(error: &ToolError) -> String {
    format!("its rollback is not finished, and vm_start tries it again: {}", error.message)
}

/// Puts all drives of a rollback in place, and ends it in one step. It can be repeated, whatever cut it off. Nothing may be using the drives.
pub(in crate::vm) async fn finish(shared: &Shared, rollback: &RollbackRecord) -> Result<(), ToolError> {
    for staged in &rollback.drives {
        let (drive, copy) = (shared.paths.drive(staged.drive), shared.paths.drives().join(&staged.staged));
        shared.drives.put_in_place(&drive, &copy).await.map_err(drive_error)?;
        failpoint::reach("rollback-drive-placed");
    }
    let ended = rollback.clone();
    shared.store.write(move |tx| restores::end_rollback(tx, &ended)).await.map_err(store_error)?;
    failpoint::reach("rollback-drives");
    for staged in &rollback.drives {
        let copy = shared.paths.drives().join(&staged.staged);
        if let Err(error) = shared.drives.forget_replaced(&copy).await {
            tracing::warn!(drive = %staged.drive, %error, "a drive that was rolled back is not removed; nexusd retries at its next start");
        }
    }
    Ok(())
}

/// For the start of the daemon: finishes rollbacks that an earlier one began. Returns those that cannot be finished; nothing can use their drives
/// until their VM's task has finished them.
pub(in crate::vm) async fn finish_all(shared: &Shared) -> Result<Vec<Unfinished>, ToolError> {
    let mut left = Vec::new();
    for rollback in shared.store.read(restores::rollbacks).await.map_err(store_error)? {
        let Err(error) = finish(shared, &rollback).await else {
            tracing::info!(vm = %rollback.vm, "finished a rollback of an earlier daemon");
            continue;
        };
        tracing::error!(vm = %rollback.vm, %error, "cannot finish a rollback of an earlier daemon; the vm's next start tries it again");
        let ids: Vec<_> = rollback.drives.iter().map(|staged| staged.drive).collect();
        if let Ok(locked) = shared.drive_locks.take(&ids).await {
            shared.drive_locks.keep(rollback.vm, locked);
        }
        left.push(Unfinished { rollback, error });
    }
    Ok(left)
}

/// Whether a VM's boot goes on from a checkpoint and its guest has, by its row, not proved that it renewed what it shares with others.
pub(in crate::vm) async fn is_unrenewed(shared: &Shared, record: &VmRecord) -> Result<bool, ToolError> {
    if record.boot_id.is_none() || record.guest.as_ref().is_some_and(|guest| guest.configured) {
        return Ok(false);
    }
    let id = record.id;
    let restored = shared.store.read(move |db| restores::restored_boot(db, id)).await.map_err(store_error)?;
    Ok(restored == record.boot_id)
}

/// Ends a VMM that an earlier daemon restored, if its guest is not renewed: the nonce that it would prove it with is lost. Returns whether it was ended.
pub(in crate::vm) async fn end_unrenewed(
    shared: &Shared,
    record: &VmRecord,
    shim: &ShimClient,
) -> Result<bool, ToolError> {
    if !is_unrenewed(shared, record).await? {
        return Ok(false);
    }
    tracing::warn!(vm = %record.name, "ending a restored vm whose guest was not renewed before nexusd ended");
    if let Err(error) = shim.kill().await {
        tracing::error!(vm = %record.name, %error, "cannot kill the VMM");
    }
    let is_gone = tokio::time::timeout(END_MAX, shim.wait()).await.is_ok();
    if !is_gone {
        tracing::error!(vm = %record.name, "the VMM is still running after it was killed");
    }
    Ok(is_gone)
}
