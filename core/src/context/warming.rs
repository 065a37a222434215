//! What of warm starts is in memory only: whether a machine is being prepared now, and which ones cannot be.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

/// Timeout for a machine that is being prepared to be given up.
const END_MAX: Duration = Duration::from_secs(3);

/// The preparation of machines for warm starts: one at a time. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Warming {
    one: Arc<tokio::sync::Mutex<()>>,
    refused: Arc<Mutex<HashSet<String>>>,
    stop: CancellationToken,
}

impl Warming {
    /// Begins to prepare a machine, until the guard is dropped. `None` if one is being prepared, or the daemon ends.
    pub(crate) fn begin(&self) -> Option<OwnedMutexGuard<()>> {
        if self.stop.is_cancelled() {
            return None;
        }
        self.one.clone().try_lock_owned().ok()
    }

    /// Cancelled once nothing is to be prepared any more.
    pub(crate) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Has what is being prepared given up, and waits for that a while. Nothing is prepared afterwards.
    pub(crate) async fn end(&self) {
        self.stop.cancel();
        if tokio::time::timeout(END_MAX, self.one.lock()).await.is_err() {
            tracing::warn!("a machine that is being prepared does not end; the next daemon ends it");
        }
    }

    /// Does not prepare machines of this sort again, as long as this daemon runs.
    pub(crate) fn refuse(&self, sort: String) {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).insert(sort);
    }

    /// Whether machines of this sort are not prepared.
    pub(crate) fn is_refused(&self, sort: &str) -> bool {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).contains(sort)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_machine_is_prepared_at_a_time_and_none_after_the_end() {
        let warming = Warming::default();
        let first = warming.begin().unwrap();
        assert!(warming.begin().is_none());
        drop(first);
        drop(warming.begin().unwrap());
        warming.refuse("small".into());
        assert!(warming.is_refused("small") && !warming.is_refused("large"));
        warming.end().await;
        assert!(warming.begin().is_none() && warming.stop().is_cancelled());
    }
}
