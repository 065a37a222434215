//! Damage is found, told from a newer version and from a database that is not there, and names the file.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::super::health::{Health, examine};
use super::*;

/// A database with enough rows for some pages, and no daemon.
async fn filled() -> (tempfile::TempDir, PathBuf) {
    let (directory, store) = open();
    for at in 0..200 {
        write(&store, move |tx| vms::insert(tx, &vm(&format!("v{at}"), vms::free_cid(tx)?))).await.unwrap();
    }
    drop(store);
    let path = directory.path().join("nexus.db");
    // All of it is in the one file.
    Connection::open(&path).unwrap().pragma_update(None, "wal_checkpoint", "truncate").unwrap();
    (directory, path)
}

fn overwrite(path: &Path, from: u64, length: usize) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![0xa5; length], from).unwrap();
}

#[tokio::test]
async fn a_whole_database_is_whole_even_while_it_is_used() {
    let (directory, path) = filled().await;
    let before = std::fs::read(&path).unwrap();
    let whole = examine(&path).unwrap();
    assert!(matches!(whole, Health::Whole { schema: SCHEMA_VERSION, bytes } if bytes > 100_000), "{whole:?}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let store = Store::open(&path).unwrap();
    write(&store, |tx| vms::insert(tx, &vm("new", vms::free_cid(tx)?))).await.unwrap();
    assert!(matches!(examine(&path).unwrap(), Health::Whole { .. }));
    assert_eq!(examine(&directory.path().join("none.db")).unwrap(), Health::Missing);
}

#[tokio::test]
async fn damage_is_found() {
    let (_directory, path) = filled().await;
    let length = std::fs::metadata(&path).unwrap().len();
    // All pages but the first, so that the schema can still be read.
    let page = 4096;
    overwrite(&path, page, usize::try_from(length - page).unwrap());
    let found = examine(&path).unwrap();
    assert!(matches!(&found, Health::Damaged { why } if !why.is_empty()), "{found:?}");
}

#[tokio::test]
async fn half_a_database_is_damaged() {
    let (_directory, path) = filled().await;
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    let found = examine(&path).unwrap();
    assert!(matches!(found, Health::Damaged { .. }), "{found:?}");
}

#[tokio::test]
async fn a_daemon_says_which_file_is_damaged_and_leaves_it() {
    let (_directory, path) = filled().await;
    overwrite(&path, 0, 4096);
    assert!(matches!(examine(&path).unwrap(), Health::Damaged { .. }));
    let before = std::fs::read(&path).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("nexus.db is damaged: move it away"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn one_that_a_daemon_has_alone_is_left_to_it() {
    let (directory, store) = open();
    drop(store);
    let path = directory.path().join("nexus.db");
    let alone = connect_alone(&path).unwrap();
    alone.execute_batch("CREATE TABLE more (what TEXT)").unwrap();
    assert_eq!(examine(&path).unwrap(), Health::Busy);
    drop(alone);
    assert!(matches!(examine(&path).unwrap(), Health::Whole { .. }));
}

#[test]
fn a_newer_database_is_not_damaged() {
    let (directory, store) = open();
    drop(store);
    let path = directory.path().join("nexus.db");
    Connection::open(&path).unwrap().pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
    assert_eq!(examine(&path).unwrap(), Health::Newer { schema: SCHEMA_VERSION + 1 });
}
