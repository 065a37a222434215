//! Periodic work of the daemon: deletes old history, keeps a reserve file for a full disk, and counts on the database's epoch.

use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::{Timestamp, ToolError};
use tokio::time::{Instant, sleep};

use crate::context::Shared;
use crate::op::store_error;
use crate::store::{StoreError, history, now, ops};
use crate::vm::{checkpoint, defaults, unknown, warm};

/// Interval between two checks of the reserve.
const LOOK: Duration = Duration::from_secs(60);
/// Interval between two deletions of old rows.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Does the periodic work as long as the daemon runs.
pub(super) async fn keep_tidy(shared: Weak<Shared>) {
    let mut sweep_at = Instant::now();
    let mut counted = None;
    loop {
        let Some(now) = shared.upgrade() else { return };
        let reserve = now.reserve.clone();
        tokio::task::spawn_blocking(move || reserve.keep()).await.ok();
        if sweep_at <= Instant::now() {
            sweep_at = Instant::now() + DAY;
            match now.forget_old(false).await {
                Ok(0) => {}
                Ok(rows) => tracing::info!(rows, "deleted old history and operations"),
                Err(error) => tracing::warn!(%error, "cannot delete old history and operations"),
            }
        }
        checkpoint::expire(&now).await;
        warm::tidy(&now).await;
        unknown::count_work(&now, &mut counted).await;
        drop(now);
        sleep(LOOK).await;
    }
}

impl Shared {
    /// Deletes history and ended operations beyond what the settings keep. Returns the number of rows. With `dry_run` nothing is deleted.
    pub(super) async fn forget_old(self: &Arc<Self>, dry_run: bool) -> Result<usize, ToolError> {
        let kept = defaults::history(&self.store).await?;
        let age = i64::from(kept.days).saturating_mul(24 * 60 * 60 * 1000);
        let before = Timestamp::from_millis(now().as_millis().saturating_sub(age));
        let forgotten = self.store.write(move |tx| -> Result<usize, Undo> {
            let rows = history::forget(tx, before, kept.per_vm)? + ops::forget(tx, before)?;
            if dry_run { Err(Undo::DryRun(rows)) } else { Ok(rows) }
        });
        match forgotten.await {
            Ok(rows) | Err(Undo::DryRun(rows)) => Ok(rows),
            Err(Undo::Store(error)) => Err(store_error(error)),
        }
    }
}

/// Why a transaction is rolled back.
enum Undo {
    DryRun(usize),
    Store(StoreError),
}

impl From<StoreError> for Undo {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
