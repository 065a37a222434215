//! Malicious and broken archives.

use std::fs;
use std::io::Write;
use std::path::Path;

use super::tar::Tar;
use super::*;
use crate::os::mounted::Mounted;

/// Tight limits, so that exceeding them is quick.
fn tight() -> Limits {
    Limits { entries: 2_000, bytes: 8 << 20, header_bytes: 64 << 10, words: 1 << 20, ..Limits::default() }
}

async fn take(base: &Path, archive: &[u8]) -> Result<Built, ImageError> {
    let tar = base.join("a.tar");
    fs::write(&tar, archive).unwrap();
    let _gone = fs::remove_dir_all(base.join("image"));
    build_within(Source::Tar(tar), &base.join("image"), &meta(InitMode::Agent), tight(), &Progress::default())
        .await
}

/// A sparse file in the pax form whose map is in a record.
fn sparse(real: &str, map: &str, data: &str) -> Vec<u8> {
    let records = [("GNU.sparse.size", real.as_bytes()), ("GNU.sparse.map", map.as_bytes())];
    Tar::default().pax(&records).file("a", data).end()
}

/// A sparse file in the pax form whose map is before its data.
fn sparse_head(real: &str, content: &str) -> Vec<u8> {
    let records: [(&str, &[u8]); 3] =
        [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", real.as_bytes())];
    Tar::default().pax(&records).file("a", content).end()
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_leaves_nothing() {
    let truncated = Tar::default().file("a", &"x".repeat(5000)).end()[..2000].to_vec();
    let mut wrong_sum = Tar::default().file("a", "b").end();
    wrong_sum[0] = b'z';
    let mut too_many = Tar::default();
    for number in 0..2_001 {
        too_many = too_many.file(&format!("f{number}"), "");
    }
    let mut long_header = Tar::default();
    long_header.header(b'L', b"long", b"", 1 << 40);
    let mut huge = Tar::default();
    huge.header(b'0', b"huge", b"", 1 << 30);
    let mut hollow = Tar::default();
    hollow.header(b'5', b"directory", b"", 7 << 30);
    let deep = "d/".repeat(600);
    let long_path = "p/".repeat(3000);
    let long_name = "n".repeat(256);
    let wide: Vec<u8> = vec![b'v'; 5000];
    // Each of their headers is small.
    let (mut of_entry, mut of_all) = (Tar::default(), Tar::default());
    for number in 0..14 {
        let key = format!("key.{number}");
        of_entry = of_entry.pax(&[(key.as_str(), wide.as_slice())]);
        let mut record = Vec::new();
        nexus_tree::pax::record(&mut record, &key, &wide);
        of_all = of_all.entry(b'g', b"pax", b"", &record).file(&format!("f{number}"), "");
    }
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", Vec::new(), "the source is empty"),
        (
            "a file for a mount point",
            Tar::default().file("run", "").end(),
            "entry `/run` is refused: it has to be a directory",
        ),
        (
            "a link to a file for a mount point",
            Tar::default().file("etc/x", "").link(b'2', "tmp", "/etc/x").end(),
            "entry `/tmp` is refused: it has to be a directory",
        ),
        ("only zeros", vec![0; 10_240], "the source is empty"),
        ("text", b"hello, world\n".repeat(100), "a header's checksum is wrong"),
        ("cut in a header", Tar::default().file("a", "b").end()[..300].to_vec(), "it ends within a header"),
        ("cut in a file", truncated, "it ends within an entry"),
        ("wrong checksum", wrong_sum, "a header's checksum is wrong"),
        ("parent", Tar::default().file("../evil", "x").end(), "`..` leaves the tree"),
        ("parent inside", Tar::default().file("a/../../evil", "x").end(), "`..` leaves the tree"),
        (
            "parent by pax",
            Tar::default().pax(&[("path", b"x/../../evil")]).file("a", "").end(),
            "`..` leaves",
        ),
        (
            "hard link outside",
            Tar::default().link(b'1', "a", "/etc/shadow").end(),
            "hard link to something that is not there",
        ),
        ("hard link up", Tar::default().link(b'1', "a", "../../etc/shadow").end(), "`..` leaves the tree"),
        (
            "hard link to a directory",
            Tar::default().link(b'5', "d", "").link(b'1', "a", "d").end(),
            "hard link to a directory",
        ),
        (
            "through a dangling link",
            Tar::default().link(b'2', "d", "/nowhere").file("d/evil", "x").end(),
            "leads to no directory",
        ),
        (
            "through a loop",
            Tar::default().link(b'2', "a", "b").link(b'2', "b", "a").file("a/evil", "x").end(),
            "leads to no directory",
        ),
        ("through a file", Tar::default().file("a", "").file("a/b", "").end(), "not a directory"),
        (
            "through a link to a file",
            Tar::default().file("a", "").link(b'2', "l", "a").file("l/b", "").end(),
            "no directory",
        ),
        ("zero", Tar::default().pax(&[("path", b"a\0b")]).file("a", "").end(), "zero byte"),
        (
            "zero in a target",
            Tar::default().pax(&[("linkpath", b"b\0c")]).link(b'2', "a", "b").end(),
            "zero byte",
        ),
        (
            "zero in an attribute",
            Tar::default().pax(&[("SCHILY.xattr.user.a\0b", b"1")]).file("a", "").end(),
            "zero byte",
        ),
        (
            "an access control list of nonsense",
            Tar::default()
                .pax(&[("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0\xff\xff")])
                .file("a", "")
                .end(),
            "`a` is refused: its access control list is invalid",
        ),
        ("lost+found", Tar::default().file("lost+found", "x").end(), "not a directory"),
        (
            "large attributes",
            Tar::default().pax(&[("SCHILY.xattr.user.a", &wide)]).file("a", "").end(),
            "do not fit",
        ),
        ("empty target", Tar::default().link(b'2', "a", "").end(), "empty or too long"),
        (
            "long name",
            Tar::default().pax(&[("path", long_name.as_bytes())]).file("a", "").end(),
            "longer than 255",
        ),
        ("long path", Tar::default().pax(&[("path", long_path.as_bytes())]).file("a", "").end(), "too long"),
        ("deep", Tar::default().pax(&[("path", deep.as_bytes())]).file("a", "").end(), "too deep"),
        ("root is a file", Tar::default().file("./", "x").file("/", "").end(), "the source is empty"),
        ("root is a link", Tar::default().link(b'2', "/", "/etc").end(), "the root is a directory"),
        ("unknown", Tar::default().entry(b'M', b"a", b"", b"").end(), "type is unknown"),
        (
            "sparse without a size",
            Tar::default().pax(&[("GNU.sparse.major", b"1")]).file("a", "").end(),
            "map is invalid",
        ),
        (
            "sparse of another form",
            Tar::default()
                .pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.realsize", b"1")])
                .file("a", "")
                .end(),
            "unknown form",
        ),
        (
            "sparse of the oldest form",
            Tar::default().pax(&[("GNU.sparse.size", b"1")]).file("a", "").end(),
            "oldest pax form",
        ),
        ("sparse without data", sparse("9", "0,9", ""), "map is invalid"),
        ("sparse past its end", sparse("2", "0,3", "abc"), "map is invalid"),
        ("sparse backwards", sparse("9", "4,1,0,1", "ab"), "map is invalid"),
        ("sparse odd", sparse("9", "0,1,2", "a"), "map is invalid"),
        ("sparse overflow", sparse("18446744073709551615", "18446744073709551615,1", "a"), "map is invalid"),
        ("sparse and huge", sparse("18446744073709551615", "0,1", "a"), "more than 8388608 bytes of content"),
        ("sparse map without end", sparse_head("9", &"1".repeat(1024)), "map is invalid"),
        ("sparse map of words", sparse_head("9", "x\n"), "map is invalid"),
        ("sparse map that is long", sparse_head("9", &"5\n".repeat(40_000)), "map is invalid"),
        (
            "sparse map of too many",
            sparse_head("9", &format!("99999999\n{}", "0\n".repeat(40_000))),
            "bytes in a header",
        ),
        (
            "pax nonsense",
            Tar::default().entry(b'x', b"p", b"", b"99 a=b\n").file("a", "").end(),
            "pax header is invalid",
        ),
        ("pax number", Tar::default().pax(&[("uid", b"-1")]).file("a", "").end(), "no number"),
        ("pax owner", Tar::default().pax(&[("uid", b"4294967296")]).file("a", "").end(), "out of range"),
        (
            "pax size",
            Tar::default().pax(&[("size", b"18446744073709551615")]).file("a", "").end(),
            "more than 8388608 bytes of content",
        ),
        ("many entries", too_many.end(), "more than 2000 entries"),
        ("long header", long_header.end(), "more than 65536 bytes in a header"),
        ("headers of one entry", of_entry.file("a", "").end(), "more than 65536 bytes in a header"),
        ("headers for all entries", of_all.end(), "more than 65536 bytes in a header"),
        ("huge file", huge.end(), "more than 8388608 bytes of content"),
        ("hollow directory", hollow.end(), "more than 8388608 bytes of content"),
    ];
    let base = tempfile::tempdir().unwrap();
    for (name, archive, expected) in cases {
        let error = take(base.path(), &archive).await.expect_err(name);
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert_eq!(names(base.path()), ["a.tar"], "{name}");
    }
}

#[tokio::test]
async fn what_is_odd_stays_inside() {
    let base = tempfile::tempdir().unwrap();
    let outside = base.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let outside = outside.to_str().unwrap();
    let archive = Tar::default()
        .file("/absolute", "a")
        .link(b'2', "escape", outside)
        .link(b'2', "up", "../../../../..")
        .file("up/through-up", "u")
        .file("twice", "first")
        .file("twice", "second")
        .link(b'5', "was-directory/inner", "")
        .file("was-directory", "now a file")
        .file("was-file", "x")
        .link(b'5', "was-file", "")
        .file("was-file/inside", "y")
        .file("one", "kept")
        .link(b'1', "other", "one")
        .file("one", "replaced")
        .link(b'6', "fifo", "")
        .link(b'5', "real", "")
        .link(b'2', "alias", "/real/")
        .file("alias/by-alias", "z")
        .link(b'2', "was-alias", outside)
        .link(b'5', "was-alias", "")
        .file("was-alias/inside", "w")
        .link(b'2', "file-alias", outside)
        .file("file-alias", "v")
        .entry(b'5', b"old-directory/", b"", b"")
        .entry(0, b"older-directory/", b"", b"")
        .entry(b'V', b"volume", b"", b"")
        .end();
    let built = take(base.path(), &archive).await.unwrap();
    let mounted = Mounted::read_only(&built.path);
    let text = |path: &str| fs::read_to_string(mounted.path().join(path)).unwrap();
    for (path, content) in [
        ("absolute", "a"),
        ("through-up", "u"),
        ("twice", "second"),
        ("was-directory", "now a file"),
        ("was-file/inside", "y"),
        ("one", "replaced"),
        ("other", "kept"),
        ("real/by-alias", "z"),
        ("was-alias/inside", "w"),
        ("file-alias", "v"),
    ] {
        assert_eq!(text(path), content, "{path}");
    }
    assert!(mounted.path().join("old-directory").is_dir() && mounted.path().join("older-directory").is_dir());
    assert!(names(&base.path().join("outside")).is_empty());
    assert!(!mounted.path().join("volume").exists());

    // Writing through a link to the outside ends at the same path inside, or nowhere.
    let archive = Tar::default().link(b'2', "escape", outside).file("escape/evil", "x").end();
    take(base.path(), &archive).await.unwrap_err();
    assert!(names(&base.path().join("outside")).is_empty());
}

#[tokio::test]
async fn bombs_are_stopped_by_the_caps() {
    let base = tempfile::tempdir().unwrap();
    // A gibibyte of zeros in a few kilobytes; and an archive that seems endless.
    for (name, first) in [("file", Some(1_u64 << 30)), ("padding", None)] {
        let mut tar = Tar::default();
        match first {
            Some(size) => tar.header(b'0', b"zeros", b"", size),
            None => tar = tar.file("a", "b"),
        }
        let bomb = base.path().join("bomb.tar.zst");
        let mut encoder = zstd::stream::Encoder::new(fs::File::create(&bomb).unwrap(), 1).unwrap();
        encoder.write_all(&tar.0).unwrap();
        for _ in 0..1024 {
            encoder.write_all(&vec![0; 1 << 20]).unwrap();
        }
        encoder.finish().unwrap();
        let source = Source::detect(&bomb).unwrap();
        let (target, meta, progress) =
            (base.path().join("image"), meta(InitMode::Agent), Progress::default());
        let error = build_within(source, &target, &meta, tight(), &progress).await.unwrap_err();
        assert!(matches!(error, ImageError::TooLarge { .. } | ImageError::Damaged { .. }), "{name}: {error}");
        assert_eq!(names(base.path()), ["bomb.tar.zst"], "{name}");
    }
}

/// A tenth of the usual limit, and ten times as many entries: reading a million of them takes long in a build for development.
#[tokio::test]
async fn ten_times_the_most_entries_are_too_many() {
    assert_eq!(Limits::default().entries, 1_000_000);
    let limits = Limits { entries: 100_000, ..Limits::default() };
    let base = tempfile::tempdir().unwrap();
    let mut tar = Tar::default();
    for number in 0..10_000 {
        tar.header(b'0', format!("f{number}").as_bytes(), b"", 0);
    }
    // The same frame repeated: entries count even under the same names.
    let frame = zstd::stream::encode_all(tar.0.as_slice(), 1).unwrap();
    let bomb = base.path().join("bomb.tar.zst");
    fs::write(&bomb, frame.repeat(100)).unwrap();
    let (source, target) = (Source::detect(&bomb).unwrap(), base.path().join("image"));
    let (meta, progress) = (meta(InitMode::Agent), Progress::default());
    let error = build_within(source, &target, &meta, limits, &progress).await.unwrap_err();
    assert_eq!(error.code(), nexus_schema::ErrorCode::TooLarge, "{error}");
    assert!(error.to_string().contains("more than 100000 entries"), "{error}");
    assert_eq!(names(base.path()), ["bomb.tar.zst"]);
}

#[tokio::test]
async fn a_damaged_compressed_archive_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let content: String = (0..200_000).map(|n| char::from(b'a' + (n * 7 % 26) as u8)).collect();
    let tar = Tar::default().file("a", &content).file("b", &content).end();
    let path = base.path().join("a.tar.gz");
    let mut encoder =
        flate2::write::GzEncoder::new(fs::File::create(&path).unwrap(), flate2::Compression::fast());
    encoder.write_all(&tar).unwrap();
    encoder.finish().unwrap();
    let whole = fs::read(&path).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        bytes
    };
    // Truncated, changed in the middle, and with a wrong checksum at the end.
    for bytes in [whole[..whole.len() / 2].to_vec(), flipped(whole.len() / 2), flipped(whole.len() - 7)] {
        fs::write(&path, bytes).unwrap();
        let error = make(Source::Tar(path.clone()), &base.path().join("image")).await.unwrap_err();
        assert!(matches!(error, ImageError::Unpack { .. } | ImageError::Damaged { .. }), "{error}");
        assert_eq!(names(base.path()), ["a.tar.gz"]);
    }
}
