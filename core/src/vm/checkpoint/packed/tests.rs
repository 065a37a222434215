use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

use tempfile::TempDir;

use super::super::check::tests::{flip, written};
use super::*;
use crate::access::{self, Caller};
use crate::store::{Store, vms};
use crate::vmm::sha256_of_memory;

/// The files of a checkpoint beside its memory.
const OTHERS: [&str; 3] = ["drives", "manifest.json", "state"];

/// A checkpoint with a memory of 8 MiB, of which this is in the middle; its row.
pub(in crate::vm::checkpoint) fn saved(content: &[u8]) -> (TempDir, CheckpointRecord) {
    let (directory, mut manifest) = written();
    let path = directory.path().join(checkpoint_files::RAM);
    let ram = File::create(&path).unwrap();
    ram.set_len(8 << 20).unwrap();
    ram.write_all_at(content, 2 << 20).unwrap();
    ram.sync_all().unwrap();
    manifest.ram_sha256 = sha256_of_memory(&path).unwrap();
    let mut row = crate::store::tests::checkpoint(&crate::store::tests::vm("web", 3), "clean", None);
    row.memory_bytes = disk::allocated_bytes(&path).unwrap();
    row.manifest = Some(manifest);
    (directory, row)
}

/// What compresses well.
pub(in crate::vm::checkpoint) fn lines() -> Vec<u8> {
    (0..40_000).flat_map(|number| format!("this is line {number}\n").into_bytes()).collect()
}

/// What does not compress at all.
pub(in crate::vm::checkpoint) fn noise() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..1 << 20).map(|_| next()).collect()
}

pub(in crate::vm::checkpoint) fn sha256(row: &CheckpointRecord) -> String {
    row.manifest.as_ref().unwrap().ram_sha256.clone()
}

/// The names in a checkpoint's directory that are of its memory.
pub(in crate::vm::checkpoint) fn memories(directory: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(directory.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !OTHERS.contains(&name.as_str())).collect();
    names.sort();
    names
}

fn packed(directory: &TempDir, row: &CheckpointRecord) -> Result<u64, NotPacked> {
    write_packed(directory.path(), &sha256(row), None, &make, &|_| true)
}

#[test]
fn a_memory_is_packed_and_comes_back_as_it_was() {
    let (directory, row) = saved(&lines());
    let ram = directory.path().join("ram");
    let before = std::fs::read(&ram).unwrap();
    let bytes = packed(&directory, &row).unwrap();
    assert_eq!(memories(&directory), ["ram.packed"]);
    assert!(bytes < row.memory_bytes / 2, "{bytes} of {}", row.memory_bytes);
    let path = directory.path().join("ram.packed");
    assert_eq!(bytes, disk::allocated_bytes(&path).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(has_memory(directory.path()) && due_in(directory.path(), Duration::ZERO).is_none());

    let progress = Progress::default();
    let bytes = write_unpacked(directory.path(), None, &row, &progress).unwrap();
    // Its packed form goes once the row is written.
    assert_eq!(memories(&directory), ["ram", "ram.packed"]);
    assert!(std::fs::read(&ram).unwrap() == before);
    assert_eq!(sha256_of_memory(&ram).unwrap(), sha256(&row));
    assert!(bytes <= row.memory_bytes + (64 << 10), "{bytes}, {} before", row.memory_bytes);
    let told = progress.watch().borrow().clone();
    assert!(told.done.is_some_and(|done| done > 0) && told.total == Some(row.memory_bytes), "{told:?}");
    assert_eq!(std::fs::metadata(&ram).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_cannot_be_packed_stays_and_nothing_else_is_left() {
    let full = |path: &Path| {
        make(path)?;
        File::options().write(true).open("/dev/full")
    };
    let (directory, row) = saved(&lines());
    let sha256 = sha256(&row);
    let stays = || {
        assert_eq!(memories(&directory), ["ram"]);
        assert_eq!(sha256_of_memory(&directory.path().join("ram")).unwrap(), sha256);
    };
    let error = write_packed(directory.path(), &sha256, None, &full, &|_| true).unwrap_err();
    assert!(matches!(&error, NotPacked::File(error) if disk::is_full(error)), "{error}");
    assert!(!error.is_final() && !error.gives_way());
    stays();
    let error = write_packed(directory.path(), &sha256, None, &make, &|_| false).unwrap_err();
    assert!(error.gives_way() && !error.is_final(), "{error}");
    stays();
    let error = write_packed(directory.path(), "00", None, &make, &|_| true).unwrap_err();
    assert!(matches!(error, NotPacked::Damaged) && error.is_final());
    stays();
    // What an earlier one left is no obstacle.
    for left in ["ram.packed", "ram.packed.part"] {
        std::fs::write(directory.path().join(left), "left").unwrap();
    }
    packed(&directory, &row).unwrap();
    assert_eq!(memories(&directory), ["ram.packed"]);

    let (directory, row) = saved(&noise());
    let error = packed(&directory, &row).unwrap_err();
    assert!(matches!(error, NotPacked::NoGain) && error.is_final());
    assert_eq!(memories(&directory), ["ram"]);
}

#[test]
fn what_cannot_be_unpacked_stays_packed() {
    let (directory, row) = saved(&lines());
    packed(&directory, &row).unwrap();
    let path = directory.path().join("ram.packed");
    let middle = std::fs::metadata(&path).unwrap().len() / 2;
    flip(&path, middle);
    let error = write_unpacked(directory.path(), None, &row, &Progress::default()).unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed, "{error}");
    assert!(error.message.contains("ram.packed"), "{error}");
    assert_eq!(memories(&directory), ["ram.packed"]);
    flip(&path, middle);
    // A whole one of another memory.
    let mut other = row.clone();
    other.manifest.as_mut().unwrap().ram_sha256 = "00".into();
    let error = write_unpacked(directory.path(), None, &other, &Progress::default()).unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed, "{error}");
    let cancelled = Progress::default();
    cancelled.token().cancel();
    let error = write_unpacked(directory.path(), None, &row, &cancelled).unwrap_err();
    assert_eq!(error.code, ErrorCode::Cancelled, "{error}");
    assert_eq!(memories(&directory), ["ram.packed"]);
    std::fs::write(directory.path().join("ram.part"), "left").unwrap();
    write_unpacked(directory.path(), None, &row, &Progress::default()).unwrap();
    assert_eq!(memories(&directory), ["ram", "ram.packed"]);
}

#[test]
fn what_was_cut_off_is_tidied_whatever_there_is() {
    for (names, left, is_told) in [
        (&["ram"][..], "ram", false),
        (&["ram", "ram.packed.part"][..], "ram", true),
        (&["ram", "ram.packed"][..], "ram", true),
        (&["ram", "ram.part"][..], "ram", true),
        (&["ram.packed"][..], "ram.packed", true),
        (&["ram.packed", "ram.part"][..], "ram.packed", true),
    ] {
        let directory = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(directory.path().join(name), *name).unwrap();
        }
        let told = tidy(directory.path()).unwrap();
        assert_eq!(memories(&directory), [left], "{names:?}");
        let bytes = disk::allocated_bytes(&directory.path().join(left)).unwrap();
        assert_eq!(told, is_told.then_some(bytes), "{names:?}");
        assert!(has_memory(directory.path()));
    }
    let nothing = tempfile::tempdir().unwrap();
    assert!(tidy(nothing.path()).unwrap().is_none() && !has_memory(nothing.path()));
}

#[test]
fn a_memory_is_due_some_time_after_its_last_use() {
    let (directory, _) = saved(&lines());
    let hour = Duration::from_secs(60 * 60);
    let at = |time: SystemTime| {
        let ram = File::options().write(true).open(directory.path().join("ram")).unwrap();
        ram.set_modified(time).unwrap();
        due_in(directory.path(), hour).unwrap()
    };
    assert_eq!(at(SystemTime::now() - 2 * hour), Duration::ZERO);
    let left = at(SystemTime::now() - hour / 2);
    assert!(left > hour / 4 && left <= hour / 2, "{left:?}");
    // The clock was set back.
    assert_eq!(at(SystemTime::now() + hour), hour);
    at(SystemTime::now() - 2 * hour);
    mark_used(directory.path());
    assert!(due_in(directory.path(), hour).unwrap() > hour / 2);
}

#[tokio::test]
async fn what_a_memory_takes_more_unpacked_is_asked_of_the_quota_of_who_made_the_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("nexus.db")).unwrap();
    let tokens = Tokens::default();
    let holder = access::promised::tests::caller(&tokens, &Caller::owner("uid:0"), 200);
    let vm = crate::store::tests::vm("web", 3);
    // It counts 100 bytes of memory, and 20 of drives.
    let mut row = crate::store::tests::checkpoint(&vm, "clean", None);
    row.owner = holder.owner.to_string();
    let made = row.clone();
    let added = store.write(move |tx| -> Result<(), StoreError> {
        vms::insert(tx, &vm)?;
        checkpoints::insert(tx, &made)?;
        checkpoints::made(tx, &made, &[])
    });
    added.await.unwrap();
    let promise = async |unpacked: u64| {
        let (tokens, row) = (tokens.clone(), row.clone());
        store.write(move |tx| rest_of(tx, &tokens, &row, unpacked)).await
    };
    let whole = promise(180).await.unwrap();
    assert_eq!(whole.bytes(), 80);
    // What another one takes meanwhile has no room, but what its row counts already needs none.
    assert!(matches!(promise(101).await, Err(StoreError::QuotaExceeded { .. })));
    drop(promise(100).await.unwrap());
    drop(whole);
    assert!(matches!(promise(181).await, Err(StoreError::QuotaExceeded { .. })));
    drop(promise(101).await.unwrap());
}
