//! Checkpoints: a tree, which keeps its branches when a part of it goes.

use nexus_schema::id::{BootId, CheckpointId, DriveId};
use nexus_schema::network::NetworkMode;

use super::*;
use crate::store::checkpoints::{self, CheckpointDrive, CheckpointRecord};
use crate::store::restores::{self, RollbackRecord, StagedDrive};
use crate::store::tokens;

pub(crate) fn checkpoint(of: &VmRecord, name: &str, parent: Option<CheckpointId>) -> CheckpointRecord {
    CheckpointRecord {
        seq: 0,
        id: random_id(),
        vm: of.id,
        vm_name: of.name.clone(),
        parent,
        name: name.parse().unwrap(),
        owner: "uid:0".into(),
        tags: BTreeMap::new(),
        ready: false,
        token: Some("secret".into()),
        manifest: None,
        memory_bytes: 100,
        disk_bytes: 20,
        pause_ms: 7,
        created_at: Timestamp::from_millis(now().as_millis()),
        expires_at: None,
    }
}

fn names(rows: &[CheckpointRecord]) -> Vec<&str> {
    rows.iter().map(|row| row.name.as_str()).collect()
}

/// Adds a whole checkpoint.
fn add(db: &Connection, row: &CheckpointRecord) {
    checkpoints::insert(db, row).unwrap();
    let drive = CheckpointDrive {
        position: 0,
        drive: DriveId::from_i64(5).unwrap(),
        name: "root".parse().unwrap(),
        mount: None,
        size: ByteSize::gib(8),
        read_only: false,
        image_id: None,
    };
    checkpoints::made(db, row, &[drive]).unwrap();
}

#[tokio::test]
async fn a_tree_keeps_its_branches() {
    let (_directory, store) = open();
    let tested = write(&store, |tx| {
        let mut web = vm("web", 3);
        vms::insert(tx, &web)?;
        let root = checkpoint(&web, "root", None);
        let middle = checkpoint(&web, "middle", Some(root.id));
        let leaf = checkpoint(&web, "leaf", Some(middle.id));
        for row in [&root, &middle, &leaf] {
            add(tx, row);
        }
        web.generation = 2;
        web.lineage.checkpoint = Some(middle.id);
        vms::update(tx, &web, 1)?;
        assert!(checkpoints::is_current(tx, middle.id, web.id)?);
        checkpoints::delete(tx, middle.id)?;
        let left = checkpoints::list(tx, Some(web.id), None, 10)?;
        assert_eq!(names(&left), ["root", "leaf"]);
        assert_eq!(left[1].parent, Some(root.id));
        assert!(
            checkpoints::is_current(tx, root.id, web.id)?
                && checkpoints::drives_of(tx, middle.id)?.is_empty()
        );
        // It outlives its VM, and is read page by page.
        vms::delete(tx, web.id)?;
        assert_eq!(names(&checkpoints::list(tx, None, Some(left[0].seq), 10)?), ["leaf"]);
        assert_eq!(checkpoints::get(tx, leaf.id)?.unwrap().token.as_deref(), Some("secret"));
        Ok(())
    });
    tested.await.unwrap();
}

#[tokio::test]
async fn half_made_ones_are_seen_by_no_caller_and_names_are_of_one_vm() {
    let (_directory, store) = open();
    let tested = write(&store, |tx| {
        let (web, other) = (vm("web", 3), vm("other", 4));
        vms::insert(tx, &web)?;
        vms::insert(tx, &other)?;
        let half = checkpoint(&web, "half", None);
        checkpoints::insert(tx, &half)?;
        assert!(
            checkpoints::get(tx, half.id)?.is_none() && checkpoints::list(tx, None, None, 10)?.is_empty()
        );
        assert_eq!(checkpoints::all(tx)?.len(), 1);
        let again = checkpoint(&web, "half", None);
        assert!(matches!(checkpoints::insert(tx, &again), Err(StoreError::NameTaken { .. })));
        add(tx, &checkpoint(&other, "half", None));
        assert_eq!(checkpoints::named(tx, &half.name)?.len(), 1);
        // What is being made counts for its owner, too.
        let used = tokens::usage(tx, &["uid:0".to_owned()], None)?;
        assert_eq!(used.disk, 2 * 120);
        // And what its memory occupies by now.
        checkpoints::set_memory_bytes(tx, half.id, 30)?;
        let used = tokens::usage(tx, &["uid:0".to_owned()], None)?;
        assert_eq!(used.disk, 2 * 120 - 70);
        Ok(())
    });
    tested.await.unwrap();
}

#[tokio::test]
async fn those_whose_life_is_over_are_found() {
    let (_directory, store) = open();
    let tested = write(&store, |tx| {
        let web = vm("web", 3);
        vms::insert(tx, &web)?;
        add(tx, &checkpoint(&web, "root", None));
        let mut soon = checkpoint(&web, "soon", None);
        soon.expires_at = Some(Timestamp::from_millis(5));
        add(tx, &soon);
        assert_eq!(names(&checkpoints::expired(tx, Timestamp::from_millis(5))?), ["soon"]);
        assert!(checkpoints::expired(tx, Timestamp::from_millis(4))?.is_empty());
        Ok(())
    });
    tested.await.unwrap();
}

#[tokio::test]
async fn forks_of_an_operation_that_did_not_end_well_are_found() {
    let (_directory, store) = open();
    let tested = write(&store, |tx| {
        let op: OpId = random_id();
        let forks = [vm("a", 3), vm("b", 4)];
        for fork in &forks {
            vms::insert(tx, fork)?;
            checkpoints::claim_fork(tx, op, fork.id)?;
        }
        // Changes of the VM do not touch it.
        let mut changed = forks[0].clone();
        changed.generation = 2;
        vms::update(tx, &changed, 1)?;
        assert_eq!(checkpoints::unfinished_forks(tx)?.len(), 2);
        checkpoints::keep_forks(tx, op)?;
        assert!(checkpoints::unfinished_forks(tx)?.is_empty());
        Ok(())
    });
    tested.await.unwrap();
}

#[tokio::test]
async fn a_rollback_is_known_until_its_drives_are_in_place_and_ends_in_one_step() {
    let (_directory, store) = open();
    let tested = write(&store, |tx| {
        let web = vm("web", 3);
        vms::insert(tx, &web)?;
        let clean = checkpoint(&web, "clean", None);
        add(tx, &clean);
        let staged = |id: i64, name: &str| StagedDrive {
            drive: DriveId::from_i64(id).unwrap(),
            staged: name.into(),
            size_bytes: (1 << 30) + 1,
        };
        let rollback = RollbackRecord {
            vm: web.id,
            checkpoint: clean.id,
            drives: vec![staged(5, ".nexus-a"), staged(6, ".nexus-b")],
        };
        restores::begin_rollback(tx, &rollback)?;
        // One at a time.
        assert!(restores::begin_rollback(tx, &rollback).is_err());
        assert_eq!(restores::rollback_of(tx, web.id)?.as_ref(), Some(&rollback));
        restores::end_rollback(tx, &rollback)?;
        assert!(restores::rollbacks(tx)?.is_empty() && checkpoints::is_current(tx, clean.id, web.id)?);
        // It goes with its VM.
        restores::begin_rollback(tx, &rollback)?;
        vms::delete(tx, web.id)?;
        assert!(restores::rollbacks(tx)?.is_empty());
        Ok(())
    });
    tested.await.unwrap();
}

#[tokio::test]
async fn the_last_boot_that_was_restored_is_known_and_checkpoints_keep_what_their_vm_might_reach() {
    let (_directory, store) = open();
    let tested = write(&store, |tx| {
        let mut web = vm("web", 3);
        web.spec.network.mode = NetworkMode::Proxy;
        vms::insert(tx, &web)?;
        let clean = checkpoint(&web, "clean", None);
        add(tx, &clean);
        let [first, second] = [1, 2].map(|id| BootId::from_i64(id).unwrap());
        assert_eq!(restores::restored_boot(tx, web.id)?, None);
        for boot in [first, second] {
            restores::begin_restore(tx, web.id, boot)?;
            assert_eq!(restores::restored_boot(tx, web.id)?, Some(boot));
        }
        assert_eq!(checkpoints::last_network(tx, clean.id)?, None);
        vms::delete(tx, web.id)?;
        assert_eq!(checkpoints::last_network(tx, clean.id)?, Some(web.spec.network));
        assert_eq!(restores::restored_boot(tx, web.id)?, None);
        Ok(())
    });
    tested.await.unwrap();
}
