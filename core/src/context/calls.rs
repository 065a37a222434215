//! The call log. Calls are queued and written in batches, so that no call waits for the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::store::Store;
use crate::store::calls::{self, CallRecord};

/// Maximum number of queued calls.
const QUEUE_MAX: usize = 8192;
/// Number of queued calls from which a batch is written without waiting for more.
const FULL: usize = QUEUE_MAX / 8;
/// Maximum time between two batches, and the number of checks of the queue during that time.
const PATIENCE: (Duration, u32) = (Duration::from_millis(500), 10);

/// The queue of calls to be written.
#[derive(Debug)]
pub(crate) struct CallLog {
    queue: mpsc::Sender<CallRecord>,
    /// Number of calls that were dropped because the queue was full.
    lost: AtomicU64,
    /// Cancelled when the log accepts no more calls.
    closing: CancellationToken,
    /// Cancelled when all calls are written.
    written: CancellationToken,
}

/// The receiving end of a log, for [`record`].
#[derive(Debug)]
pub(crate) struct Waiting {
    queue: mpsc::Receiver<CallRecord>,
    closing: CancellationToken,
    written: CancellationToken,
}

impl CallLog {
    /// Returns a log and its receiving end for [`record`].
    pub(crate) fn new() -> (Self, Waiting) {
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let (closing, written) = (CancellationToken::new(), CancellationToken::new());
        let waiting = Waiting { queue, closing: closing.clone(), written: written.clone() };
        (Self { queue: sender, lost: AtomicU64::new(0), closing, written }, waiting)
    }

    /// Adds a call; never waits.
    pub(crate) fn add(&self, call: CallRecord) {
        if self.queue.try_send(call).is_ok() {
            return;
        }
        if self.closing.is_cancelled() {
            return;
        }
        // Warn at 1, 2, 4, 8 and so on, so that the warnings themselves cost little.
        let lost = self.lost.fetch_add(1, Ordering::Relaxed) + 1;
        if lost.is_power_of_two() {
            tracing::warn!(lost, "the call log's queue is full; dropping calls");
        }
    }
}

impl CallLog {
    /// Stops accepting calls, and waits until the queued ones are written.
    pub(crate) async fn close(&self) {
        self.closing.cancel();
        self.written.cancelled().await;
    }
}

/// Writes calls until the log is closed or dropped.
pub(crate) async fn record(store: Store, waiting: Waiting) {
    let Waiting { mut queue, closing, written } = waiting;
    let _written = written.drop_guard();
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled(), if !queue.is_closed() => queue.close(),
            _ = queue.recv_many(&mut batch, QUEUE_MAX) => {
                if batch.is_empty() {
                    return;
                }
                let calls = std::mem::take(&mut batch);
                if let Err(error) = store.write(move |tx| calls::insert(tx, &calls)).await {
                    tracing::warn!(%error, "cannot write the call log");
                }
                // Wait for more calls, so that many calls per second become few writes.
                let (whole, steps) = PATIENCE;
                for _ in 0..steps {
                    if queue.len() >= FULL || closing.is_cancelled() {
                        break;
                    }
                    sleep(whole / steps).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::Timestamp;

    use super::*;

    fn call() -> CallRecord {
        CallRecord {
            started: Timestamp::from_millis(1),
            owner: "uid:0".into(),
            tool: "guest_file_stat".into(),
            vm: None,
            duration: Duration::from_micros(60),
            outcome: "ok",
        }
    }

    #[tokio::test]
    async fn a_burst_is_recorded_whole_and_what_has_no_room_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nexus.db")).unwrap();
        let (log, queue) = CallLog::new();
        for _ in 0..QUEUE_MAX + 3 {
            log.add(call());
        }
        assert_eq!(log.lost.load(Ordering::Relaxed), 3);
        tokio::spawn(record(store.clone(), queue));
        log.close().await;
        // Later calls are neither recorded nor waited for.
        log.add(call());
        log.close().await;
        let count = store.read(calls::count).await.unwrap();
        assert_eq!(count as usize, QUEUE_MAX);
    }
}
