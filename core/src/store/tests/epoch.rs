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
async fn nothing_of_an_older_copy_expires_at_once_or_is_undone() {
    let (_directory, store) = open();
    write(&store, |tx| {
        let mut web = vm("web", 3);
        web.expires_at = Some(Timestamp::from_millis(1000));
        vms::insert(tx, &web)?;
        let late = VmRecord { expires_at: Some(Timestamp::from_millis(9000)), ..vm("late", 4) };
        vms::insert(tx, &late)?;
        vms::insert(tx, &vm("for-ever", 5))?;
        checkpoints::claim_fork(tx, OpId::from_i64(7).unwrap(), web.id)?;
        let mut clean = checkpoint(&web, "clean", None);
        clean.expires_at = Some(Timestamp::from_millis(1));
        checkpoints::insert(tx, &clean)?;
        checkpoints::made(tx, &clean, &[])?;
        let expired = |at: i64| checkpoints::expired(tx, Timestamp::from_millis(at)).map(|all| all.len());
        assert_eq!(expired(4999)?, 1);
        assert_eq!(epoch::spare(tx, Timestamp::from_millis(5000))?, ["web", "web/clean"]);
        let all = vms::all(tx)?;
        for (name, end) in [("web", Some(5000)), ("late", Some(9000)), ("for-ever", None)] {
            let vm = all.iter().find(|vm| vm.name.as_str() == name).unwrap();
            assert_eq!(vm.expires_at.map(|at| at.as_millis()), end, "{name}");
        }
        assert!(checkpoints::unfinished_forks(tx)?.is_empty());
        assert_eq!((expired(4999)?, expired(5001)?), (0, 1));
        Ok(())
    })
    .await
    .unwrap();
}
