//! Stores events in batches, and says how many were dropped.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Events;
use crate::store::{Store, events};

/// The time between two batches: a killed daemon loses no more than that.
const PATIENCE: Duration = Duration::from_millis(80);
/// The least time between two events that say how many were dropped.
const TELL: Duration = Duration::from_secs(1);
/// How long to wait when there is nothing to do.
const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);
/// The delay before a failed write is retried.
const AGAIN: Duration = Duration::from_secs(2);

/// Stores events until the last clone of them is dropped, or they are closed.
pub(crate) fn keep(store: Store, events: &Events) -> impl Future<Output = ()> + use<> {
    let inner = &events.0;
    let (wake, closing) = (Arc::clone(&inner.wake), inner.closing.clone());
    let stored = inner.stored.clone().drop_guard();
    let weak = Arc::downgrade(inner);
    async move {
        let _stored = stored;
        let (mut told_at, mut has_untold) = (None::<Instant>, false);
        loop {
            let wait = if has_untold { TELL } else { FOREVER };
            tokio::select! {
                _ = timeout(wait, wake.notified()) => {}
                () = closing.cancelled() => {}
            }
            if !closing.is_cancelled() {
                sleep(PATIENCE).await;
            }
            let is_last = closing.is_cancelled();
            let Some(inner) = weak.upgrade() else { return };
            let (records, gone) = {
                let mut ring = inner.ring();
                has_untold = ring.has_untold();
                if has_untold && (is_last || told_at.is_none_or(|at| at.elapsed() >= TELL)) {
                    ring.tell_dropped();
                    inner.newest.send_replace(ring.last());
                    (told_at, has_untold) = (Some(Instant::now()), false);
                }
                ring.batch()
            };
            if !(records.is_empty() && gone.is_empty()) {
                let batch = Arc::new((records, gone));
                let rows = Arc::clone(&batch);
                let written = store.write_unsynced(move |tx| events::change(tx, &rows.0, &rows.1)).await;
                if let Err(error) = written {
                    let count = batch.0.len();
                    tracing::warn!(%error, count, "cannot store events yet");
                    inner.ring().unstore(&batch.0, batch.1.clone());
                    if is_last {
                        return;
                    }
                    drop(inner);
                    tokio::select! {
                        () = sleep(AGAIN) => {}
                        () = closing.cancelled() => {}
                    }
                    wake.notify_one();
                    continue;
                }
            }
            if is_last {
                return;
            }
        }
    }
}
