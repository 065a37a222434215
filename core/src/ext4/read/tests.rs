//! Filesystems of mke2fs and Linux, read as Linux shows them. Tests that mount run as root.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use rand::{Rng, SeedableRng};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat};

use super::*;
use crate::os::mounted::{Mounted, run};

/// What is compared of a file: attributes, target, content and extended attributes.
type Listing = BTreeMap<Vec<u8>, String>;

fn made(directory: &Path, mebibytes: u64, options: &[&str]) -> PathBuf {
    let disk = directory.join("disk");
    File::create(&disk).unwrap().set_len(mebibytes << 20).unwrap();
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).args(options).arg(&disk));
    disk
}

/// What this reader sees.
fn seen(disk: &Path) -> Result<Listing, ReadError> {
    seen_of(disk, u64::MAX)
}

/// The same, with only so much of each content.
fn seen_of(disk: &Path, most: u64) -> Result<Listing, ReadError> {
    let filesystem = Filesystem::open(File::open(disk).unwrap())?;
    let mut listing = Listing::new();
    let mut failed = None;
    filesystem.walk(&mut |entry| match described(&filesystem, entry.inode, most) {
        Ok(text) => {
            listing.insert(entry.path.to_vec(), text);
            ControlFlow::Continue(())
        }
        Err(error) => {
            failed = Some(error);
            ControlFlow::Break(())
        }
    })?;
    failed.map_or(Ok(listing), Err)
}

fn described(filesystem: &Filesystem, inode: &Inode, most: u64) -> Result<String, ReadError> {
    let mut content = 0;
    if inode.kind() == Kind::File {
        let (mut offset, mut buffer) = (0, vec![0; 70_001]);
        while offset < most {
            let count = filesystem.read(inode, offset, &mut buffer)?;
            if count == 0 {
                break;
            }
            content = crc32c::crc32c_append(content, &buffer[..count]);
            offset += count as u64;
        }
    }
    let target = if inode.kind() == Kind::Symlink { filesystem.link_target(inode)? } else { Vec::new() };
    let xattrs: BTreeMap<_, _> = filesystem.xattrs(inode)?.into_iter().collect();
    Ok(format!(
        "{} {:o} {}:{} {} {} {:?} {:?} {:?} {content:08x} {:?} {xattrs:?}",
        inode.number,
        inode.mode,
        inode.uid,
        inode.gid,
        inode.size,
        inode.links,
        inode.mtime,
        inode.ctime,
        inode.device.unwrap_or_default(),
        String::from_utf8_lossy(&target),
    ))
}

/// What Linux shows of a mounted filesystem.
fn shown(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut content = 0;
            if meta.is_file() {
                content = crc32c::crc32c(&fs::read(&path).unwrap());
            }
            let target = if meta.is_symlink() { fs::read_link(&path).unwrap() } else { PathBuf::new() };
            let text = format!(
                "{} {:o} {}:{} {} {} {:?} {:?} {:?} {content:08x} {:?} {:?}",
                meta.ino(),
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.len(),
                meta.nlink(),
                (meta.mtime(), meta.mtime_nsec()),
                (meta.ctime(), meta.ctime_nsec()),
                (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())),
                target.to_string_lossy(),
                xattrs(&path),
            );
            listing.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), text);
            if meta.is_dir() {
                left.push(path);
            }
        }
    }
    listing
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0_u8; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0_u8; 64 << 10];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
        value[..length].to_vec()
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::rngs::StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

/// Something of every kind.
fn populate(root: &Path) {
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    for (number, length) in [0, 1, 59, 60, 61, 100, 150, 4_096, 300_000, 3_000_000].into_iter().enumerate() {
        fs::write(root.join(format!("a/file-{length}")), noise(number as u64, length)).unwrap();
    }
    for length in [1, 59, 60, 61, 1_000] {
        symlink("t".repeat(length), root.join(format!("a/link-{length}"))).unwrap();
    }
    fs::create_dir(root.join("many")).unwrap();
    for number in 0..3_000 {
        File::create(root.join(format!("many/a-rather-long-name-{number}"))).unwrap();
    }
    // Many extents, and with small blocks three levels of lists.
    let sparse = File::create(root.join("a/b/sparse")).unwrap();
    for nth in 0..1_200_u64 {
        sparse.write_all_at(b"data", nth * 100_003).unwrap();
    }
    fs::write(root.join("a/b/linked"), b"one").unwrap();
    fs::hard_link(root.join("a/b/linked"), root.join("a/b/c/again")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"odd \xff\n\"name")), b"odd").unwrap();
    let owned = root.join("a/owned");
    File::create(&owned)
        .unwrap()
        .set_modified(SystemTime::UNIX_EPOCH + Duration::new(5_000_000_000, 7))
        .unwrap();
    lchown(&owned, Some(70_000), Some(u32::MAX - 7)).unwrap();
    fs::set_permissions(&owned, fs::Permissions::from_mode(0o4751)).unwrap();
    for (name, kind, device) in [
        ("fifo", FileType::Fifo, 0),
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("large", FileType::BlockDevice, makedev(300, 70_000)),
        ("socket", FileType::Socket, 0),
    ] {
        mknodat(CWD, root.join("a").join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
    }
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, id) in
        [(1_u16, u32::MAX), (2, 1_000), (4, u32::MAX), (8, 70_000), (16, u32::MAX), (32, u32::MAX)]
    {
        acl.extend([tag.to_le_bytes(), 5_u16.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let set = |path: &str, name: &str, value: &[u8]| {
        lsetxattr(root.join(path), name, value, XattrFlags::empty()).unwrap();
    };
    set("a/file-1", "user.small", b"1");
    set("a/file-1", "user.empty", b"");
    set("a/file-100", "user.long", &[b'v'; 700]);
    set("a/file-100", "system.posix_acl_access", &acl);
    set("a/b", "system.posix_acl_default", &acl);
    set("a/link-60", "trusted.x", b"\0\xff");
}

#[track_caller]
fn assert_same(seen: &Listing, shown: &Listing, what: &[&str]) {
    for (path, expected) in shown {
        assert_eq!(seen.get(path), Some(expected), "{what:?}: {}", String::from_utf8_lossy(path));
    }
    assert_eq!(seen.len(), shown.len(), "{what:?}");
}

const FORMS: [&[&str]; 6] = [
    &["-b", "4096"],
    &["-O", "inline_data,ea_inode,large_dir"],
    &["-b", "1024", "-O", "^extents,^64bit,^flex_bg,^metadata_csum,uninit_bg"],
    &["-b", "2048", "-O", "meta_bg,^resize_inode"],
    &["-I", "128", "-O", "^dir_index"],
    &["-b", "1024", "-O", "^has_journal,bigalloc,sparse_super2"],
];

#[test]
fn everything_is_read_as_linux_shows_it_when_mounted() {
    for options in FORMS {
        let base = tempfile::tempdir().unwrap();
        let disk = made(base.path(), 64, options);
        let shown = {
            let mounted = Mounted::writable(&disk);
            populate(mounted.path());
            shown(mounted.path())
        };
        assert!(shown.len() > 3_020);
        assert_same(&seen(&disk).unwrap(), &shown, options);
    }
}

/// A copy of a filesystem whose newest metadata is only in its journal, and what Linux shows of it.
fn unclean(directory: &Path, options: &[&str]) -> (PathBuf, Listing) {
    let disk = made(directory, 64, options);
    let mounted = Mounted::writable(&disk);
    populate(mounted.path());
    let sync = || rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();
    sync();
    // Blocks of directories become blocks of files, which the journal must not overwrite.
    for number in 0..3_000 {
        fs::remove_file(mounted.path().join(format!("many/a-rather-long-name-{number}"))).unwrap();
    }
    fs::remove_dir(mounted.path().join("many")).unwrap();
    sync();
    fs::write(mounted.path().join("later"), noise(9, 2_000_000)).unwrap();
    // The journal's own magic number at the start of a block of metadata.
    symlink(
        OsStr::from_bytes(&[&[0xc0, 0x3b, 0x39, 0x98][..], &[b'x'; 96]].concat()),
        mounted.path().join("a/magic"),
    )
    .unwrap();
    sync();
    let copy = directory.join("copy");
    run(Command::new("/bin/cp").arg("--sparse=always").arg(&disk).arg(&copy));
    let shown = shown(mounted.path());
    (copy, shown)
}

#[test]
fn a_journal_is_read_without_being_written_when_mounted() {
    for options in [FORMS[0], FORMS[2], &["-O", "^64bit"], &["-O", "^metadata_csum"]] {
        let base = tempfile::tempdir().unwrap();
        let (copy, shown) = unclean(base.path(), options);
        let before = fs::read(&copy).unwrap();
        let filesystem = Filesystem::open(File::open(&copy).unwrap()).unwrap();
        assert!(filesystem.geometry.needs_recovery && filesystem.disk.newer_blocks() > 3, "{options:?}");
        assert_same(&seen(&copy).unwrap(), &shown, options);
        assert!(fs::read(&copy).unwrap() == before);
    }
}

/// A file of two blocks, of which the journal has both newer, and then takes the second back.
fn journaled(directory: &Path, how: &str) -> PathBuf {
    let source = directory.join("source");
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("file"), [b'o'; 2_048]).unwrap();
    let disk = made(directory, 4, &["-b", "1024", "-d", source.to_str().unwrap()]);
    let asked = Command::new("/sbin/debugfs").args(["-R", "blocks /file"]).arg(&disk).output().unwrap();
    let blocks = String::from_utf8(asked.stdout).unwrap().trim().replace(' ', ",");
    // The first block begins like one of the journal's own.
    let newer = [&[0xc0, 0x3b, 0x39, 0x98][..], &[b'n'; 2_044]].concat();
    fs::write(directory.join("newer"), newer).unwrap();
    let (newer, script) = (directory.join("newer"), directory.join("script"));
    let second = blocks.split(',').next_back().unwrap();
    fs::write(&script, format!("{how}\njw -b {blocks} {}\njw -r {second}\njc\n", newer.display())).unwrap();
    run(Command::new("/sbin/debugfs").arg("-w").arg("-f").arg(script).arg(&disk));
    disk
}

fn file_of(disk: &Path) -> Vec<u8> {
    let filesystem = Filesystem::open(File::open(disk).unwrap()).unwrap();
    let mut found = None;
    filesystem
        .walk(&mut |entry| {
            if entry.path == b"file" {
                found = Some(entry.inode.clone());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    let mut content = vec![0; 4_096];
    let count = filesystem.read(&found.unwrap(), 0, &mut content).unwrap();
    content[..count].to_vec()
}

#[test]
fn blocks_of_the_journal_are_seen_and_those_that_it_took_back_are_not() {
    for how in ["jo", "jo -c -v 2", "jo -c -v 3"] {
        let directory = tempfile::tempdir().unwrap();
        let disk = journaled(directory.path(), how);
        let expected = [&[0xc0, 0x3b, 0x39, 0x98][..], &[b'n'; 1_020], &[b'o'; 1_024]].concat();
        assert!(file_of(&disk) == expected, "{how}");
    }
}

#[test]
fn a_block_of_the_journal_with_a_wrong_checksum_is_not_seen() {
    let directory = tempfile::tempdir().unwrap();
    let disk = journaled(directory.path(), "jo -c -v 3");
    let asked = Command::new("/sbin/debugfs").args(["-R", "blocks <8>"]).arg(&disk).output().unwrap();
    let blocks = String::from_utf8(asked.stdout).unwrap();
    // After the superblock and the descriptor.
    let first: u64 = blocks.split_whitespace().nth(2).unwrap().parse().unwrap();
    File::options().write(true).open(&disk).unwrap().write_all_at(b"x", first * 1_024 + 500).unwrap();
    assert!(file_of(&disk) == [b'o'; 2_048]);
}

#[test]
fn a_transaction_that_was_not_completed_never_happened() {
    let directory = tempfile::tempdir().unwrap();
    let disk = journaled(directory.path(), "jo -c -v 3");
    assert!(file_of(&disk) != [b'o'; 2_048]);
    let bytes = fs::read(&disk).unwrap();
    let is_commit = |block: &[u8]| block.starts_with(&[0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 2]);
    let commits = bytes.chunks(1_024).enumerate().filter(|(_, block)| is_commit(block));
    let commits: Vec<usize> = commits.map(|(number, _)| number * 1_024 + 16).collect();
    assert!(!commits.is_empty());
    let file = File::options().write(true).open(&disk).unwrap();
    for at in commits {
        file.write_all_at(&[!bytes[at]], at as u64).unwrap();
    }
    assert!(file_of(&disk) == [b'o'; 2_048]);
}

#[test]
fn damage_is_an_error_and_never_a_panic_when_mounted() {
    let base = tempfile::tempdir().unwrap();
    let (journaled, _) = unclean(base.path(), &["-b", "1024"]);
    let content = tempfile::tempdir().unwrap();
    fs::create_dir_all(content.path().join("a/b")).unwrap();
    for number in 0..200 {
        fs::write(content.path().join(format!("a/{number}")), noise(number, 200)).unwrap();
    }
    symlink("t".repeat(100), content.path().join("a/b/link")).unwrap();
    let mut disks = vec![journaled];
    for (number, options) in
        [&["-O", "inline_data"][..], &["-O", "^extents,^64bit,^metadata_csum,uninit_bg"], &[]]
            .into_iter()
            .enumerate()
    {
        let directory = base.path().join(number.to_string());
        fs::create_dir(&directory).unwrap();
        let source = content.path().to_str().unwrap();
        disks.push(made(&directory, 4, &[options, &["-b", "1024", "-d", source]].concat()));
    }
    let mut refused = 0;
    for disk in disks {
        let whole = fs::read(&disk).unwrap();
        // Only what is used: flipping zeros of free blocks shows nothing.
        let used: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).take(400_000).collect();
        let file = File::options().write(true).open(&disk).unwrap();
        for seed in 0..120 {
            let mut random = rand::rngs::StdRng::seed_from_u64(seed);
            let places: Vec<usize> =
                (0..1 << (seed % 7)).map(|_| used[random.gen_range(0..used.len())]).collect();
            for at in &places {
                file.write_all_at(&[random.r#gen()], *at as u64).unwrap();
            }
            refused += usize::from(seen_of(&disk, 1 << 20).is_err());
            for at in &places {
                file.write_all_at(&whole[*at..=*at], *at as u64).unwrap();
            }
        }
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn other_files_are_no_filesystem() {
    let base = tempfile::tempdir().unwrap();
    for length in [0, 1_024, 2_047, 2_048, 1 << 20] {
        let path = base.path().join("disk");
        File::create(&path).unwrap().set_len(length).unwrap();
        assert!(
            matches!(Filesystem::open(File::open(&path).unwrap()), Err(ReadError::NoFilesystem)),
            "{length}"
        );
    }
    let disk = made(base.path(), 8, &["-b", "1024"]);
    let flip = |at: u64, byte: u8| {
        File::options().write(true).open(&disk).unwrap().write_all_at(&[byte], at).unwrap()
    };
    flip(1024 + 0x63, 0x80);
    assert!(matches!(Filesystem::open(File::open(&disk).unwrap()), Err(ReadError::Unsupported { .. })));
    flip(1024 + 0x63, 0);
    flip(1024 + 0x18, 9);
    assert!(matches!(Filesystem::open(File::open(&disk).unwrap()), Err(ReadError::Damaged { .. })));
}

#[test]
fn a_directory_in_itself_is_an_error() {
    let base = tempfile::tempdir().unwrap();
    let disk = made(base.path(), 8, &[]);
    for command in ["mkdir a", "mkdir a/b", "link a a/b/again"] {
        run(Command::new("/sbin/debugfs").args(["-w", "-R", command]).arg(&disk));
    }
    let error = seen(&disk).unwrap_err().to_string();
    assert!(error.contains("a second name of a directory"), "{error}");
}

#[test]
fn a_filesystem_is_read_while_it_is_wanted() {
    let base = tempfile::tempdir().unwrap();
    let disk = made(base.path(), 8, &["-b", "1024"]);
    let filesystem = Filesystem::open(File::open(disk).unwrap()).unwrap();
    let walked = filesystem.walk_while(&|| false, &mut |_| panic!("an entry was read"));
    assert!(matches!(walked, Err(ReadError::Stopped)));
}
