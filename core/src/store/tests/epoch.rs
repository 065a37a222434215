//! The epoch of a database, and what an older copy is spared.

use super::*;
use crate::store::{checkpoints, epoch};

#[tokio::test]
async fn the_epoch_counts_on_beyond_what_was_seen_and_stays() {
    let (directory, store) = open();
    assert_eq!(store.read(epoch::get).await.unwrap(), 0, "there is no installation yet");
    store.instance().await.unwrap();
    for (seen, now) in [(0, 1), (0, 2), (2, 3), (9, 10), (4, 11)] {
        assert_eq!(write(&store, move |tx| epoch::advance(tx, seen)).await.unwrap(), now, "{seen}");
    }
    drop(store);
    let again = Store::open(&directory.path().join("nexus.db")).unwrap();
    assert_eq!(again.read(epoch::get).await.unwrap(), 11);
}

#[tokio::test]
async fn work_is_noticed() {
    let (_directory, store) = open();
    let before = store.read(epoch::work).await.unwrap();
    assert_eq!(store.read(epoch::work).await.unwrap(), before);
    let web = vm("web", 3);
    write(&store, move |tx| {
        history::insert(tx, web.id, &web.name, None, Some(web.state), "created", "uid:0", None)
    })
    .await
    .unwrap();
    assert_ne!(store.read(epoch::work).await.unwrap(), before);
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
