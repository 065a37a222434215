//! Trees are copied exactly, and other archivers understand the stream.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use nexus_schema::stream::TreePart;
use nexus_schema::tools::tree::{SkipReason, TreeSummary};
use nexus_tree::{Filter, Owner, Packing, Part, Source, TreeError, Unpacking, pack, plan, unpack};

fn packing() -> Packing {
    Packing { top: Vec::new(), filter: Filter::none(), specials: false, from: 0 }
}

fn packed(root: &Path, how: &Packing) -> (Vec<u8>, TreeSummary) {
    let mut archive = Vec::new();
    let source = Source::open(root, false).unwrap();
    let summary = pack(&source, how, &mut archive, &mut |_, _| Ok(())).unwrap();
    (archive, summary)
}

fn directory(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn unpacked(archive: &[u8], into: &Path) -> TreeSummary {
    // Pieces whose size does not align with anything.
    let source = BufReader::with_capacity(777, archive);
    let mut how = Unpacking { owner: Owner::Same, is_new: true, ..Unpacking::default() };
    unpack(source, directory(into), &mut how, &mut |_, _| Ok(())).unwrap()
}

/// The facts of a tree: for each path its type, mode, times, content and link.
fn facts(root: &Path) -> BTreeMap<Vec<u8>, String> {
    fn look(root: &Path, path: &Path, into: &mut BTreeMap<Vec<u8>, String>) {
        let meta = fs::symlink_metadata(path).unwrap();
        let mut text = format!(
            "{:o} {}.{:09} {}:{}",
            meta.mode(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.uid(),
            meta.gid()
        );
        if meta.is_symlink() {
            text += &format!(" -> {:?}", fs::read_link(path).unwrap());
        } else if meta.is_file() {
            text += &format!(" x{} {} bytes {:?}", meta.nlink(), meta.len(), checksum(path));
        }
        into.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), text);
        if meta.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                look(root, &entry.unwrap().path(), into);
            }
        }
    }
    let mut all = BTreeMap::new();
    look(root, root, &mut all);
    all
}

#[track_caller]
fn same(expected: &BTreeMap<Vec<u8>, String>, found: &BTreeMap<Vec<u8>, String>) {
    for path in expected.keys().chain(found.keys()) {
        let name = String::from_utf8_lossy(&path[..path.len().min(40)]);
        assert_eq!(expected.get(path), found.get(path), "{name}");
    }
}

fn checksum(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    bytes.iter().fold(bytes.len() as u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

fn set_time(path: &Path, seconds: i64, nanoseconds: u32) {
    let time = match seconds {
        0.. => SystemTime::UNIX_EPOCH + Duration::new(seconds.unsigned_abs(), nanoseconds),
        _ => {
            SystemTime::UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs())
                + Duration::new(0, nanoseconds)
        }
    };
    File::open(path).unwrap().set_times(FileTimes::new().set_modified(time)).unwrap();
}

/// A tree with one of everything.
fn make(root: &Path) {
    fs::create_dir(root.join("empty")).unwrap();
    fs::write(root.join("nothing"), "").unwrap();
    fs::write(root.join("text"), "hello\n").unwrap();
    fs::write(root.join("program"), vec![7; 300_000]).unwrap();
    fs::set_permissions(root.join("program"), PermissionsExt::from_mode(0o4750)).unwrap();
    fs::create_dir(root.join("closed")).unwrap();
    fs::write(root.join("closed/inside"), "x".repeat(512)).unwrap();
    fs::hard_link(root.join("text"), root.join("zz-other-name")).unwrap();
    symlink("text", root.join("link")).unwrap();
    symlink("/no/such/place", root.join("dangling")).unwrap();
    symlink("t".repeat(300), root.join("long-link")).unwrap();
    let mut deep = root.to_owned();
    for letter in ["a", "b", "c", "d", "e", "f"] {
        deep = deep.join(letter.repeat(200));
        fs::create_dir(&deep).unwrap();
    }
    fs::write(deep.join("n".repeat(255)), "deep").unwrap();
    let every: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    for name in every.chunks(100) {
        fs::write(root.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let holes = File::create(root.join("holes")).unwrap();
    for at in 0..40 {
        holes.write_all_at(b"data", at * 1_000_000 + 500_000).unwrap();
    }
    holes.set_len(50_000_000).unwrap();
    File::create(root.join("all-hole")).unwrap().set_len(10_000_000).unwrap();
    set_time(&root.join("text"), 1_600_000_000, 123_456_789);
    set_time(&root.join("nothing"), -86_400, 500_000_000);
    set_time(&root.join("program"), 0, 0);
    set_time(&root.join("closed"), 1_500_000_000, 1);
    fs::set_permissions(root.join("closed"), PermissionsExt::from_mode(0o550)).unwrap();
    set_time(root, 1_400_000_000, 7);
}

#[test]
fn a_tree_comes_over_as_it_is() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make(from.path());
    let (archive, summary) = packed(from.path(), &packing());
    let done = unpacked(&archive, to.path());
    same(&facts(from.path()), &facts(to.path()));
    assert_eq!((summary.files, summary.hard_links, summary.symlinks), (10, 1, 3), "{summary:?}");
    // The top is not an entry of the copy.
    assert_eq!(done.entries() + 1, summary.entries());
    assert_eq!(done.links_out, 1);
    let planned = plan(&Source::open(from.path(), false).unwrap(), &packing(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(planned.entries(), summary.entries());
    let holes = fs::metadata(to.path().join("holes")).unwrap();
    assert!(holes.blocks() * 512 < 2_000_000, "{} blocks", holes.blocks());
    assert!(archive.len() < 2_000_000, "{}", archive.len());
}

#[test]
fn copying_again_replaces_and_keeps_what_else_is_there() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make(from.path());
    let (archive, _) = packed(from.path(), &packing());
    unpacked(&archive, to.path());
    fs::write(to.path().join("text"), "changed").unwrap();
    fs::write(to.path().join("own"), "kept").unwrap();
    fs::remove_file(to.path().join("link")).unwrap();
    fs::write(to.path().join("link"), "a file where a link was").unwrap();
    unpacked(&archive, to.path());
    let mut after = facts(to.path());
    assert!(after.remove(&b"own"[..]).is_some());
    // Existing directories keep their times.
    let files = |facts: &BTreeMap<Vec<u8>, String>| -> BTreeMap<Vec<u8>, String> {
        facts
            .iter()
            .filter(|(_, text)| !text.starts_with('4'))
            .map(|(path, text)| (path.clone(), text.clone()))
            .collect()
    };
    same(&files(&facts(from.path())), &files(&after));
    assert!(!after.keys().any(|name| name.starts_with(b".nexus-")), "nothing is left over");
}

#[test]
fn a_file_alone_and_a_tree_under_another_name() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(from.path().join("one"), "1").unwrap();
    symlink("one", from.path().join("link")).unwrap();
    let how = Packing { top: b"other".to_vec(), ..packing() };
    unpacked(&packed(&from.path().join("one"), &how).0, to.path());
    assert_eq!(fs::read(to.path().join("other")).unwrap(), b"1");
    let how = Packing { top: b"tree".to_vec(), ..packing() };
    unpacked(&packed(from.path(), &how).0, to.path());
    assert_eq!(fs::read(to.path().join("tree/one")).unwrap(), b"1");
    let how = Packing { top: b"itself".to_vec(), ..packing() };
    unpacked(&packed(&from.path().join("link"), &how).0, to.path());
    assert!(to.path().join("itself").is_symlink());
    let followed = Source::open(&from.path().join("link"), true).unwrap();
    let planned = plan(&followed, &how, &mut |_, _| Ok(())).unwrap();
    assert_eq!((planned.files, planned.symlinks), (1, 0));
}

#[test]
fn tar_understands_what_is_packed_and_its_archives_are_understood() {
    let (from, to, back) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make(from.path());
    let (archive, _) = packed(from.path(), &packing());
    let mut tar = Command::new("tar");
    tar.args(["-x", "-p", "-f", "-", "-C"]).arg(to.path()).stdin(Stdio::piped());
    let mut child = tar.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &archive).unwrap();
    assert!(child.wait().unwrap().success());
    same(&facts(from.path()), &facts(to.path()));

    let mut tar = Command::new("tar");
    tar.args(["-c", "-S", "--format=gnu", "-f", "-", "-C"]).arg(from.path()).arg(".");
    let output = tar.output().unwrap();
    assert!(output.status.success());
    unpacked(&output.stdout, back.path());
    // This format only has whole seconds.
    let whole = |facts: BTreeMap<Vec<u8>, String>| -> Vec<String> {
        facts
            .into_values()
            .map(|text| text.split_once('.').map_or(String::new(), |(_, rest)| rest[10..].to_owned()))
            .collect()
    };
    assert_eq!(whole(facts(from.path())), whole(facts(back.path())));
}

#[test]
fn excluded_and_ignored_and_special_files_are_left_out_and_counted() {
    let from = tempfile::tempdir().unwrap();
    let root = from.path();
    for path in [".git", "target", "src/node_modules/x"] {
        fs::create_dir_all(root.join(path)).unwrap();
    }
    for path in [
        ".git/config",
        "target/big",
        "src/main.rs",
        "src/a.o",
        "src/node_modules/x/y",
        "note.log",
        "src/kept.log",
    ] {
        fs::write(root.join(path), "x").unwrap();
    }
    fs::write(root.join(".gitignore"), "/target\n*.log\n").unwrap();
    fs::write(root.join("src/.gitignore"), "!kept.log\n").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let filter = Filter::new(&["node_modules/".into(), "*.o".into()], true).unwrap();
    let how = Packing { top: Vec::new(), filter, specials: false, from: 0 };
    let (archive, summary) = packed(root, &how);
    let to = tempfile::tempdir().unwrap();
    unpacked(&archive, to.path());
    let names: Vec<_> = facts(to.path()).into_keys().map(|name| String::from_utf8(name).unwrap()).collect();
    assert_eq!(
        names,
        ["", ".git", ".git/config", ".gitignore", "src", "src/.gitignore", "src/kept.log", "src/main.rs"]
    );
    let skipped = summary.skipped;
    assert_eq!((skipped.excluded, skipped.ignored, skipped.special), (2, 2, 1), "{summary:?}");
    assert!(summary.skipped_names.iter().any(|s| s.path == "pipe" && s.why == SkipReason::Special));
    // If requested, they are copied too.
    let how = Packing { top: Vec::new(), filter: Filter::none(), specials: true, from: 0 };
    let (archive, _) = packed(root, &how);
    let mut how = Unpacking { specials: true, ..Unpacking::default() };
    let done = unpack(&archive[..], directory(to.path()), &mut how, &mut |_, _| Ok(())).unwrap();
    assert_eq!(done.specials, 1);
}

#[test]
fn a_copy_that_is_no_longer_wanted_ends() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("big"), vec![1; 2_000_000]).unwrap();
    let source = Source::open(from.path(), false).unwrap();
    let mut stop = |bytes, _| if bytes > 500_000 { Err(TreeError::Cancelled) } else { Ok(()) };
    let error = pack(&source, &packing(), &mut Vec::new(), &mut stop).unwrap_err();
    assert!(matches!(error, TreeError::Cancelled));
    let (archive, _) = packed(from.path(), &packing());
    let to = tempfile::tempdir().unwrap();
    let broken =
        unpack(&archive[..], directory(to.path()), &mut Unpacking::default(), &mut stop).unwrap_err();
    assert!(matches!(broken.error, TreeError::Cancelled));
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0, "half a file is no file");
}

#[test]
fn a_part_of_a_file_is_gone_on_with() {
    let root = tempfile::tempdir().unwrap();
    let whole: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    fs::write(root.path().join("whole"), &whole).unwrap();
    // A hole before, at and behind the offset.
    let holes = File::create(root.path().join("holes")).unwrap();
    for at in [0, 2_000_000, 4_000_000] {
        holes.write_all_at(&[7; 100_000], at).unwrap();
    }
    holes.set_len(6_000_000).unwrap();
    for (name, kept) in
        [("whole", 1_000_001), ("whole", 3_000_000), ("holes", 2_050_000), ("holes", 3_000_000), ("whole", 0)]
    {
        let path = root.path().join(name);
        let content = fs::read(&path).unwrap();
        let into = tempfile::tempdir().unwrap();
        let half = into.path().join(format!(".{name}.nexus-part"));
        fs::write(&half, &content[..kept]).unwrap();
        let source = Source::open(&path, false).unwrap();
        let find = || Part::find_or_make(directory(into.path()).as_fd(), name.as_bytes());
        let mut part = find().unwrap();
        assert!(find().unwrap_err().to_string().contains("under way"), "it is in use");
        let described = part.describe(&mut |_, _| Ok(())).unwrap();
        let from = source.same_part(&described, &mut |_, _| Ok(())).unwrap();
        assert_eq!(from, kept as u64);
        let other = TreePart { sha256: "0".repeat(64), ..described };
        assert_eq!(source.same_part(&other, &mut |_, _| Ok(())).unwrap(), 0);
        part.keep(from).unwrap();
        let mut archive = Vec::new();
        pack(&source, &Packing { top: name.into(), from, ..packing() }, &mut archive, &mut |_, _| Ok(()))
            .unwrap();
        assert!(archive.len() <= content.len() - kept + 4096, "{name} {kept}: {} bytes", archive.len());
        // An archive that breaks off leaves what came.
        if name == "whole" && kept == 1_000_001 {
            let mut how = Unpacking { part: Some(part), ..Unpacking::default() };
            unpack(&archive[..1_000_000], directory(into.path()), &mut how, &mut |_, _| Ok(())).unwrap_err();
            drop(how);
            let left = fs::read(&half).unwrap();
            assert!(
                left.len() > 1_900_000 && left == content[..left.len()] && !into.path().join(name).exists()
            );
            part = find().unwrap();
            part.keep(from).unwrap();
        }
        let mut how = Unpacking { part: Some(part), ..Unpacking::default() };
        unpack(&archive[..], directory(into.path()), &mut how, &mut |_, _| Ok(())).unwrap();
        assert!(fs::read(into.path().join(name)).unwrap() == content, "{name} {kept}");
        assert!(!half.exists());
        // Without what it is the rest of, it is refused.
        if from > 0 {
            let mut how = Unpacking::default();
            let error =
                unpack(&archive[..], directory(into.path()), &mut how, &mut |_, _| Ok(())).unwrap_err();
            assert!(error.to_string().contains("the rest of a file"), "{error}");
            let mut how = Unpacking { part: Some(find().unwrap()), ..Unpacking::default() };
            let error =
                unpack(&archive[..], directory(into.path()), &mut how, &mut |_, _| Ok(())).unwrap_err();
            assert!(error.to_string().contains("another part"), "{error}");
            drop(how);
            assert!(!half.exists(), "an empty part goes");
        }
        let part = Part::find_or_make(directory(into.path()).as_fd(), b"elsewhere").unwrap();
        let mut how = Unpacking { part: Some(part), ..Unpacking::default() };
        unpack(&archive[..], directory(into.path()), &mut how, &mut |_, _| Ok(())).unwrap_err();
        assert!(!into.path().join("elsewhere").exists());
    }
}

#[test]
fn attributes_of_files_are_kept_and_rights_only_with_owner_and_mode() {
    let from = tempfile::tempdir().unwrap();
    let file = from.path().join("file");
    fs::write(&file, "x").unwrap();
    let set = |name: &str, value: &[u8]| {
        rustix::fs::setxattr(file.as_path(), name, value, rustix::fs::XattrFlags::empty()).is_ok()
    };
    let note = b"a\n=b\0";
    if !set("user.note", note) {
        // The filesystem of temporary files has none.
        return;
    }
    assert!(set("user.empty", b""));
    // More names than a small buffer holds.
    assert!((0..10).all(|number| set(&format!("user.{number}{}", "n".repeat(50)), b"v")));
    // CAP_NET_RAW, as `struct vfs_cap_data` of linux/capability.h. Only root may set it.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let has_rights = set("security.capability", &capability);
    fs::set_permissions(&file, PermissionsExt::from_mode(0o444)).unwrap();
    let get = |path: &Path, name: &str| {
        let mut value = vec![0_u8; 100];
        let length = rustix::fs::getxattr(path, name, &mut value).ok()?;
        Some(value[..length].to_vec())
    };
    let (archive, _) = packed(from.path(), &packing());
    for (owner, modes, rights) in
        [(Owner::Same, 0o7777, has_rights), (Owner::Same, 0o777, false), (Owner::Own, 0o7777, false)]
    {
        let to = tempfile::tempdir().unwrap();
        let mut how = Unpacking { owner, modes, ..Unpacking::default() };
        unpack(&archive[..], directory(to.path()), &mut how, &mut |_, _| Ok(())).unwrap();
        let file = to.path().join("file");
        assert_eq!(get(&file, "user.note").as_deref(), Some(&note[..]));
        assert_eq!(get(&file, "user.empty"), Some(Vec::new()));
        assert_eq!(get(&file, &format!("user.9{}", "n".repeat(50))), Some(b"v".to_vec()));
        assert_eq!(
            get(&file, "security.capability"),
            rights.then(|| capability.to_vec()),
            "{owner:?} {modes:o}"
        );
    }
}
