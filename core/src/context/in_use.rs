//! What is done with which checkpoint: one that is read is neither removed nor packed meanwhile.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nexus_schema::id::CheckpointId;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The checkpoints in use. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct InUse(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    all: Mutex<HashMap<CheckpointId, Use>>,
    /// Notified when the use of a checkpoint has ended.
    ended: Notify,
    /// Set once nothing is packed any more.
    is_closed: AtomicBool,
    /// Held while a memory is unpacked: one at a time.
    unpacking: Arc<tokio::sync::Mutex<()>>,
}

/// What is done with a checkpoint.
#[derive(Debug, Clone)]
enum Use {
    /// So many read it.
    Read(u32),
    /// It is being packed, or another one with it, until somebody else needs it: cancelled then.
    Packed(CancellationToken),
    /// It is being removed.
    Removed,
}

/// The use of one checkpoint, until it is dropped.
#[derive(Debug)]
pub(crate) struct Used {
    all: InUse,
    id: CheckpointId,
}

/// The turn to unpack a memory, until it is dropped.
pub(crate) type Turn = tokio::sync::OwnedMutexGuard<()>;

impl InUse {
    /// Begins to read a checkpoint, which is not removed meanwhile. `None` if it is being removed. One that is being packed is waited for, which ends
    /// its packing soon.
    pub(crate) async fn read(&self, id: CheckpointId) -> Option<Used> {
        self.begin_after_packing(id, Use::Read(1)).await
    }

    /// Begins to remove a checkpoint. `None` if it is in use. One that is being packed is waited for, as by [`InUse::read`].
    pub(crate) async fn remove(&self, id: CheckpointId) -> Option<Used> {
        self.begin_after_packing(id, Use::Removed).await
    }

    /// Begins to pack a checkpoint, or another one with it, until `stop` is cancelled, which others do. `None` if it is in use, or the daemon is ending.
    pub(crate) fn pack(&self, id: CheckpointId, stop: CancellationToken) -> Option<Used> {
        self.unless_closed(self.begin(id, Use::Packed(stop)).ok())
    }

    /// The same as [`InUse::pack`], but one that is being packed is waited for, as by [`InUse::read`].
    pub(crate) async fn pack_anew(&self, id: CheckpointId, stop: CancellationToken) -> Option<Used> {
        self.unless_closed(self.begin_after_packing(id, Use::Packed(stop)).await)
    }

    fn unless_closed(&self, used: Option<Used>) -> Option<Used> {
        used.filter(|_| !self.0.is_closed.load(Ordering::SeqCst))
    }

    /// Begins a use, once nobody packs the checkpoint; that is cancelled. `None` if another use keeps it from that.
    async fn begin_after_packing(&self, id: CheckpointId, new: Use) -> Option<Used> {
        loop {
            let ended = self.0.ended.notified();
            match self.begin(id, new.clone()) {
                Ok(used) => return Some(used),
                Err(Use::Packed(stop)) => stop.cancel(),
                Err(Use::Read(_) | Use::Removed) => return None,
            }
            ended.await;
        }
    }

    /// Ends all packing, for the end of the daemon. Nothing is packed afterwards.
    pub(crate) fn end_packing(&self) {
        self.0.is_closed.store(true, Ordering::SeqCst);
        let all = self.0.all.lock().unwrap_or_else(PoisonError::into_inner);
        for used in all.values() {
            if let Use::Packed(stop) = used {
                stop.cancel();
            }
        }
    }

    /// Waits for the turn to unpack a memory.
    pub(crate) async fn turn(&self) -> Turn {
        self.0.unpacking.clone().lock_owned().await
    }

    /// Begins a use; fails with the one that keeps it from that.
    fn begin(&self, id: CheckpointId, new: Use) -> Result<Used, Use> {
        let mut all = self.0.all.lock().unwrap_or_else(PoisonError::into_inner);
        let is_reading = matches!(new, Use::Read(_));
        match all.get_mut(&id) {
            Some(Use::Read(readers)) if is_reading => *readers = readers.saturating_add(1),
            Some(other) => return Err(other.clone()),
            None => drop(all.insert(id, new)),
        }
        Ok(Used { all: self.clone(), id })
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let mut all = self.all.0.all.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(&self.id) {
            Some(Use::Read(readers)) if *readers > 1 => *readers -= 1,
            Some(_) | None => drop(all.remove(&self.id)),
        }
        drop(all);
        self.all.0.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn ids() -> [CheckpointId; 2] {
        [1, 2].map(|id| CheckpointId::from_i64(id).unwrap())
    }

    #[tokio::test]
    async fn one_that_is_read_is_not_removed_and_others_are() {
        let (all, [one, other]) = (InUse::default(), ids());
        let (first, second) = (all.read(one).await.unwrap(), all.read(one).await.unwrap());
        drop(first);
        assert!(all.remove(one).await.is_none());
        drop(all.remove(other).await.unwrap());
        drop(second);
        let removal = all.remove(one).await.unwrap();
        assert!(all.read(one).await.is_none() && all.remove(one).await.is_none());
        assert!(all.read(other).await.is_some());
        drop(removal);
        assert!(all.read(one).await.is_some() && all.0.all.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn packing_gives_way_and_begins_with_nothing_that_is_in_use() {
        let (all, [one, other]) = (InUse::default(), ids());
        let reading = all.read(one).await.unwrap();
        assert!(all.pack(one, CancellationToken::new()).is_none());
        drop(reading);
        for remove in [false, true] {
            let stop = CancellationToken::new();
            let packing = all.pack(one, stop.clone()).unwrap();
            assert!(all.pack(one, CancellationToken::new()).is_none());
            assert!(all.read(other).await.is_some());
            let asked = all.clone();
            let waiting = tokio::spawn(async move {
                if remove { asked.remove(one).await.is_some() } else { asked.read(one).await.is_some() }
            });
            tokio::time::timeout(Duration::from_secs(20), stop.cancelled()).await.unwrap();
            assert!(!waiting.is_finished());
            drop(packing);
            assert!(tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap());
        }
        let stop = CancellationToken::new();
        let _packing = all.pack(one, stop.clone()).unwrap();
        all.end_packing();
        assert!(stop.is_cancelled() && all.pack(other, CancellationToken::new()).is_none());
        assert!(all.read(other).await.is_some());
    }
}
