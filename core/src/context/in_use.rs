//! Which checkpoints are being restored, and which are being removed: never the same ones.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nexus_schema::id::CheckpointId;

/// The checkpoints in use. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct InUse(Arc<Mutex<HashMap<CheckpointId, Use>>>);

/// What is done with a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// So many read it.
    Read(u32),
    /// It is being removed.
    Removed,
}

/// The use of one checkpoint, until it is dropped.
#[derive(Debug)]
pub(crate) struct Used {
    all: InUse,
    id: CheckpointId,
}

impl InUse {
    /// Begins to read a checkpoint, which is not removed meanwhile. `None` if it is being removed.
    pub(crate) fn read(&self, id: CheckpointId) -> Option<Used> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.entry(id).or_insert(Use::Read(0)) {
            Use::Read(readers) => *readers = readers.saturating_add(1),
            Use::Removed => return None,
        }
        Some(Used { all: self.clone(), id })
    }

    /// Begins to remove a checkpoint. `None` if it is in use.
    pub(crate) fn remove(&self, id: CheckpointId) -> Option<Used> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.contains_key(&id) {
            return None;
        }
        all.insert(id, Use::Removed);
        Some(Used { all: self.clone(), id })
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(&self.id) {
            Some(Use::Read(readers)) if *readers > 1 => *readers -= 1,
            Some(Use::Read(_) | Use::Removed) | None => drop(all.remove(&self.id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_read_is_not_removed_and_others_are() {
        let (all, [one, other]) = (InUse::default(), [1, 2].map(|id| CheckpointId::from_i64(id).unwrap()));
        let (first, second) = (all.read(one).unwrap(), all.read(one).unwrap());
        drop(first);
        assert!(all.remove(one).is_none());
        drop(all.remove(other).unwrap());
        drop(second);
        let removal = all.remove(one).unwrap();
        assert!(all.read(one).is_none() && all.remove(one).is_none() && all.read(other).is_some());
        drop(removal);
        assert!(all.read(one).is_some() && all.0.lock().unwrap().is_empty());
    }
}
