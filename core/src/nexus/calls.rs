//! Writes the call log, many calls at a time, so that no call waits for it.

use tokio::sync::mpsc;

use crate::store::Store;
use crate::store::calls::{self, CallRecord};

/// How many calls may wait to be written.
pub(super) const QUEUE_MAX: usize = 4096;
/// How many are written at once.
const BATCH: usize = 512;

/// Writes calls until the last sender is gone.
pub(super) async fn record(store: Store, mut queue: mpsc::Receiver<CallRecord>) {
    let mut batch = Vec::with_capacity(BATCH);
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        let calls = std::mem::take(&mut batch);
        if let Err(error) = store.write(move |tx| calls::insert(tx, &calls)).await {
            tracing::warn!(%error, "cannot write the call log");
        }
        // Many calls a second become few writes.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}
