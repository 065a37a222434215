//! Keeps checkpoints small and few: one task packs memories that were not used for a while, one at a time, and removes what is beyond the caps.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::id::CheckpointId;
use nexus_schema::{TimeSpan, ToolError};
use tokio::task::spawn_blocking;

use super::caps::{self, Caps};
use super::packed::{due_in, pack};
use crate::context::Shared;
use crate::op::store_error;
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::vm::defaults;

/// How long nothing is looked at, at most.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// And at least, so that a short setting does not keep the disk busy.
const LOOK_MIN: Duration = Duration::from_secs(1);

/// What is done with checkpoints by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Upkeep {
    /// How long a memory is not used before it is packed; zero: never.
    pub(crate) pack_after: TimeSpan,
    /// What is kept of each VM.
    pub(crate) caps: Caps,
}

/// Does the upkeep for as long as the daemon runs.
pub(crate) async fn keep(shared: Weak<Shared>) {
    // Those that cannot be packed; tried again by the next daemon.
    let mut given_up = HashSet::new();
    loop {
        let Some(shared) = shared.upgrade() else { return };
        caps::apply(&shared, None).await;
        let pause = match pack_next(&shared, &mut given_up).await {
            Ok(pause) => pause.clamp(LOOK_MIN, LOOK_MAX),
            Err(error) => {
                tracing::warn!(%error, "cannot look for checkpoints to pack");
                LOOK_MAX
            }
        };
        let changed = shared.upkeep.clone();
        // Nothing of the daemon is held meanwhile.
        drop(shared);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = changed.notified() => {}
        }
    }
}

/// Packs the first memory that is due; returns how long it is until the next one.
async fn pack_next(
    shared: &Arc<Shared>,
    given_up: &mut HashSet<CheckpointId>,
) -> Result<Duration, ToolError> {
    let after = defaults::upkeep(&shared.store).await?.pack_after;
    if after.is_zero() {
        return Ok(LOOK_MAX);
    }
    let rows = shared.store.read(|db| checkpoints::list(db, None, None, u32::MAX));
    let mut rows = rows.await.map_err(store_error)?;
    given_up.retain(|id| rows.iter().any(|row| row.id == *id));
    rows.retain(|row| !given_up.contains(&row.id));
    let paths = shared.paths.clone();
    let looked = spawn_blocking(move || {
        let due = |row: CheckpointRecord| {
            due_in(&paths.checkpoint(row.id), after.duration()).map(|left| (left, row))
        };
        rows.into_iter().filter_map(due).collect::<Vec<_>>()
    });
    let looked = looked.await.map_err(|e| ToolError::internal(format!("look at memories: {e}")))?;
    let mut pause = LOOK_MAX;
    for (left, row) in looked {
        if !left.is_zero() {
            pause = pause.min(left);
            continue;
        }
        match pack(shared, &row).await {
            Ok(bytes) => {
                tracing::info!(checkpoint = %row.name, vm = %row.vm_name, before = row.memory_bytes, bytes, "packed a memory");
                // The settings may be others by now.
                return Ok(Duration::ZERO);
            }
            Err(error) if error.gives_way() => {}
            Err(error) => {
                let why = nexus_schema::error::chain(&error);
                tracing::warn!(checkpoint = %row.name, vm = %row.vm_name, why, "a memory is not packed");
                if error.is_final() {
                    given_up.insert(row.id);
                }
            }
        }
    }
    Ok(pause)
}
