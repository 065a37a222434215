//! How much of something that all share each caller may have at once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// Places of which each owner has at most so many. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shares<Owner> {
    most: usize,
    taken: Arc<Mutex<HashMap<Owner, usize>>>,
}

/// One place; dropping it gives it back.
#[derive(Debug)]
pub struct Share<Owner: Hash + Eq> {
    owner: Owner,
    taken: Arc<Mutex<HashMap<Owner, usize>>>,
}

impl<Owner: Hash + Eq + Clone> Shares<Owner> {
    /// At most `most` places for each owner.
    pub fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    /// A place for an owner; `None` if it has all of its own.
    pub fn take(&self, owner: &Owner) -> Option<Share<Owner>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(owner.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { owner: owner.clone(), taken: Arc::clone(&self.taken) })
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.taken.lock().unwrap().is_empty()
    }
}

impl<Owner: Hash + Eq> Drop for Share<Owner> {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.owner) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_owner_has_its_own_places() {
        let shares = Shares::new(2);
        let [a, b]: [Arc<str>; 2] = ["a".into(), "b".into()];
        let first = shares.take(&a).unwrap();
        let _second = shares.take(&a).unwrap();
        assert!(shares.take(&a).is_none());
        let of_b = shares.take(&b).unwrap();
        drop(first);
        assert!(shares.take(&a).is_some(), "what was given back can be had again");
        drop(of_b);
        assert_eq!(shares.taken.lock().unwrap().len(), 1, "nothing is kept of who has none");
    }
}
