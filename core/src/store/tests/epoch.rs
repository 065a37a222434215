//! The epoch of a database, and what an older copy is spared.

use super::*;
use crate::store::{checkpoints, epoch};

#[tokio::test]
async fn the_epoch_counts_on_beyond_what_was_seen_and_stays() {
    let (directory, store) = open();
    assert_eq!(store.read(epoch::get).await.unwrap(), 0, "there is no installation yet");
    store.instance().await.unwrap();
    // What was seen, the clock in seconds, and what follows; a clock may be set back.
    for (seen, clock, next) in
        [(0, 0, 1), (0, -5, 2), (2, 0, 3), (9, 3, 10), (4, 0, 11), (0, 50, 50), (0, 50, 51), (0, 20, 52)]
    {
        let clock = Timestamp::from_millis(clock * 1000);
        let advanced = write(&store, move |tx| epoch::advance(tx, seen, clock)).await.unwrap();
        assert_eq!(advanced, next, "{seen} at {clock:?}");
    }
    drop(store);
    let again = Store::open(&directory.path().join("nexus.db")).unwrap();
    assert_eq!(again.read(epoch::get).await.unwrap(), 52);
}

#[tokio::test]
async fn each_row_that_is_written_is_a_change() {
    let (_directory, store) = open();
    let before = store.changes().await.unwrap();
    assert_eq!(store.changes().await.unwrap(), before);
    write(&store, |tx| vms::insert(tx, &vm("web", 3))).await.unwrap();
    let inserted = store.changes().await.unwrap();
    assert_ne!(inserted, before);
    write(&store, |tx| {
        let web = vms::all(tx)?.remove(0);
        let generation = web.generation;
        vms::update(tx, &VmRecord { protected: true, generation: generation + 1, ..web }, generation)
    })
    .await
    .unwrap();
    assert_ne!(store.changes().await.unwrap(), inserted);
}

#[tokio::test]
async fn nothing_of_an_older_copy_expires_or_is_undone() {
    let (_directory, store) = open();
    write(&store, |tx| {
        let mut web = vm("web", 3);
        web.expires_at = Some(now());
        vms::insert(tx, &web)?;
        checkpoints::claim_fork(tx, OpId::from_i64(7).unwrap(), web.id)?;
        let mut clean = checkpoint(&web, "clean", None);
        clean.expires_at = Some(Timestamp::from_millis(1));
        checkpoints::insert(tx, &clean)?;
        checkpoints::made(tx, &clean, &[])?;
        assert_eq!(checkpoints::expired(tx, now())?.len(), 1);
        epoch::spare(tx)?;
        assert_eq!(vms::all(tx)?[0].expires_at, None);
        assert!(checkpoints::unfinished_forks(tx)?.is_empty());
        assert!(checkpoints::expired(tx, now())?.is_empty());
        Ok(())
    })
    .await
    .unwrap();
}
