//! Filesystems that pass `e2fsck`, and whose content Linux sees as it was written. Tests that mount run as root.

mod boundaries;
mod growing;
mod random;
mod trial;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use super::*;
use trial::{Trial, attributes, check, drive, noise};

/// An access control list in the form of archives.
fn acl(permissions: u16) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    let entries = [(1_u16, 6_u16, u32::MAX), (2, permissions, 1000), (4, 4, u32::MAX), (16, 7, u32::MAX)];
    for (tag, permissions, id) in entries.into_iter().chain([(32, 0, u32::MAX)]) {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn with_xattrs(mode: u16, all: &[(&str, &[u8])]) -> Attributes {
    let all = all.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()));
    Attributes { xattrs: all.collect::<BTreeMap<_, _>>().into(), ..Attributes::root(mode, 1_700_000_000) }
}

#[test]
fn linux_finds_what_was_put_there_when_it_is_mounted() {
    let mut trial = Trial::new(Size::AtLeast(0));
    for byte in 1..=255_u8 {
        if byte != b'/' && byte != b'.' {
            trial.file(&[&b"names/"[..], &[byte]].concat(), &[byte]);
        }
    }
    trial.file(b"names/two\r\nlines \xff\xfe", b"");
    trial.file(&[b"names/", &[b'n'; 255][..]].concat(), b"long");
    trial.file(b"lost", &noise(1, 1));
    trial.file(b"whole-block", &noise(2, BLOCK));
    trial.file(b"large", &noise(3, 5_000_123));
    trial.file(b"hole", &vec![0; 3 << 20]);
    let mut sparse = vec![0; 30 << 20];
    for offset in [0, 5 << 20, (20 << 20) + 17] {
        sparse[offset..offset + 4].copy_from_slice(b"data");
    }
    trial.file(b"sparse", &sparse);
    for (number, mode) in [0o4755, 0o2711, 0o1777, 0o000].into_iter().enumerate() {
        let owners = Attributes { uid: 70_000 * number as u32, gid: u32::MAX - 2, ..attributes(mode) };
        let name = format!("owned-{number}");
        let content = trial.content(b"x");
        trial.put(name.as_bytes(), owners, Body::File(content));
    }
    let times = [(-(1 << 31), 1), (-1, 999_999_999), (0, 0), (1 << 31, 5), ((1 << 31) - 1 + (3 << 32), 7)];
    for (number, (mtime, mtime_ns)) in times.into_iter().enumerate() {
        let at = Attributes { mtime, mtime_ns, ..attributes(0o644) };
        trial.put(format!("time-{number}").as_bytes(), at, Body::Fifo);
    }
    for length in [1, 59, 60, 61, 4095] {
        let target = vec![b't'; length].into();
        trial.put(format!("links/{length}").as_bytes(), attributes(0o777), Body::Symlink(target));
    }
    for (number, (major, minor)) in
        [(1, 3), (255, 255), (256, 0), (10, 300), (4095, 0xf_ffff)].into_iter().enumerate()
    {
        for block in [false, true] {
            let path = format!("devices/{number}-{block}");
            trial.put(path.as_bytes(), attributes(0o640), Body::Device { block, major, minor });
        }
    }
    trial.put(b"devices/socket", attributes(0o755), Body::Socket);
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let file = Body::File(trial.content(b"x"));
    let all = [("security.capability", capability), ("user.note", b"\"quoted\"\n\0"), ("user.empty", b"")];
    trial.put(b"xattrs/some", with_xattrs(0o755, &all), file);
    let long = vec![b'v'; 4_020];
    let file = Body::File(trial.content(b"x"));
    trial.put(b"xattrs/long", with_xattrs(0o644, &[("user.long", &long), ("user.b", &[1; 40])]), file);
    let names: Vec<String> = (0..90).map(|n| format!("user.{}{n}", "x".repeat(n % 7))).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"value"[..])).collect();
    trial.put(b"xattrs/many", with_xattrs(0o644, &many), Body::File(Content::default()));
    let lists = [("system.posix_acl_access", acl(4)), ("system.posix_acl_default", acl(7))];
    let lists = [(lists[0].0, &lists[0].1[..]), (lists[1].0, &lists[1].1[..])];
    trial.put(b"xattrs/directory", with_xattrs(0o770, &lists), Body::directory());
    trial.put(b"xattrs/link", with_xattrs(0o777, &[("trusted.x", b"1")]), Body::Symlink((*b"some").into()));
    let device = Body::Device { block: false, major: 1, minor: 5 };
    trial.put(b"xattrs/device", with_xattrs(0o600, &[("trusted.x", &[9; 300])]), device);
    let one = trial.file(b"linked/one", b"one");
    for number in 0..1_500 {
        trial.link(format!("linked/another-name-{number}").as_bytes(), one);
    }
    let link = trial.put(b"linked/link", attributes(0o777), Body::Symlink(vec![b'l'; 100].into()));
    trial.link(b"linked/same-link", link);
    trial.directory(&b"deep/".repeat(100));
    trial.finish(&drive("everything")).assert_mounted();
}

#[test]
fn a_filesystem_with_its_own_lost_and_found_keeps_it_when_mounted() {
    let mut trial = Trial::new(Size::AtLeast(0));
    trial.put(b"lost+found", Attributes { uid: 7, ..attributes(0o711) }, Body::directory());
    trial.file(b"lost+found/#12", b"found");
    trial.finish(&drive("")).assert_mounted();

    let mut trial = Trial::new(Size::AtLeast(0));
    trial.file(b"lost+found", b"no directory");
    assert!(matches!(trial.try_finish(&drive("")), Err(Ext4Error::LostAndFound)));
}

#[test]
fn a_read_only_filesystem_is_small_when_mounted() {
    let mut trial = Trial::new(Size::AtLeast(0));
    for number in 0..100 {
        trial.file(format!("kernel/{number}").as_bytes(), &noise(number, 9_000));
    }
    let options = Options { purpose: Purpose::ReadOnly, ..drive("modules") };
    let image = trial.finish(&options);
    assert!(image.made.size < 3 << 20, "{}", image.made.size);
    image.assert_mounted();
}

#[test]
fn the_same_content_makes_the_same_bytes_and_another_one_does_not() {
    let build = |last: &[u8], options: Options<'_>| {
        let mut trial = Trial::new(Size::AtLeast(0));
        for number in 0..300 {
            trial.file(format!("a/file-{number}").as_bytes(), &noise(number, 5_000));
        }
        trial.file(b"last", last);
        let image = trial.finish(&options);
        (image.made, fs::read(image.path()).unwrap())
    };
    let (one, two, other) = (build(b"x", drive("a")), build(b"x", drive("a")), build(b"y", drive("a")));
    assert_eq!(one.0, two.0);
    assert!(one.1 == two.1, "two builds differ");
    assert_ne!(one.0.uuid, other.0.uuid);
    assert_ne!(one.0.uuid, build(b"x", drive("b")).0.uuid);
    let given = build(b"x", Options { identity: Some([0xff; 32]), ..drive("a") }).0.uuid;
    assert_eq!(given[..9], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x8f, 0xff, 0xbf]);
}

#[test]
fn what_no_name_leads_to_is_not_in_the_file() {
    let secret = noise(99, 3 << 20);
    let mut trial = Trial::new(Size::AtLeast(0));
    trial.file(b"first", &noise(1, 10_000));
    trial.file(b"replaced", &secret);
    trial.file(b"second", &noise(2, 10_000));
    trial.file(b"replaced", b"harmless");
    trial.file(b"hidden/in/a/directory", &secret[..5_000]);
    trial.remove(b"hidden");
    let image = trial.finish(&drive(""));
    let bytes = fs::read(image.path()).unwrap();
    let part = &secret[..64];
    assert!(!memchr::memmem::find_iter(&bytes, part).any(|_| true), "a replaced content is in the file");
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(image.path()).unwrap()) * 512;
    assert!(allocated < 2 << 20, "{allocated}");
    let listed = image.debugfs("ls -p /");
    assert!(listed.contains("/replaced/8/") && !listed.contains("hidden"), "{listed}");
}

#[test]
fn a_content_can_be_read_again_while_more_is_written() {
    use std::io::{Read, Seek, SeekFrom};
    let mut trial = Trial::new(Size::AtLeast(0));
    let mut bytes = vec![0; 700_000];
    for (at, part) in bytes.chunks_mut(10_000).enumerate().filter(|(at, _)| at % 3 != 1) {
        part.copy_from_slice(&noise(at as u64, 10_000)[..part.len()]);
    }
    let content = trial.content(&bytes);
    let mut reader = trial.writer.reader(content).unwrap();
    trial.content(&noise(1, 2 << 20));
    let mut read = Vec::new();
    reader.read_to_end(&mut read).unwrap();
    assert!(read == bytes);
    for at in [0, 9_999, 10_000, 12_288, 690_001, 699_999] {
        reader.seek(SeekFrom::Start(at)).unwrap();
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], bytes[at as usize], "{at}");
    }
    reader.seek(SeekFrom::End(5)).unwrap();
    assert_eq!(reader.read(&mut [0; 9]).unwrap(), 0);
}

#[test]
fn a_cancelled_work_ends_and_so_does_one_that_leaves_too_little_room() {
    let directory = tempfile::tempdir().unwrap();
    let token = tokio_util::sync::CancellationToken::new();
    let progress = Progress::new(token.clone());
    let create = |name: &str, keep_free| {
        Writer::create(&directory.path().join(name), Size::AtLeast(0), keep_free, &progress).unwrap()
    };
    let mut full = create("full", 1 << 60);
    let error = full.take(&noise(1, 20 << 20)[..], 20 << 20).unwrap_err();
    assert!(matches!(error, Ext4Error::DiskFull { needed, .. } if needed.as_bytes() == 1 << 60), "{error}");

    // In a content of only zeros, and before any metadata is written.
    let (mut zeros, ending) = (create("zeros", 0), create("ending", 0));
    token.cancel();
    let error = zeros.take(std::io::repeat(0), 20 << 20).unwrap_err();
    assert!(matches!(error, Ext4Error::Cancelled), "{error}");
    let error = ending.finish(&[Node::implied_directory()], &drive("")).unwrap_err();
    assert!(matches!(error, Ext4Error::Cancelled), "{error}");
}

#[test]
fn what_cannot_be_is_refused() {
    let mut trial = Trial::new(Size::AtLeast(0));
    let end = trial.writer.take(&b"short"[..], 6).unwrap_err();
    assert!(matches!(end, Ext4Error::Short), "{end}");
    let failing = std::io::Read::chain(&b"x"[..], Failing);
    assert!(matches!(trial.writer.take(failing, 6).unwrap_err(), Ext4Error::Source(_)));
    assert!(matches!(trial.writer.take(std::io::empty(), 1 << 45), Err(Ext4Error::TooLarge { .. })));
    let label = trial.try_finish(&drive("seventeen letters"));
    assert!(matches!(label, Err(Ext4Error::Label { .. })));
    let small = Trial::new(Size::Exactly(5 << 20)).try_finish(&drive("")).unwrap_err();
    assert!(matches!(small, Ext4Error::TooSmall { needed, .. } if needed.as_bytes() > 5 << 20), "{small}");
    let (directory, progress) = (tempfile::tempdir().unwrap(), Progress::default());
    let path = directory.path().join("x");
    assert!(matches!(
        Writer::create(&path, Size::AtLeast(65 << 40), 0, &progress),
        Err(Ext4Error::TooLarge { .. })
    ));
    assert!(!path.exists());
    let nowhere = directory.path().join("missing/x");
    assert!(matches!(Writer::create(&nowhere, Size::AtLeast(0), 0, &progress), Err(Ext4Error::Io { .. })));
}

struct Failing;

impl std::io::Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn names_have_the_hashes_that_debugfs_says() {
    let seed = [0x1234_5678, 0x9abc_def0, 0x0fed_cba9, 0x8765_4321];
    // The bytes of a UUID are in text order.
    let uuid = "78563412-f0de-bc9a-a9cb-ed0f21436587";
    let long = "l".repeat(255);
    for name in [
        "a",
        "abc",
        "abcd",
        "lost+found",
        "grün",
        "ÿÿÿÿ",
        &"x".repeat(31),
        &"y".repeat(32),
        &"z".repeat(33),
        &long,
    ] {
        let asked = Command::new("/sbin/debugfs")
            .args(["-R", &format!("dx_hash -h half_md4 -s {uuid} {name}")])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&asked.stdout).into_owned();
        let (hash, minor) = hash::hash(&seed, name.as_bytes());
        let expected = format!("is 0x{hash:x} (minor 0x{minor:x})");
        assert!(said.contains(&expected), "{said} is not {expected}");
    }
}

#[test]
fn a_disk_of_any_size_is_formatted() {
    let directory = tempfile::tempdir().unwrap();
    let (mib, gib, tib) = (1_u64 << 20, 1_u64 << 30, 1_u64 << 40);
    for size in [
        8 * mib,
        40 * mib,
        63 * mib + 4096,
        64 * mib,
        128 * mib + 4096,
        gib,
        100 * gib,
        tib - 4096,
        tib,
        tib + 4096,
        2 * tib,
    ] {
        let path = directory.path().join("disk");
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        let writer = Writer::format(&path, &Progress::default()).unwrap();
        let made = writer.finish(&[Node::implied_directory()], &drive("data")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), size);
        assert!(made.size <= size && size - made.size < GROUP * BLOCK as u64, "{made:?} of {size}");
        check(&path);
        let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
        assert!(allocated < (4 * mib).max(size / 1000), "{allocated} of {size}");
    }
}
