//! Writes the call log, many calls at a time, so that no call waits for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::store::Store;
use crate::store::calls::{self, CallRecord};

/// How many calls may wait to be written.
const QUEUE_MAX: usize = 8192;
/// From how many on they are written without waiting for more.
const FULL: usize = QUEUE_MAX / 8;
/// How long calls wait for others to be written with them, looked at in so many steps.
const PATIENCE: (Duration, u32) = (Duration::from_millis(500), 10);

/// Where calls wait to be written.
#[derive(Debug)]
pub(crate) struct CallLog {
    queue: mpsc::Sender<CallRecord>,
    /// Calls for which there was no room.
    lost: AtomicU64,
}

impl CallLog {
    /// A log, and what [`record`] takes from it.
    pub(crate) fn new() -> (Self, mpsc::Receiver<CallRecord>) {
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        (Self { queue, lost: AtomicU64::new(0) }, waiting)
    }

    /// Adds a call; never waits.
    pub(crate) fn add(&self, call: CallRecord) {
        if self.queue.try_send(call).is_ok() {
            return;
        }
        // Said at 1, 2, 4, 8 and so on: a log of what is lost must not be what costs most.
        let lost = self.lost.fetch_add(1, Ordering::Relaxed) + 1;
        if lost.is_power_of_two() {
            tracing::warn!(lost, "the call log is behind; calls are not recorded");
        }
    }
}

/// Writes calls until the log is gone.
pub(crate) async fn record(store: Store, mut queue: mpsc::Receiver<CallRecord>) {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, QUEUE_MAX).await > 0 {
        let calls = std::mem::take(&mut batch);
        if let Err(error) = store.write(move |tx| calls::insert(tx, &calls)).await {
            tracing::warn!(%error, "cannot write the call log");
        }
        // Many calls a second become few writes.
        let (whole, steps) = PATIENCE;
        for _ in 0..steps {
            if queue.len() >= FULL || queue.is_closed() {
                break;
            }
            sleep(whole / steps).await;
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
        let recording = tokio::spawn(record(store.clone(), queue));
        drop(log);
        recording.await.unwrap();
        let count = store.read(calls::count).await.unwrap();
        assert_eq!(count as usize, QUEUE_MAX);
    }
}
