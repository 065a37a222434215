//! Locks drives: only one operation (a start of its VM, a clone, a resize, a deletion) may use a
//! drive at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_schema::id::{DriveId, VmId};
use tokio::sync::OwnedMutexGuard;

/// How long to wait for another operation before the drive is reported as busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// The drives in use.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    all: Mutex<HashMap<DriveId, Arc<tokio::sync::Mutex<()>>>>,
    /// The drives of VMs that nothing may use until their VM's task takes them.
    kept: Mutex<HashMap<VmId, Locked>>,
}

/// Exclusive use of some drives, until it is dropped.
#[derive(Debug)]
pub(crate) struct Locked(#[expect(dead_code, reason = "held for its end")] Vec<OwnedMutexGuard<()>>);

impl Locks {
    /// Locks all of these drives; the error is the drive that stayed busy.
    pub(crate) async fn take(&self, drives: &[DriveId]) -> Result<Locked, DriveId> {
        self.take_within(drives, PATIENCE).await
    }

    /// Keeps drives of a VM locked, until [`Locks::take_kept`].
    pub(crate) fn keep(&self, vm: VmId, locked: Locked) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(vm, locked);
    }

    /// The drives of a VM that were kept locked, if they were.
    pub(crate) fn take_kept(&self, vm: VmId) -> Option<Locked> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm)
    }

    async fn take_within(&self, drives: &[DriveId], patience: Duration) -> Result<Locked, DriveId> {
        let mut ids = drives.to_vec();
        // All callers lock in the same order, so there is no deadlock.
        ids.sort();
        ids.dedup();
        let deadline = tokio::time::Instant::now() + patience;
        let mut guards = Vec::with_capacity(ids.len());
        for id in ids {
            let lock = self.lock_of(id);
            match tokio::time::timeout_at(deadline, lock.lock_owned()).await {
                Ok(guard) => guards.push(guard),
                Err(_) => return Err(id),
            }
        }
        Ok(Locked(guards))
    }

    fn lock_of(&self, id: DriveId) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, lock| Arc::strong_count(lock) > 1);
        all.entry(id).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: i64) -> DriveId {
        DriveId::from_i64(number).unwrap()
    }

    #[tokio::test]
    async fn a_drive_is_taken_once_and_forgotten_when_it_is_free() {
        let locks = Locks::default();
        let held = locks.take(&[id(2), id(1), id(2)]).await.unwrap();
        assert_eq!(locks.take_within(&[id(3), id(2)], Duration::from_millis(20)).await.unwrap_err(), id(2));
        let vm = VmId::from_i64(1).unwrap();
        assert!(locks.take_kept(vm).is_none());
        locks.keep(vm, held);
        locks.take_within(&[id(2)], Duration::from_millis(20)).await.unwrap_err();
        drop(locks.take_kept(vm).unwrap());
        drop(locks.take(&[id(2)]).await.unwrap());
        drop(locks.take(&[id(9)]).await.unwrap());
        assert_eq!(locks.all.lock().unwrap().len(), 1);
    }
}
