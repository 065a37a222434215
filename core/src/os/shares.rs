//! How much of something that all share each caller may have at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Places of which each owner has at most so many. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shares {
    most: usize,
    taken: Arc<Mutex<HashMap<Arc<str>, usize>>>,
}

/// One place; dropping it gives it back.
#[derive(Debug)]
pub struct Share {
    owner: Arc<str>,
    taken: Arc<Mutex<HashMap<Arc<str>, usize>>>,
}

impl Shares {
    /// At most `most` places for each owner.
    pub fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    /// A place for an owner; `None` if it has all of its own.
    pub fn take(&self, owner: &Arc<str>) -> Option<Share> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(Arc::clone(owner)).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { owner: Arc::clone(owner), taken: Arc::clone(&self.taken) })
    }
}

impl Drop for Share {
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
