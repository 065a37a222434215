//! Disk space that is promised: for what is about to be written, and has no row yet that counts for a quota.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is promised to each owner, in bytes. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Promises(Arc<Mutex<HashMap<String, u64>>>);

/// Disk space that counts for the quotas of its owner, until this is dropped.
#[derive(Debug)]
#[must_use = "it counts only until it is dropped"]
pub(crate) struct Promised {
    all: Promises,
    owner: String,
    bytes: u64,
}

impl Promises {
    /// Promises space to an owner. Whether there is room for it, the caller has checked.
    pub(super) fn add(&self, owner: &str, bytes: u64) -> Promised {
        let mut all = self.lock();
        let promised = all.entry(owner.to_owned()).or_default();
        *promised = promised.saturating_add(bytes);
        drop(all);
        Promised { all: self.clone(), owner: owner.to_owned(), bytes }
    }

    /// What is promised to these owners together, in bytes.
    pub(super) fn of(&self, owners: &[String]) -> u64 {
        let all = self.lock();
        owners.iter().filter_map(|owner| all.get(owner)).fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promised {
    /// How much it is, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some(promised) = all.get_mut(&self.owner) {
            *promised = promised.saturating_sub(self.bytes);
            if *promised == 0 {
                all.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use nexus_schema::ByteSize;
    use nexus_schema::tools::token::Quota;

    use crate::access::{Caller, Promised, Tokens, Wanted};
    use crate::store::tokens::Usage;
    use crate::store::{Store, StoreError};

    /// A caller whose token may have so much of the disk.
    pub(crate) fn caller(tokens: &Tokens, by: &Caller, disk: u64) -> Caller {
        let quota = Quota { disk: Some(ByteSize::bytes(disk)), ..Quota::default() };
        let (record, secret) = tokens.draft(by, Wanted { quota, ..Wanted::default() }).unwrap();
        tokens.add(record);
        tokens.authenticate(&secret).unwrap()
    }

    async fn promise(
        store: &Store,
        tokens: &Tokens,
        owner: &str,
        bytes: u64,
    ) -> Result<Promised, StoreError> {
        let (tokens, owner) = (tokens.clone(), owner.to_owned());
        store.write(move |tx| tokens.promise(tx, &owner, bytes)).await
    }

    fn is_refused<T>(outcome: &Result<T, StoreError>) -> bool {
        matches!(outcome, Err(StoreError::QuotaExceeded { .. }))
    }

    fn open() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nexus.db")).unwrap();
        (directory, store)
    }

    #[tokio::test]
    async fn what_is_promised_counts_until_it_is_dropped() {
        let ((_directory, store), tokens) = (open(), Tokens::default());
        let parent = caller(&tokens, &Caller::owner("uid:0"), 100);
        let child = caller(&tokens, &parent, 80);
        let first = promise(&store, &tokens, &child.owner, 60).await.unwrap();
        assert_eq!(first.bytes(), 60);
        assert!(is_refused(&promise(&store, &tokens, &child.owner, 21).await), "of its own quota");
        assert!(is_refused(&promise(&store, &tokens, &parent.owner, 41).await), "of what made it");
        // Whatever else is made sees it, too.
        let charges = tokens.charges(&parent.owner);
        let check = |disk: u64| {
            let charges = charges.clone();
            store.read(move |db| {
                let more = Usage { disk, ..Usage::default() };
                charges.iter().try_for_each(|charge| charge.check(db, more, None))?;
                charges.iter().try_for_each(|charge| charge.check_room(db))
            })
        };
        check(40).await.unwrap();
        assert!(is_refused(&check(41).await));
        let second = promise(&store, &tokens, &parent.owner, 40).await.unwrap();
        let held = charges.clone();
        store.read(move |db| held.iter().try_for_each(|charge| charge.check_held(db))).await.unwrap();
        assert!(is_refused(&check(0).await), "there is no room");
        drop(first);
        check(60).await.unwrap();
        drop(second);
        drop(promise(&store, &tokens, &child.owner, 80).await.unwrap());
        // Who has no quota is promised anything.
        drop(promise(&store, &tokens, "uid:0", u64::MAX).await.unwrap());
    }

    #[tokio::test]
    async fn promises_at_once_do_not_exceed_a_quota() {
        let ((_directory, store), tokens) = (open(), Tokens::default());
        let holder = caller(&tokens, &Caller::owner("uid:0"), 100);
        let all = (0..16).map(|_| promise(&store, &tokens, &holder.owner, 30));
        let outcomes = futures::future::join_all(all).await;
        let kept: Vec<Promised> = outcomes.into_iter().filter_map(Result::ok).collect();
        assert_eq!(kept.len(), 3);
        drop(kept);
        drop(promise(&store, &tokens, &holder.owner, 100).await.unwrap());
    }
}
