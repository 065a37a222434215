//! Filesystems that Linux changed, compared. Tests that mount run as root.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::process::Command;

use nexus_schema::tools::checkpoint::PathChange::{self, Added, Changed, Removed};

use super::*;
use crate::os::mounted::{Mounted, run};

/// Two states of a filesystem: what the first has, and what is done to it then.
struct Pair {
    directory: TempDir,
}

impl Pair {
    fn new(before: impl FnOnce(&Path), change: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        File::create(&old).unwrap().set_len(64 << 20).unwrap();
        run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4", "-N", "20000"]).arg(&old));
        before(Mounted::writable(&old).path());
        run(Command::new("/bin/cp").arg("--sparse=always").arg(&old).arg(&new));
        change(Mounted::writable(&new).path());
        Self { directory }
    }

    fn side(&self, name: &str, place: &str) -> Side {
        let drive = Drive { place: place.to_owned(), file: self.directory.path().join(name) };
        Side { at: Timestamp::from_millis(0), drives: vec![drive], processes: Vec::new(), copies: None }
    }

    fn compare(&self, place: &str, wish: &Wish) -> Found {
        let until = Instant::now() + COMPARE_MAX;
        let found = files(&self.side("old", place), &self.side("new", place), wish, until).unwrap();
        Found {
            to_at: Timestamp::from_millis(0),
            added: found.added,
            changed: found.changed,
            removed: found.removed,
            files: found.files,
            is_cut: found.is_cut,
            diff: Some(found.diff),
            diff_is_cut: found.diff_is_cut,
            processes: None,
            notes: found.notes,
        }
    }
}

fn all() -> Wish {
    Wish { path: String::new(), limit: 200, text: false }
}

/// A change: what, the drive, the path, both sizes, and more about it.
type ChangeRow<'a> = (PathChange, &'a str, &'a str, Option<u64>, Option<u64>, String);

fn rows(found: &Found) -> Vec<ChangeRow<'_>> {
    let row = |file: &ChangedPath| file.what.join(" ");
    found
        .files
        .iter()
        .map(|file| {
            (file.change, file.path.as_str(), file.kind.as_str(), file.old_bytes, file.new_bytes, row(file))
        })
        .collect()
}

fn before(root: &Path) {
    fs::create_dir_all(root.join("etc/old")).unwrap();
    for name in
        ["same", "touched", "edited", "grown", "moded", "owned", "renamed", "typed", "attributed", "old/gone"]
    {
        fs::write(root.join("etc").join(name), format!("the file {name}\nsecond line\n")).unwrap();
    }
    symlink("there", root.join("etc/link")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"odd\xff\n")), "odd").unwrap();
    fs::write(root.join("binary"), [0, 1, 2]).unwrap();
}

fn change(root: &Path) {
    let at = |name: &str| root.join("etc").join(name);
    File::options().write(true).open(at("touched")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    // Of the same size.
    fs::write(at("edited"), "the file EDITED\nsecond line\n").unwrap();
    fs::write(at("grown"), "the file grown\nsecond line\nthird line\n").unwrap();
    fs::set_permissions(at("moded"), fs::Permissions::from_mode(0o4711)).unwrap();
    lchown(at("owned"), Some(1_000), Some(70_000)).unwrap();
    fs::rename(at("renamed"), at("named")).unwrap();
    fs::remove_file(at("typed")).unwrap();
    fs::create_dir(at("typed")).unwrap();
    rustix::fs::lsetxattr(at("attributed"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    fs::remove_dir_all(at("old")).unwrap();
    fs::remove_file(at("link")).unwrap();
    symlink("elsewhere", at("link")).unwrap();
    // Nothing is different in the end.
    fs::set_permissions(at("same"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(at("same"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::remove_file(root.join(OsStr::from_bytes(b"odd\xff\n"))).unwrap();
    fs::write(root.join("binary"), [0, 1, 3]).unwrap();
}

#[test]
fn every_change_is_found_and_nothing_else_when_mounted() {
    let pair = Pair::new(
        |root| {
            before(root);
            fs::set_permissions(root.join("etc/same"), fs::Permissions::from_mode(0o644)).unwrap();
        },
        change,
    );
    let found = pair.compare("", &all());
    let text = |what: &str| what.to_owned();
    let expected = [
        (Changed, "/binary", "file", Some(3), Some(3), text("content")),
        (Changed, "/etc/attributed", "file", Some(32), Some(32), text("attributes")),
        (Changed, "/etc/edited", "file", Some(28), Some(28), text("content")),
        (Changed, "/etc/grown", "file", Some(27), Some(38), text("content")),
        (Changed, "/etc/link", "symlink", None, None, text("target")),
        (Changed, "/etc/moded", "file", Some(27), Some(27), text("mode")),
        (Added, "/etc/named", "file", None, Some(29), text("")),
        (Removed, "/etc/old", "directory", None, None, text("")),
        (Removed, "/etc/old/gone", "file", Some(30), None, text("")),
        (Changed, "/etc/owned", "file", Some(27), Some(27), text("owner")),
        (Removed, "/etc/renamed", "file", Some(29), None, text("")),
        (Changed, "/etc/touched", "file", Some(29), Some(29), text("time")),
        (Changed, "/etc/typed", "directory", Some(27), None, text("type")),
        (Removed, "/odd\\xff\\x0a", "file", Some(3), None, text("")),
    ];
    assert_eq!(rows(&found), expected);
    assert_eq!((found.added, found.changed, found.removed, found.is_cut), (1, 9, 4, false));
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    // The other way round.
    let reversed = Pair { directory: pair.directory };
    let until = Instant::now() + COMPARE_MAX;
    let wish = all();
    let found = files(&reversed.side("new", ""), &reversed.side("old", ""), &wish, until).unwrap();
    assert_eq!((found.added, found.changed, found.removed), (4, 9, 1));
}

#[test]
fn a_path_narrows_and_a_limit_cuts_when_mounted() {
    let pair = Pair::new(before, change);
    let narrowed = |place: &str, path: &str| {
        let found = pair.compare(place, &Wish { path: path.to_owned(), ..all() });
        found.files.into_iter().map(|file| file.path).collect::<Vec<_>>()
    };
    assert_eq!(narrowed("", "/etc/old"), ["/etc/old", "/etc/old/gone"]);
    assert_eq!(narrowed("/data", "/data/etc/old"), ["/data/etc/old", "/data/etc/old/gone"]);
    assert_eq!(narrowed("/data", "/data/binary"), ["/data/binary"]);
    assert_eq!(narrowed("/srv/data", "/srv").len(), narrowed("", "").len());
    assert_eq!(narrowed("tools:", "").first().map(String::as_str), Some("tools:/binary"));
    for (place, path) in [("", "/et"), ("/data", "/dat"), ("/data", "/database"), ("tools:", "/etc")] {
        assert!(narrowed(place, path).is_empty(), "{place} {path}");
    }
    let cut = pair.compare("", &Wish { limit: 3, ..all() });
    assert_eq!((cut.files.len(), cut.is_cut, cut.removed), (3, true, 4));
}

#[test]
fn texts_are_shown_and_what_is_none_is_not_when_mounted() {
    let pair = Pair::new(before, |root| {
        change(root);
        fs::write(root.join("long"), "line\n".repeat(5_000)).unwrap();
    });
    let found = pair.compare("", &Wish { text: true, ..all() });
    let diff = found.diff.unwrap();
    assert!(
        diff.contains(
            "--- /etc/grown\n+++ /etc/grown\n@@ -1,2 +1,3 @@\n the file grown\n second line\n+third line\n"
        ),
        "{diff}"
    );
    assert!(diff.contains("--- /dev/null\n+++ /etc/named\n") && diff.contains("+++ /dev/null\n"), "{diff}");
    assert!(!diff.contains("binary") && !diff.contains("/etc/moded"), "{diff}");
    assert!(diff.contains("the rest of this file's diff is left out") && diff.len() <= DIFF_BYTES, "{diff}");
}

#[test]
fn ten_thousand_files_are_compared_quickly_when_mounted() {
    let pair = Pair::new(
        |root| {
            for directory in 0..100 {
                fs::create_dir(root.join(format!("{directory}"))).unwrap();
                for file in 0..100 {
                    fs::write(root.join(format!("{directory}/a-file-{file}")), "x").unwrap();
                }
            }
        },
        |root| fs::write(root.join("50/a-file-7"), "y").unwrap(),
    );
    let begun = Instant::now();
    let found = pair.compare("", &all());
    let took = begun.elapsed();
    assert_eq!(rows(&found).len(), 1, "{:?}", found.files);
    println!("10,100 files compared in {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let side = |places: &[&str]| Side {
        at: Timestamp::from_millis(0),
        drives: places.iter().map(|place| Drive { place: (*place).to_owned(), file: file.clone() }).collect(),
        processes: Vec::new(),
        copies: None,
    };
    let until = Instant::now() + COMPARE_MAX;
    let wish = all();
    let found = files(&side(&["", "/a"]), &side(&["", "b:"]), &wish, until).unwrap();
    assert_eq!(found.notes.len(), 3, "{:?}", found.notes);
    assert!(found.notes[0].contains("there is no ext4 filesystem"), "{:?}", found.notes);
    assert!(found.notes[1].contains("/a is only in `from`") && found.notes[2].contains("b: is only in `to`"));
    std::fs::remove_file(&file).unwrap();
    let error = files(&side(&[""]), &side(&[""]), &wish, until).unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed);
    File::create(&file).unwrap().set_len(8 << 20).unwrap();
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&file));
    let error = files(&side(&[""]), &side(&[""]), &wish, Instant::now()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
}
