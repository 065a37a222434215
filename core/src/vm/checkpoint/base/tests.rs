use tempfile::TempDir;

use super::super::check::tests::flip;
use super::super::packed::tests::{lines, memories, noise, saved, sha256};
use super::super::packed::{write_packed, write_unpacked};
use super::*;
use crate::progress::Progress;
use crate::store::tests::{checkpoint, vm};
use crate::vmm::sha256_of_memory;

fn used_as(directory: &TempDir, row: &CheckpointRecord) -> Base {
    Base { id: row.id, directory: directory.path().to_owned(), _used: None }
}

fn pack(directory: &TempDir, row: &CheckpointRecord, base: Option<&Base>) -> u64 {
    write_packed(directory.path(), &sha256(row), base, &make, &|_| true).unwrap()
}

/// Unpacks a memory, and packs it again with the same base.
fn comes_back(directory: &TempDir, row: &CheckpointRecord, base: Option<&Base>) {
    write_unpacked(directory.path(), base, row, &Progress::default()).unwrap();
    assert_eq!(sha256_of_memory(&directory.path().join("ram")).unwrap(), sha256(row));
    pack(directory, row, base);
}

#[test]
fn a_memory_is_told_by_that_of_another_one_until_it_is_made_whole() {
    let mut content = noise();
    content.extend(lines());
    let (first, first_row) = saved(&content);
    content[5000] ^= 1;
    content[1 << 19] ^= 1;
    let (second, second_row) = saved(&content);
    let base = used_as(&first, &first_row);
    // The base has its usual form, or is packed; and back again.
    let plain = pack(&second, &second_row, Some(&base));
    comes_back(&second, &second_row, Some(&base));
    let whole = pack(&first, &first_row, None);
    assert!(plain < whole / 8, "{plain} and {whole}");
    assert_eq!(base_in(second.path()).unwrap(), Some(first_row.id));
    assert_eq!(base_in(first.path()).unwrap(), None);
    comes_back(&second, &second_row, Some(&base));

    let error = write_unpacked(second.path(), None, &second_row, &Progress::default()).unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed, "{error}");
    // What another one hangs from is not told by that.
    assert!(open_whole(second.path()).unwrap().sha256(&|_| true).is_err());
    assert_eq!(memories(&second), ["ram.packed"]);

    // A damaged base: it is not made whole, and stays as it is.
    let path = first.path().join("ram.packed");
    let middle = std::fs::metadata(&path).unwrap().len() / 2;
    flip(&path, middle);
    assert!(write_whole(second.path(), first.path(), &sha256(&second_row)).unwrap().is_none());
    assert_eq!(
        (memories(&second), base_in(second.path()).unwrap()),
        (vec!["ram.packed".to_owned()], Some(first_row.id))
    );
    flip(&path, middle);
    // What cannot be read now is no damage, and nothing is lost for it.
    std::fs::create_dir(second.path().join("ram.packed.part")).unwrap();
    write_whole(second.path(), first.path(), &sha256(&second_row)).unwrap_err();
    std::fs::remove_dir(second.path().join("ram.packed.part")).unwrap();
    assert_eq!(base_in(second.path()).unwrap(), Some(first_row.id));
    let most = whole_max(&Files::of(second.path()), first.path()).unwrap();
    let bytes = write_whole(second.path(), first.path(), &sha256(&second_row)).unwrap().unwrap();
    assert!(bytes > whole / 2, "{bytes} and {whole}");
    assert!(most >= whole && most < 2 * whole, "{most} and {whole}");
    assert_eq!((memories(&second), base_in(second.path()).unwrap()), (vec!["ram.packed".to_owned()], None));
    drop(first);
    comes_back(&second, &second_row, None);
}

#[test]
fn a_base_that_cannot_be_read_or_is_too_different_is_no_base() {
    let (first, first_row) = saved(&noise());
    let base = used_as(&first, &first_row);
    let (second, second_row) = saved(&lines());
    pack(&second, &second_row, Some(&base));
    assert_eq!(base_in(second.path()).unwrap(), None);
    comes_back(&second, &second_row, None);
    std::fs::remove_file(first.path().join("ram")).unwrap();
    comes_back(&second, &second_row, Some(&base));
    std::fs::write(first.path().join("ram.packed"), "nonsense that is long enough for a header").unwrap();
    comes_back(&second, &second_row, Some(&base));
    assert_eq!(base_in(second.path()).unwrap(), None);
    // A damaged one has none; of one that cannot be read that is not known.
    assert_eq!(base_in(first.path()).unwrap(), None);
    std::fs::remove_file(first.path().join("ram.packed")).unwrap();
    std::fs::create_dir(first.path().join("ram.packed")).unwrap();
    assert!(base_in(first.path()).is_err());
}

#[test]
fn only_an_earlier_one_of_the_same_boot_that_stays_may_be_a_base() {
    let (_directory, row) = saved(&lines());
    let manifest = row.manifest;
    let own =
        CheckpointRecord { seq: 5, manifest: manifest.clone(), ..checkpoint(&vm("web", 3), "own", None) };
    let earlier = CheckpointRecord { seq: 4, ..own.clone() };
    assert!(may_be_base(&earlier, &own) && !may_be_base(&own, &earlier));
    let expires_at = Some(nexus_schema::Timestamp::from_millis(1));
    assert!(!may_be_base(&CheckpointRecord { expires_at, ..earlier.clone() }, &own));
    assert!(!may_be_base(&CheckpointRecord { manifest: None, ..earlier.clone() }, &own));
    let boot_id = crate::store::random_id();
    let manifest = manifest.map(|manifest| checkpoints::Manifest { boot_id, ..manifest });
    assert!(!may_be_base(&CheckpointRecord { manifest, ..earlier }, &own));
}
