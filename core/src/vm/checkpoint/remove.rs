//! Removes checkpoints: asked for, expired, or half made by a daemon that ended.

use std::collections::HashSet;
use std::sync::Arc;

use nexus_schema::{ErrorCode, ToolError};

use super::base;
use super::packed::settle;
use crate::context::Shared;
use crate::op::store_error;
use crate::os::{failpoint, remove as files};
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::store::{StoreError, now};
use crate::vm::recover::orphans;

/// Removes a checkpoint, unless it is being restored. The row goes first: what is left of the files is removed at the next start.
pub(crate) async fn remove(shared: &Arc<Shared>, checkpoint: &CheckpointRecord) -> Result<(), ToolError> {
    let (shared, checkpoint) = (shared.clone(), checkpoint.clone());
    // By itself, so that it is whole whether or not somebody waits for it.
    tokio::spawn(async move { remove_now(&shared, &checkpoint).await })
        .await
        .map_err(|e| ToolError::internal(format!("remove a checkpoint: {e}")))?
}

async fn remove_now(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<(), ToolError> {
    let id = checkpoint.id;
    let Some(_removal) = shared.checkpoints.remove(id).await else {
        let message = format!(
            "checkpoint {} is in use: a VM is being restored from it, or from one that needs it",
            checkpoint.name
        );
        return Err(ToolError::new(ErrorCode::Busy, message).hint("try again in a moment"));
    };
    base::release(shared, checkpoint).await?;
    shared.store.write(move |tx| checkpoints::delete(tx, id)).await.map_err(store_error)?;
    failpoint::reach("checkpoint-forgotten");
    files::tree(&shared.paths.checkpoint(id)).await;
    Ok(())
}

/// Removes the checkpoints whose life is over. What cannot be removed now is looked at again.
pub(crate) async fn expire(shared: &Arc<Shared>) {
    let expired = match shared.store.read(|db| checkpoints::expired(db, now())).await {
        Ok(expired) => expired,
        Err(error) => return tracing::warn!(%error, "cannot look for expired checkpoints"),
    };
    for checkpoint in expired {
        match remove(shared, &checkpoint).await {
            Ok(()) => {
                tracing::info!(checkpoint = %checkpoint.name, vm = %checkpoint.vm_name, "removed an expired checkpoint")
            }
            Err(error) if error.code == ErrorCode::Busy => {}
            Err(error) => {
                tracing::warn!(checkpoint = %checkpoint.name, %error, "cannot remove an expired checkpoint")
            }
        }
    }
}

/// For the start of the daemon: removes what an earlier one left half made, packed or unpacked, but what is `unknown` and kept.
pub(crate) async fn sweep(shared: &Shared, unknown: &HashSet<String>) -> Result<(), ToolError> {
    let kept = shared.store.write(|tx| -> Result<Vec<CheckpointRecord>, StoreError> {
        let (ready, half): (Vec<_>, Vec<_>) = checkpoints::all(tx)?.into_iter().partition(|row| row.ready);
        half.iter().try_for_each(|row| checkpoints::delete(tx, row.id))?;
        Ok(ready)
    });
    let rows = kept.await.map_err(store_error)?;
    let kept = rows.iter().map(|row| row.id.to_string()).chain(unknown.iter().cloned()).collect();
    for name in orphans(&shared.paths.checkpoints(), &kept) {
        tracing::info!(name, "removing a half-made checkpoint");
        files::tree(&shared.paths.checkpoints().join(name)).await;
    }
    settle(shared, rows).await
}
