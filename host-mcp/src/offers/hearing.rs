//! Whether the client of a session reads what belongs to none of its requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Who reads in one session. Clones are about the same session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hearing(Arc<Readers>);

#[derive(Debug, Default)]
struct Readers {
    count: AtomicUsize,
    begun: Notify,
}

/// A stream that a client reads, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reader(Arc<Readers>);

impl Hearing {
    /// A client begins to read.
    pub(crate) fn begin(&self) -> Reader {
        self.0.count.fetch_add(1, Ordering::SeqCst);
        self.0.begun.notify_one();
        Reader(Arc::clone(&self.0))
    }

    /// Waits until a client reads; for one task of a session.
    pub(crate) async fn begun(&self) {
        while self.0.count.load(Ordering::SeqCst) == 0 {
            self.0.begun.notified().await;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn one_waits_until_a_client_reads() {
        let hearing = Hearing::default();
        let is_heard =
            async || tokio::time::timeout(Duration::from_millis(20), hearing.begun()).await.is_ok();
        assert!(!is_heard().await);
        let (first, second) = (hearing.begin(), hearing.begin());
        assert!(is_heard().await);
        drop(first);
        assert!(is_heard().await);
        drop(second);
        assert!(!is_heard().await);
    }
}
