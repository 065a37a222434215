//! Malicious archives: nothing is written outside the directory, and refusals are reported.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use nexus_schema::ErrorCode;
use nexus_schema::tools::tree::TreeSummary;
use nexus_tree::{Broken, Limits, Top, TopIs, Unpacking, pax, unpack};
use tar::{EntryType, Header};

/// An archive with arbitrary entries.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn entry(mut self, kind: EntryType, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, name.as_bytes(), b"", data.as_bytes())
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

fn unpack_with(archive: &[u8], into: &Path, how: &mut Unpacking<'_>) -> Result<TreeSummary, Broken> {
    let into: OwnedFd = File::open(into).unwrap().into();
    unpack(archive, into, how, &mut |_, _| Ok(()))
}

#[track_caller]
fn refused(archive: Archive, into: &Path, why: &str) -> Broken {
    let broken = unpack_with(&archive.end(), into, &mut Unpacking::default()).unwrap_err();
    assert!(broken.to_string().contains(why), "{broken}");
    assert_eq!(broken.error.code(), ErrorCode::FileRefused);
    broken
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let into = place.path().join("into");
    fs::create_dir(&into).unwrap();
    for name in ["../out", "a/../../out", "..", "a/.."] {
        refused(Archive::default().file(name, "x"), &into, "leads out of the directory");
    }
    refused(Archive::default().file("/tmp/out", "x"), &into, "absolute");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&into).unwrap().count(), 0);
}

#[test]
fn nothing_is_written_through_a_link_of_the_archive_or_of_the_directory() {
    let place = tempfile::tempdir().unwrap();
    let (into, outside) = (place.path().join("into"), place.path().join("outside"));
    fs::create_dir(&into).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "mine").unwrap();
    symlink("../outside", into.join("there")).unwrap();
    refused(Archive::default().file("there/new", "x"), &into, "link or a file");
    refused(Archive::default().entry(EntryType::Directory, b"there/", b"", b""), &into, "link or a file");
    refused(Archive::default().symlink("made", "../outside").file("made/new", "x"), &into, "link or a file");
    refused(
        Archive::default().entry(EntryType::Link, b"hard", b"there/file", b""),
        &into,
        "not a file in the tree",
    );
    refused(Archive::default().entry(EntryType::Link, b"hard", b"../outside/file", b""), &into, "leads out");
    refused(Archive::default().entry(EntryType::Link, b"hard", b"", b""), &into, "hard link to nothing");
    // A file replaces a link, and is not written through it.
    symlink("../outside/file", into.join("final")).unwrap();
    let archive = Archive::default().file("final", "theirs").end();
    unpack_with(&archive, &into, &mut Unpacking::default()).unwrap();
    assert!(!into.join("final").is_symlink());
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

/// A later copy to the same place would follow a link at the top.
#[test]
fn the_top_is_what_was_asked_for() {
    let into = tempfile::tempdir().unwrap();
    let unpack_as = |top_is, archive: Archive| {
        let mut how = Unpacking { top: Top::Named(b"site".to_vec()), top_is, ..Unpacking::default() };
        unpack_with(&archive.end(), into.path(), &mut how).map_err(|broken| broken.to_string())
    };
    for target in ["/home/somebody", "../x", "x"] {
        let error = unpack_as(TopIs::Directory, Archive::default().symlink("top", target)).unwrap_err();
        assert!(error.contains("it is not a directory"), "{error}");
    }
    unpack_as(TopIs::Directory, Archive::default().file("top", "x")).unwrap_err();
    for target in ["/home/somebody", "../x", "x/../../y"] {
        let error = unpack_as(TopIs::Within, Archive::default().symlink("top", target)).unwrap_err();
        assert!(error.contains("a link that leads elsewhere"), "{error}");
    }
    assert_eq!(fs::read_dir(into.path()).unwrap().count(), 0);
    unpack_as(TopIs::Within, Archive::default().symlink("top", "x")).unwrap();
    unpack_as(TopIs::Anything, Archive::default().symlink("top", "/x")).unwrap();
    assert_eq!(fs::read_link(into.path().join("site")).unwrap(), Path::new("/x"));
}

#[test]
fn what_is_in_the_way_is_told_and_what_came_before_is_whole() {
    let into = tempfile::tempdir().unwrap();
    fs::create_dir(into.path().join("sub")).unwrap();
    fs::write(into.path().join("plain"), "x").unwrap();
    let archive =
        Archive::default().file("first", "1").file("sub", "a file where a directory is").file("last", "3");
    let broken = refused(archive, into.path(), "directory of that name is in the way");
    assert_eq!((broken.done.files, broken.done.last.as_deref()), (1, Some("first")));
    assert!(broken.to_tool_error().message.contains("the last is `first`"));
    assert_eq!(fs::read(into.path().join("first")).unwrap(), b"1");
    assert!(!into.path().join("last").exists());
    refused(Archive::default().file("plain/below", "x"), into.path(), "link or a file");
    assert_eq!(fs::read_dir(into.path()).unwrap().count(), 3, "nothing is left over");
}

#[test]
fn only_the_tree_that_was_asked_for_is_taken() {
    let into = tempfile::tempdir().unwrap();
    for (name, fine) in [("tree", true), ("tree/x", true), ("trees", false), ("other", false), (".", false)] {
        let archive = Archive::default().file(name, "x").end();
        let mut how = Unpacking { top: Top::Only(b"tree".to_vec()), ..Unpacking::default() };
        let result = unpack_with(&archive, into.path(), &mut how);
        assert_eq!(result.is_ok(), fine, "{name}");
        let _ = fs::remove_file(into.path().join("tree"))
            .or_else(|_| fs::remove_dir_all(into.path().join("tree")));
    }
}

#[test]
fn archives_that_are_cut_off_or_garbage_fail() {
    let into = tempfile::tempdir().unwrap();
    let whole = Archive::default().file("a", &"x".repeat(3000)).symlink("b", "a").end();
    for length in 0..whole.len() - 1024 {
        let broken = unpack_with(&whole[..length], into.path(), &mut Unpacking::default());
        assert!(broken.is_err(), "{length}");
    }
    for at in [0, 100, 124, 148, 156, 257] {
        let mut bad = whole.clone();
        bad[at] ^= 0x40;
        assert!(unpack_with(&bad, into.path(), &mut Unpacking::default()).is_err(), "{at}");
    }
    let mut endless = whole.clone();
    endless.resize(whole.len() + (2 << 20), 1);
    let broken = unpack_with(&endless, into.path(), &mut Unpacking::default()).unwrap_err();
    assert!(broken.to_string().contains("continues after its end mark"), "{broken}");
}

#[test]
fn lengths_are_capped_before_anything_is_kept() {
    let into = tempfile::tempdir().unwrap();
    // A name of 8 GiB, but only announced.
    for kind in [EntryType::GNULongName, EntryType::XHeader, EntryType::XGlobalHeader] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(8 << 30);
        header.set_cksum();
        let broken = unpack_with(header.as_bytes(), into.path(), &mut Unpacking::default()).unwrap_err();
        assert_eq!(broken.error.code(), ErrorCode::TooLarge, "{broken}");
    }
    // Each is small, but all are kept: those of one entry, and those for all entries.
    let extend = |archive: Archive, kind, number: usize| {
        let mut records = Vec::new();
        pax::record(&mut records, &format!("key.{number}"), &[b'v'; 400]);
        archive.entry(kind, b"records", b"", &records)
    };
    for kind in [EntryType::XHeader, EntryType::XGlobalHeader] {
        for (number_of, is_too_much) in [(4, false), (6, true)] {
            let archive = (0..number_of).fold(Archive::default(), |archive, number| {
                let archive = extend(archive, kind, number);
                if kind == EntryType::XGlobalHeader { archive.file("many", "") } else { archive }
            });
            let limits = Limits { header_bytes: 2000, ..Limits::default() };
            let mut how = Unpacking { limits, ..Unpacking::default() };
            let unpacked = unpack_with(&archive.file("last", "").end(), into.path(), &mut how);
            let code = unpacked.err().map(|broken| broken.error.code());
            assert_eq!(code, is_too_much.then_some(ErrorCode::TooLarge), "{kind:?} {number_of}");
        }
    }
    let limits = Limits { entries: 2, ..Limits::default() };
    let archive = Archive::default().file("a", "").file("b", "").file("c", "").end();
    let mut how = Unpacking { limits, ..Unpacking::default() };
    assert_eq!(unpack_with(&archive, into.path(), &mut how).unwrap_err().error.code(), ErrorCode::TooLarge);
    let limits = Limits { bytes: 1000, ..Limits::default() };
    let archive = Archive::default().file("d", &"x".repeat(800)).file("e", &"x".repeat(800)).end();
    let mut how = Unpacking { limits, ..Unpacking::default() };
    assert_eq!(unpack_with(&archive, into.path(), &mut how).unwrap_err().error.code(), ErrorCode::TooLarge);
    assert!(!into.path().join("e").exists());
    let limits = Limits { keep_free: u64::MAX, ..Limits::default() };
    let archive = Archive::default().file("f", "x").end();
    let mut how = Unpacking { limits, ..Unpacking::default() };
    assert_eq!(unpack_with(&archive, into.path(), &mut how).unwrap_err().error.code(), ErrorCode::DiskFull);
    // Attributes take room as well, even those of files without content.
    let mut records = Vec::new();
    pax::record(&mut records, "SCHILY.xattr.user.note", &[b'v'; 800]);
    let noted =
        |archive: Archive, name| archive.entry(EntryType::XHeader, b"records", b"", &records).file(name, "");
    let archive = noted(noted(Archive::default(), "g"), "h").end();
    for (limits, code, is_first_there) in [
        (Limits { bytes: 1000, ..Limits::default() }, ErrorCode::TooLarge, true),
        (Limits { keep_free: u64::MAX, ..Limits::default() }, ErrorCode::DiskFull, false),
    ] {
        let into = tempfile::tempdir().unwrap();
        let mut how = Unpacking { limits, ..Unpacking::default() };
        assert_eq!(unpack_with(&archive, into.path(), &mut how).unwrap_err().error.code(), code);
        assert_eq!(into.path().join("g").exists(), is_first_there);
        assert!(!into.path().join("h").exists());
    }
    let deep = "d/".repeat(45);
    let archive = Archive::default().file(&format!("{deep}f"), "x").end();
    let mut how = Unpacking { limits: Limits { depth: 40, ..Limits::default() }, ..Unpacking::default() };
    assert!(unpack_with(&archive, into.path(), &mut how).unwrap_err().to_string().contains("too deep"));
}

#[test]
fn maps_of_sparse_files_that_make_no_sense_are_refused() {
    let into = tempfile::tempdir().unwrap();
    let sparse = |parts: &[(u64, u64)], real: u64, size: u64| {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNUSparse);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[0] = b's';
        for (place, (offset, length)) in gnu.sparse.iter_mut().zip(parts) {
            place.set_offset(*offset);
            place.set_length(*length);
        }
        gnu.set_real_size(real);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(512 + size.next_multiple_of(512) as usize + 1024, 0);
        bytes
    };
    let good = sparse(&[(10, 2), (100, 2)], 200, 4);
    unpack_with(&good, into.path(), &mut Unpacking::default()).unwrap();
    assert_eq!(fs::metadata(into.path().join("s")).unwrap().len(), 200);
    for (parts, real, size) in [
        (&[(100, 2), (10, 2)][..], 200, 4),
        (&[(10, 5), (12, 5)], 200, 10),
        (&[(10, 300)], 200, 300),
        (&[(u64::MAX - 1, 4)], u64::MAX, 4),
        (&[(10, 2)], 200, 4),
    ] {
        let bad = sparse(parts, real, size);
        assert!(unpack_with(&bad, into.path(), &mut Unpacking::default()).is_err(), "{parts:?}");
    }
}

#[test]
fn setuid_bits_and_owners_are_taken_only_where_they_may_be() {
    let into = tempfile::tempdir().unwrap();
    let mut header = Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o6755);
    header.set_uid(12345);
    header.set_gid(12345);
    header.as_gnu_mut().unwrap().name[0] = b'x';
    header.set_entry_type(EntryType::Regular);
    header.set_cksum();
    let archive = [&header.as_bytes()[..], &[0; 1024]].concat();
    let mut how = Unpacking { modes: 0o777, ..Unpacking::default() };
    unpack_with(&archive, into.path(), &mut how).unwrap();
    let (file, directory) =
        (fs::metadata(into.path().join("x")).unwrap(), fs::metadata(into.path()).unwrap());
    assert_eq!(file.mode() & 0o7777, 0o755);
    assert_eq!((file.uid(), file.gid()), (directory.uid(), directory.gid()));
}
