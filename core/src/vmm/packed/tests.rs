use std::io::Seek as _;

use super::*;

/// A memory of some mebibytes with these pages in it, each of other bytes.
fn memory(length: u64, pages: &[u64]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    let mut state = 1_u32;
    for at in pages {
        let page: Vec<u8> = (0..PAGE)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            })
            .collect();
        file.write_all_at(&page, *at).unwrap();
    }
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

fn new() -> File {
    tempfile::tempfile().unwrap()
}

fn plain(file: &File) -> Memory {
    Memory::Plain(file.try_clone().unwrap())
}

/// A packed memory without a base.
fn whole(file: &File) -> Memory {
    Memory::Packed(file.try_clone().unwrap(), None)
}

const LENGTH: u64 = 8 << 20;

fn sample() -> File {
    let last = LENGTH - PAGE as u64;
    let file = memory(LENGTH, &[0, 8192, 12288, (1 << 20) - 4096, 1 << 20, 3 << 20, last]);
    // Zeros that are written, and what compresses well.
    file.write_all_at(&[0; PAGE], 16384).unwrap();
    file.write_all_at(&vec![7_u8; 2 << 20], 5 << 20).unwrap();
    file
}

#[test]
fn a_memory_comes_back_with_its_holes_and_its_digest() {
    let (from, packed, to) = (sample(), new(), new());
    let sha256 = pack(&plain(&from), &packed, &|_| true).unwrap();
    assert_eq!(sha256, ram::copy(&from, &new(), &|| true).unwrap().sha256);
    let occupied = from.metadata().unwrap().blocks() * 512;
    assert_eq!(header(&packed).unwrap(), Header { length: LENGTH, occupied, base: None });
    assert!(packed.metadata().unwrap().len() < 48 << 10, "{}", packed.metadata().unwrap().len());
    assert_eq!(whole(&packed).sha256(&|_| true).unwrap(), sha256);
    // What was read before of the file is no matter.
    (&packed).rewind().unwrap();
    (&packed).read_exact(&mut [0; 100]).unwrap();
    assert_eq!(unpack(&whole(&packed), &to, &|_| true).unwrap(), sha256);
    assert!(content(&to) == content(&from));
    assert!(to.metadata().unwrap().blocks() * 512 <= (2 << 20) + (64 << 10));
}

#[test]
fn memories_without_pages_and_of_odd_lengths_come_back() {
    for length in [0, 1, 4096, 5000, (1 << 20) + 1] {
        let (from, packed, to) = (new(), new(), new());
        from.set_len(length).unwrap();
        pack(&plain(&from), &packed, &|_| true).unwrap();
        unpack(&whole(&packed), &to, &|_| true).unwrap();
        assert!(content(&to) == content(&from), "{length} of zeros");
        let full = vec![9_u8; usize::try_from(length).unwrap()];
        from.write_all_at(&full, 0).unwrap();
        let (packed, to) = (new(), new());
        pack(&plain(&from), &packed, &|_| true).unwrap();
        unpack(&whole(&packed), &to, &|_| true).unwrap();
        assert!(content(&to) == full, "{length} of data");
    }
}

#[test]
fn each_flipped_byte_and_each_missing_end_is_found() {
    let packed = new();
    let sha256 = pack(&plain(&sample()), &packed, &|_| true).unwrap();
    let all = content(&packed);
    let read = |bytes: &[u8]| {
        let file = new();
        file.write_all_at(bytes, 0).unwrap();
        whole(&file).sha256(&|_| true)
    };
    assert_eq!(read(&all).unwrap(), sha256);
    // What it occupied is not needed for anything that must be right.
    for at in (0..all.len()).step_by(97).filter(|at| !(16..24).contains(at)).chain([3, 8, 15, 24]) {
        let mut other = all.clone();
        other[at] ^= 0x10;
        assert!(read(&other).is_err(), "byte {at} of {}", all.len());
    }
    for length in (0..all.len()).step_by(211).chain([all.len() - 1]) {
        assert!(read(&all[..length]).is_err(), "{length} of {}", all.len());
    }
    assert!(read(&[all.as_slice(), b"more"].concat()).is_err());
}

#[test]
fn records_out_of_order_or_beyond_the_end_are_refused() {
    let written = |records: &[(u64, u32)]| {
        let file = new();
        let mut head = MAGIC.to_vec();
        head.extend((64_u64 << 10).to_le_bytes());
        head.extend(0_u64.to_le_bytes());
        head.extend(0_u64.to_le_bytes());
        let mut frame = Vec::new();
        for (at, count) in records {
            frame.extend(at.to_le_bytes());
            frame.extend(count.to_le_bytes());
            frame.extend(vec![1_u8; usize::try_from(*count).unwrap()]);
        }
        head.extend(zstd::stream::encode_all(frame.as_slice(), 1).unwrap());
        file.write_all_at(&head, 0).unwrap();
        unpack(&whole(&file), &new(), &|_| true)
    };
    let end = (64 << 10, 0);
    written(&[(4096, 8192), end]).unwrap();
    for records in [
        &[(4096, 8192), (8192, 4096), end][..],
        &[(100, 4096), end],
        &[(4096, 100), end],
        &[(60 << 10, 8192), end],
        &[(u64::MAX - 4095, 4096), end],
        &[(0, (1 << 20) + 4096), end],
        &[(4096, 0)],
        &[(4096, 8192)],
        &[(4096, 8192), end, end],
    ] {
        assert!(written(records).is_err(), "{records:?}");
    }
}

#[test]
fn the_work_ends_when_nobody_wants_it_or_the_disk_is_full() {
    let (from, packed) = (sample(), new());
    let stopped = |result: io::Result<String>| result.unwrap_err().kind() == io::ErrorKind::Interrupted;
    assert!(stopped(pack(&plain(&from), &new(), &|done| done < 1 << 20)));
    pack(&plain(&from), &packed, &|_| true).unwrap();
    assert!(stopped(unpack(&whole(&packed), &new(), &|done| done < 1 << 20)));
    assert!(stopped(whole(&packed).sha256(&|_| false)));
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(pack(&plain(&from), &full, &|_| true).unwrap_err().kind(), io::ErrorKind::StorageFull);
}

fn id() -> CheckpointId {
    CheckpointId::from_i64(7).unwrap()
}

/// The sample after some work: a page is another one, one is zeros, one is new, and one is as it was, elsewhere.
fn later() -> File {
    let (before, later) = (sample(), new());
    later.write_all_at(&content(&before), 0).unwrap();
    later.write_all_at(&[3; PAGE], 8192).unwrap();
    later.write_all_at(&[0; PAGE], 3 << 20).unwrap();
    later.write_all_at(&[4; PAGE], 4 << 20).unwrap();
    later.write_all_at(&content(&before)[..PAGE], 4096).unwrap();
    later.write_all_at(b"x", (6 << 20) + 10).unwrap();
    later
}

#[test]
fn what_differs_from_another_memory_is_that_memory_with_it() {
    let (before, later, base) = (sample(), later(), new());
    pack(&plain(&before), &base, &|_| true).unwrap();
    let (changes, full) = (new(), new());
    let sha256 = pack(&plain(&later), &full, &|_| true).unwrap();
    // Whatever form the base has when it is needed.
    let bases = || [plain(&before), whole(&base)];
    for known in bases() {
        changes.set_len(0).unwrap();
        let mut writing = &changes;
        std::io::Seek::rewind(&mut writing).unwrap();
        let packed = pack_changes(&later, (id(), &known), &changes, &|_| true).unwrap();
        assert_eq!(packed.unwrap(), sha256);
        assert_eq!(header(&changes).unwrap().base, Some(id()));
        assert_eq!(header(&changes).unwrap().length, LENGTH);
        let (small, large) = (changes.metadata().unwrap().len(), full.metadata().unwrap().len());
        assert!(small < large / 3, "{small} and {large}");
        for known in bases() {
            let together = Memory::Packed(changes.try_clone().unwrap(), Some(Box::new(known)));
            assert_eq!(together.sha256(&|_| true).unwrap(), sha256);
            let (to, again) = (new(), new());
            assert_eq!(unpack(&together, &to, &|_| true).unwrap(), sha256);
            assert!(content(&to) == content(&later));
            // It can be made whole.
            assert_eq!(pack(&together, &again, &|_| true).unwrap(), sha256);
            assert_eq!(header(&again).unwrap().base, None);
            assert_eq!(whole(&again).sha256(&|_| true).unwrap(), sha256);
        }
    }
    assert_eq!(whole(&changes).sha256(&|_| true).unwrap_err().kind(), io::ErrorKind::InvalidData);
    // With another base it is something else, and its digest says so.
    let other = memory(LENGTH, &[0, 8192, 1 << 20, 5 << 20]);
    let together = Memory::Packed(changes.try_clone().unwrap(), Some(Box::new(plain(&other))));
    assert!(!together.sha256(&|_| true).is_ok_and(|found| found == sha256));
}

#[test]
fn memories_that_have_little_in_common_are_not_told_by_each_other() {
    let (before, to) = (sample(), new());
    let other = memory(LENGTH, &[4096, 2 << 20]);
    let longer = new();
    longer.write_all_at(&content(&before), 0).unwrap();
    longer.set_len(LENGTH + PAGE as u64).unwrap();
    for from in [&other, &longer] {
        let packed = pack_changes(from, (id(), &plain(&before)), &to, &|_| true).unwrap();
        assert!(packed.is_none() && to.metadata().unwrap().len() == 0);
    }
    let stopped = pack_changes(&before, (id(), &plain(&before)), &to, &|_| false).unwrap_err();
    assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
    // The same memory is next to nothing.
    pack_changes(&before, (id(), &plain(&before)), &to, &|_| true).unwrap().unwrap();
    assert!(to.metadata().unwrap().len() < 1024);
}
