//! The audit log. Calls are queued and written in batches, so that no call waits for the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::audit_file::AuditFile;
use crate::config::AuditFile as Settings;
use crate::store::Store;
use crate::store::calls::{self, CallRecord};

/// Maximum number of queued calls.
const QUEUE_MAX: usize = 8192;
/// Number of queued calls from which a batch is written without waiting for more.
const FULL: usize = QUEUE_MAX / 8;
/// Maximum time between two batches, and the number of checks of the queue during that time: a killed daemon loses no more than that.
const PATIENCE: (Duration, u32) = (Duration::from_millis(80), 8);

/// The queue of calls to be written.
#[derive(Debug)]
pub(crate) struct CallLog {
    queue: mpsc::Sender<CallRecord>,
    /// Number of calls that were dropped because the queue or the disk was full.
    lost: Arc<AtomicU64>,
    /// Cancelled when the log accepts no more calls.
    closing: CancellationToken,
    /// Cancelled when all calls are written.
    written: CancellationToken,
}

/// The receiving end of a log, for [`record`].
#[derive(Debug)]
pub(crate) struct Waiting {
    queue: mpsc::Receiver<CallRecord>,
    lost: Arc<AtomicU64>,
    closing: CancellationToken,
    written: CancellationToken,
}

impl CallLog {
    /// Returns a log and its receiving end for [`record`].
    pub(crate) fn new() -> (Self, Waiting) {
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let (closing, written) = (CancellationToken::new(), CancellationToken::new());
        let lost = Arc::default();
        let waiting =
            Waiting { queue, lost: Arc::clone(&lost), closing: closing.clone(), written: written.clone() };
        (Self { queue: sender, lost, closing, written }, waiting)
    }

    /// Adds a call; never waits.
    pub(crate) fn add(&self, call: CallRecord) {
        if self.queue.try_send(call).is_ok() {
            return;
        }
        if self.closing.is_cancelled() {
            return;
        }
        lose(&self.lost, 1, "the audit log is behind");
    }

    /// How many calls are not in the log since the daemon started.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Counts lost calls.
fn lose(lost: &AtomicU64, more: u64, why: &str) {
    let before = lost.fetch_add(more, Ordering::Relaxed);
    // Warn at 1, 2, 4, 8 and so on, so that the warnings themselves cost little.
    if before.checked_ilog2() != (before + more).checked_ilog2() {
        tracing::warn!(lost = before + more, why, "calls are not in the audit log");
    }
}

impl CallLog {
    /// Stops accepting calls, and waits until the queued ones are written.
    pub(crate) async fn close(&self) {
        self.closing.cancel();
        self.written.cancelled().await;
    }
}

/// Writes calls until the log is closed or dropped; also to a file, if one is configured.
pub(crate) async fn record(store: Store, waiting: Waiting, file: Option<Settings>) {
    let Waiting { mut queue, lost, closing, written } = waiting;
    let mut file = file.map(AuditFile::new);
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
                let calls: Arc<[CallRecord]> = std::mem::take(&mut batch).into();
                let (rows, count) = (Arc::clone(&calls), calls.len() as u64);
                let stored = store.write_unsynced(move |tx| calls::insert(tx, &rows)).await;
                let (kept, exported) = export(file, calls).await;
                file = kept;
                if let Err(error) = stored {
                    lose(&lost, count, &error.to_string());
                } else if let Err(error) = exported {
                    lose(&lost, count, &format!("write audit_file: {error}"));
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

/// Appends calls to the file, if there is one.
async fn export(
    file: Option<AuditFile>,
    calls: Arc<[CallRecord]>,
) -> (Option<AuditFile>, std::io::Result<()>) {
    let Some(mut file) = file else { return (None, Ok(())) };
    let appended = tokio::task::spawn_blocking(move || {
        let appended = file.append(&calls);
        (Some(file), appended)
    });
    appended.await.unwrap_or_else(|error| (None, Err(std::io::Error::other(error))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::call;

    #[tokio::test]
    async fn a_burst_is_recorded_whole_and_what_has_no_room_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nexus.db")).unwrap();
        let (log, queue) = CallLog::new();
        for _ in 0..QUEUE_MAX + 3 {
            log.add(call());
        }
        assert_eq!(log.lost(), 3);
        tokio::spawn(record(store.clone(), queue, None));
        log.close().await;
        // Later calls are neither recorded nor waited for.
        log.add(call());
        log.close().await;
        let count = store.read(calls::count).await.unwrap();
        assert_eq!(count as usize, QUEUE_MAX);
    }

    #[tokio::test]
    async fn calls_that_find_no_room_in_the_store_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nexus.db")).unwrap();
        let full = store.write(|tx| -> Result<(), crate::store::StoreError> {
            let pages: u32 = tx.query_row("PRAGMA page_count", [], |row| row.get(0))?;
            tx.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
            Ok(())
        });
        full.await.unwrap();
        let (log, queue) = CallLog::new();
        for _ in 0..QUEUE_MAX {
            log.add(call());
        }
        tokio::spawn(record(store.clone(), queue, None));
        log.close().await;
        assert!(log.lost() > 0, "{}", log.lost());
        assert_eq!(u64::from(store.read(calls::count).await.unwrap()) + log.lost(), QUEUE_MAX as u64);
    }
}
