//! What of warm starts is in memory only: whether a machine is being prepared now, which ones cannot be, and those that wait for their VMs.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_schema::ByteSize;
use nexus_schema::id::{BootId, CheckpointId, DriveId, VmId};
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;

use crate::vmm::ShimClient;

/// Timeout for a machine that is being prepared to be given up.
const END_MAX: Duration = Duration::from_secs(3);

/// A machine that was restored for one VM that nobody has asked for yet. It stands still.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// The VM that it is for.
    pub(crate) vm: VmId,
    /// That VM's root drive.
    pub(crate) drive: DriveId,
    /// That VM's first boot.
    pub(crate) boot_id: BootId,
    /// What its guest proves itself with.
    pub(crate) nonce: String,
    /// The prepared machine that it goes on from.
    pub(crate) machine: CheckpointId,
    /// The image as VMs ask for it.
    pub(crate) from: String,
    pub(crate) vcpus: u32,
    pub(crate) memory: ByteSize,
    /// The least size of the VM's disk.
    pub(crate) disk: ByteSize,
    pub(crate) shim: ShimClient,
}

/// A waiting machine that a VM is about to take. It waits on if that does not come to be.
#[derive(Debug)]
pub(crate) struct Reserved {
    warming: Warming,
    waiting: Option<Waiting>,
}

impl Reserved {
    /// The VM that the machine is for.
    pub(crate) fn vm(&self) -> Option<VmId> {
        self.waiting.as_ref().map(|waiting| waiting.vm)
    }

    /// Gives the machine to its VM, which is being created.
    pub(crate) fn claim(mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.warming.claims().insert(waiting.vm, waiting);
            self.warming.changed.notify_one();
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.warming.waiting().push(waiting);
        }
    }
}

/// The preparation of machines for warm starts: one at a time. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Warming {
    one: Arc<tokio::sync::Mutex<()>>,
    refused: Arc<Mutex<HashSet<String>>>,
    stop: CancellationToken,
    waiting: Arc<Mutex<Vec<Waiting>>>,
    claimed: Arc<Mutex<HashMap<VmId, Waiting>>>,
    changed: Arc<Notify>,
    pool: Arc<tokio::sync::Mutex<()>>,
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
        let both = async { (self.one.lock().await, self.pool.lock().await) };
        if tokio::time::timeout(END_MAX, both).await.is_err() {
            tracing::warn!("a machine that is being prepared does not end; the next daemon ends it");
        }
    }

    /// Begins to add to the machines that wait, until the guard is dropped. `None` if the daemon ends.
    pub(crate) async fn begin_pool(&self) -> Option<OwnedMutexGuard<()>> {
        let guard = self.pool.clone().lock_owned().await;
        (!self.stop.is_cancelled()).then_some(guard)
    }

    /// Waits until a machine was taken, or the settings were changed.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Has the machines that wait looked at.
    pub(crate) fn look(&self) {
        self.changed.notify_one();
    }

    /// Adds a machine that waits.
    pub(crate) fn add(&self, waiting: Waiting) {
        self.waiting().push(waiting);
    }

    /// How many machines wait for VMs of an image.
    pub(crate) fn count(&self, from: &str) -> usize {
        self.waiting().iter().filter(|waiting| waiting.from == from).count()
    }

    /// Takes the machines that are not to wait any more.
    pub(crate) fn take(&self, is_surplus: impl FnMut(&Waiting) -> bool) -> Vec<Waiting> {
        let mut all = self.waiting();
        let (surplus, kept) = std::mem::take(&mut *all).into_iter().partition(is_surplus);
        *all = kept;
        surplus
    }

    /// Reserves a machine for a VM that is about to be created.
    pub(crate) fn reserve(&self, is_fit: impl Fn(&Waiting) -> bool) -> Option<Reserved> {
        let mut all = self.waiting();
        let at = all.iter().position(is_fit)?;
        Some(Reserved { warming: self.clone(), waiting: Some(all.remove(at)) })
    }

    /// The prepared machine and the drive of the machine that a VM has claimed, if it has one.
    pub(crate) fn claim_of(&self, vm: VmId) -> Option<(CheckpointId, DriveId)> {
        self.claims().get(&vm).map(|waiting| (waiting.machine, waiting.drive))
    }

    /// Takes the machine that a VM has claimed.
    pub(crate) fn take_claim(&self, vm: VmId) -> Option<Waiting> {
        self.claims().remove(&vm)
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<VmId, Waiting>> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
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
