//! The image contains exactly what the source contains, as root and as an ordinary user.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat, utimensat,
};

use super::listing::{assert_same, facts};
use super::*;
use crate::os::mounted::{Mounted, as_user, directory_of_user, run};

/// A root filesystem with every awkward case.
pub(super) fn populate(root: &Path) {
    let at = |name: &[u8]| root.join(std::ffi::OsStr::from_bytes(name));
    let file = |name: &[u8], content: &[u8]| fs::write(at(name), content).unwrap();
    let mode = |name: &[u8], mode| fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
    for directory in ["etc", "usr/lib/systemd", "usr/sbin", "odd", "many", "links", "dev", "tmp", "group"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    file(b"usr/lib/os-release", b"ID=debian\nVERSION_ID=\"12\"\n");
    file(b"usr/lib/systemd/systemd", b"\x7fELF");
    symlink("../usr/lib/os-release", root.join("etc/os-release")).unwrap();
    symlink("../lib/systemd/systemd", root.join("usr/sbin/init")).unwrap();
    symlink("usr/sbin", root.join("sbin")).unwrap();
    symlink("usr/lib", root.join("lib")).unwrap();

    file(b"odd/setuid", b"#!");
    chown(at(b"odd/setuid"), Some(100_000), Some(70_000)).unwrap();
    mode(b"odd/setuid", 0o4755);
    file(b"odd/secret", b"none of your business");
    mode(b"odd/secret", 0o000);
    mode(b"tmp", 0o1777);
    chown(at(b"group"), Some(7), Some(4_000_000_000)).unwrap();
    mode(b"group", 0o2775);
    file(b"odd/empty", b"");
    file(b"odd/one", b"1");
    let noise: Vec<u8> = (0..5_000_123_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    file(b"odd/large", &noise);
    fs::File::create(at(b"odd/hole")).unwrap().set_len(3 << 20).unwrap();
    let sparse = fs::File::create(at(b"odd/sparse")).unwrap();
    for offset in [0, 5 << 20, (20 << 20) + 17] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", offset).unwrap();
    }
    sparse.set_len(30 << 20).unwrap();

    let longest = [b'n'; 255];
    let names: [&[u8]; 19] = [
        b" ",
        b"two words",
        b"\"quoted\"",
        b"\"",
        b"<2>",
        b"<x",
        b"-rf",
        b"#comment",
        b"$HOME `id`",
        b"back\\slash",
        b"tab\t",
        b"\xff\xfe",
        "grün".as_bytes(),
        b"a;b|c",
        b"*",
        b"two\nlines",
        b"return\r",
        b"\nquit\n",
        &longest,
    ];
    for name in names {
        file(&[b"odd/", name].concat(), name);
        chown(at(&[b"odd/", name].concat()), Some(1), Some(2)).unwrap();
        let inside = [b"links/", name].concat();
        fs::create_dir(at(&inside)).unwrap();
        symlink(std::ffi::OsStr::from_bytes(name), at(&[&inside[..], b"/", name].concat())).unwrap();
    }
    let mut deep = root.join("deep");
    for _ in 0..60 {
        deep.push("directory-in-a-directory");
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("end"), "far").unwrap();
    symlink("x".repeat(59), root.join("odd/short-link")).unwrap();
    symlink("y".repeat(60), root.join("odd/long-link")).unwrap();
    symlink("z/".repeat(2000), root.join("odd/longest-link")).unwrap();
    lchown(root.join("odd/long-link"), Some(5), Some(6)).unwrap();

    for number in 0..1500 {
        fs::write(root.join(format!("many/file-with-a-rather-long-name-{number:05}")), "").unwrap();
        fs::hard_link(at(b"odd/one"), root.join(format!("links/another-name-of-one-{number:05}"))).unwrap();
    }
    fs::hard_link(root.join("odd/long-link"), root.join("links/same-link")).unwrap();

    let node = |name: &[u8], kind, major, minor| {
        mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o640), makedev(major, minor)).unwrap();
    };
    node(b"dev/null", FileType::CharacterDevice, 1, 3);
    node(b"dev/far", FileType::CharacterDevice, 10, 300);
    node(b"dev/disk", FileType::BlockDevice, 4095, 1_048_575);
    node(b"dev/fifo", FileType::Fifo, 0, 0);
    chown(at(b"dev/disk"), Some(0), Some(6)).unwrap();

    let attribute = |name: &[u8], key: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), key, value, XattrFlags::empty()).unwrap();
    };
    attribute(b"odd/one", "user.note", b"with \"quotes\",\nlines and \0");
    attribute(b"odd/one", "user.empty", b"");
    attribute(b"odd/large", "user.long", &[b'v'; 3000]);
    attribute(b"odd", "trusted.overlay.opaque", b"y");
    attribute(b"odd/long-link", "trusted.on-a-link", b"1");
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    attribute(b"odd/<2>", "security.capability", &capability);

    let time = |name: &[u8], tv_sec, tv_nsec| {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, at(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    };
    time(b"odd/one", 1_700_000_000, 123_456_789);
    time(b"odd/empty", -86_400, 0);
    time(b"odd/large", 4_000_000_000, 5);
    time(b"odd/long-link", 1_000_000_000, 0);
    time(b"odd", 946_684_800, 0);
    time(b"etc", 946_684_801, 0);
}

/// The format that keeps everything.
const PAX: [&str; 3] = ["--format=posix", "--xattrs", "--xattrs-include=*"];

fn pack(root: &Path, tar: &Path, options: &[&str]) {
    run(Command::new("tar").args(options).arg("-cf").arg(tar).arg("-C").arg(root).arg("."));
}

/// What GNU tar extracts from an archive as root.
fn unpack(tar: &Path) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let options = ["-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f"];
    run(Command::new("tar").args(options).arg(tar).arg("-C").arg(directory.path()));
    directory
}

#[tokio::test]
async fn archives_are_kept_exactly_in_every_form() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    populate(&root);
    let pax = base.path().join("pax.tar");
    pack(&root, &base.path().join("gnu.tar"), &["--format=gnu", "--sparse"]);
    pack(&root, &pax, &PAX);
    let sparse = [&PAX[..], &["--sparse"]].concat();
    pack(&root, &base.path().join("sparse-1.tar"), &[&sparse[..], &["--sparse-version=1.0"]].concat());
    pack(&root, &base.path().join("sparse-0.tar"), &[&sparse[..], &["--sparse-version=0.1"]].concat());
    for name in ["gnu", "pax", "sparse-1", "sparse-0"] {
        let tar = base.path().join(format!("{name}.tar"));
        let built = make(Source::detect(&tar).unwrap(), &base.path().join(name)).await.unwrap();
        assert_eq!(built.distro.as_deref(), Some("debian-12"));
        assert_eq!(built.init_system, Some(InitSystem::Systemd));
        let expected = unpack(&tar);
        assert_same(&facts(Mounted::read_only(&built.path).path()), &facts(expected.path()));
        // Holes stay holes.
        assert!(built.used_bytes < 40 << 20, "{}", built.used_bytes);
    }
    let expected = facts(Mounted::read_only(&base.path().join("pax/rootfs.ext4")).path());
    assert_same(&expected, &facts(&root));
    for (packer, end) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")] {
        let packed = base.path().join(format!("pax.tar.{end}"));
        match end {
            "zst" => {
                let packed = fs::File::create(&packed).unwrap();
                zstd::stream::copy_encode(fs::File::open(&pax).unwrap(), packed, 1).unwrap();
            }
            _ => {
                let output = fs::File::create(&packed).unwrap();
                run(Command::new(packer).args(["-1", "-c"]).arg(&pax).stdout(output));
            }
        }
        let built = make(Source::detect(&packed).unwrap(), &base.path().join(end)).await.unwrap();
        assert_same(&facts(Mounted::read_only(&built.path).path()), &expected);
    }
}

#[tokio::test]
async fn a_directory_is_kept_exactly() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    populate(&root);
    // user::rw-, user:1000:r--, group::r--, mask::r--, other::r--
    let mut acl = vec![2, 0, 0, 0];
    for (tag, bits, id) in
        [(1_u16, 6_u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(bits.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let listed = root.join("odd/two words");
    rustix::fs::lsetxattr(&listed, "system.posix_acl_access", &acl, XattrFlags::empty()).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(root.join("tmp/socket")).unwrap();
    let expected = facts(&root);
    let other = Mounted::fresh("ext4", 16);
    fs::write(other.path().join("elsewhere"), "").unwrap();
    fs::create_dir(root.join("group/other")).unwrap();
    run(Command::new("mount").arg("--bind").arg(other.path()).arg(root.join("group/other")));

    let built = make(Source::detect(&root).unwrap(), &base.path().join("image")).await;
    run(Command::new("umount").arg(root.join("group/other")));
    let built = built.unwrap();
    drop(socket);
    let notes = built.notes.join("\n");
    assert!(notes.contains("/group/other is another filesystem"), "{notes}");
    let mounted = Mounted::read_only(&built.path);
    assert!(names(&mounted.path().join("group/other")).is_empty());
    let mut is = facts(mounted.path());
    is.remove(Path::new("./group/other"));
    // Making the mount point changed its time.
    let mut expected = expected;
    is.remove(Path::new("./group"));
    expected.remove(Path::new("./group"));
    assert_same(&is, &expected);
}

#[test]
fn an_ordinary_user_makes_the_same_image_of_an_archive() {
    let base = directory_of_user();
    let root = tempfile::tempdir().unwrap();
    populate(root.path());
    let tar = base.path().join("pax.tar");
    pack(root.path(), &tar, &[&PAX[..], &["--sparse"]].concat());
    let built = as_user(make(Source::Tar(tar), &base.path().join("image"))).unwrap();
    assert_same(&facts(Mounted::read_only(&built.path).path()), &facts(root.path()));
}

#[test]
fn an_ordinary_user_keeps_what_can_be_seen_of_a_directory() {
    let base = directory_of_user();
    let root = tempfile::tempdir().unwrap();
    populate(root.path());
    fs::create_dir(root.path().join("closed")).unwrap();
    fs::write(root.path().join("closed/inside"), "").unwrap();
    for (path, mode) in [("closed", 0o700), (".", 0o755)] {
        fs::set_permissions(root.path().join(path), PermissionsExt::from_mode(mode)).unwrap();
    }
    let built = as_user(make(Source::Directory(root.path().into()), &base.path().join("image"))).unwrap();
    let notes = built.notes.join("\n");
    assert!(
        notes.contains("/odd/secret may not be read") && notes.contains("/closed may not be read"),
        "{notes}"
    );
    let (mut is, mut expected) = (facts(Mounted::read_only(&built.path).path()), facts(root.path()));
    for unseen in ["./odd/secret", "./closed/inside"] {
        assert!(!is.contains_key(Path::new(unseen)));
        expected.remove(Path::new(unseen));
    }
    // Only root sees trusted attributes.
    for facts in [&mut is, &mut expected] {
        facts.retain(|path, _| {
            path != Path::new("./odd") && !path.ends_with("long-link") && !path.ends_with("same-link")
        });
    }
    assert_same(&is, &expected);
}

#[tokio::test]
async fn an_ext4_file_is_adopted_as_it_is() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    populate(&root);
    let first = make(Source::Directory(root.clone()), &base.path().join("first")).await.unwrap();
    let source = Source::detect(&first.path).unwrap();
    assert!(matches!(source, Source::Ext4(_)));
    let again = build(source, &base.path().join("second"), &meta(InitMode::System), &Progress::default())
        .await
        .unwrap();
    assert_eq!((again.distro.as_deref(), again.init_system), (Some("debian-12"), Some(InitSystem::Systemd)));
    assert_eq!((again.init, again.size), (InitMode::System, first.size));
    let mounted = Mounted::read_only(&again.path);
    assert_same(&facts(mounted.path()), &facts(&root));
    let text = fs::read_to_string(mounted.path().join("etc/nexus/image.yaml")).unwrap();
    let said: ImageMetadata = serde_yaml_ng::from_str(&text).unwrap();
    assert_eq!(said, ImageMetadata { distro: Some("debian-12".into()), ..meta(InitMode::System) });
    let bytes = fs::read(&again.path).unwrap();
    let hash = <sha2::Sha256 as sha2::Digest>::digest(&bytes);
    assert_eq!(again.sha256, data_encoding::HEXLOWER.encode(&hash));
}

#[tokio::test]
async fn busybox_is_a_whole_root_filesystem() {
    let base = tempfile::tempdir().unwrap();
    let binary = base.path().join("busybox");
    fs::write(&binary, b"\x7fELF\0\0BusyBox v1.36.1 (Debian)\0\0[\0[[\0ash\0init\0ls\0sh\0\0").unwrap();
    let built = make(Source::Busybox { binary }, &base.path().join("image")).await.unwrap();
    assert_eq!(built.distro.as_deref(), Some("busybox-1.36.1"));
    assert_eq!(built.init_system, Some(InitSystem::BusyBox));
    assert!(built.used_bytes < 4 << 20, "{}", built.used_bytes);
    let mounted = Mounted::read_only(&built.path);
    let at = |path: &str| mounted.path().join(path);
    assert_eq!(fs::read_link(at("bin/sh")).unwrap(), Path::new("busybox"));
    assert_eq!(fs::metadata(at("bin/busybox")).unwrap().permissions().mode(), 0o100_755);
    assert_eq!(fs::metadata(at("tmp")).unwrap().permissions().mode(), 0o041_777);
    for path in [
        "etc/passwd",
        "etc/group",
        "etc/hosts",
        "etc/resolv.conf",
        "etc/profile",
        "etc/hostname",
        "proc",
        "sys",
        "dev",
    ] {
        assert!(at(path).exists(), "{path}");
    }
    assert_eq!(
        fs::read_to_string(at("etc/nexus/image.yaml")).unwrap(),
        "name: trial\nbuild_id: b1\ndistro: busybox-1.36.1\ninit: agent\n"
    );
}

#[tokio::test]
async fn the_same_source_makes_the_same_bytes() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    populate(&root);
    let tar = base.path().join("pax.tar");
    pack(&root, &tar, &PAX);
    for source in [Source::Directory(root), Source::Tar(tar)] {
        let one = make(source.clone(), &base.path().join("one")).await.unwrap();
        // In the next second.
        let start = std::time::SystemTime::now();
        while start.elapsed().unwrap() < std::time::Duration::from_millis(1_100) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let two = make(source, &base.path().join("two")).await.unwrap();
        assert_eq!(one.sha256, two.sha256);
        for built in ["one", "two"] {
            fs::remove_dir_all(base.path().join(built)).unwrap();
        }
    }
}

#[tokio::test]
async fn attributes_that_linux_would_not_keep_are_left_out_and_noted() {
    let base = tempfile::tempdir().unwrap();
    let foreign: [(&str, &[u8]); 2] =
        [("SCHILY.xattr.com.apple.provenance", b"1"), ("SCHILY.xattr.user.kept", b"2")];
    let archive = super::tar::Tar::default()
        .pax(&foreign)
        .file("file", "x")
        .pax(&[("SCHILY.xattr.user.note", b"3")])
        .link(b'2', "link", "file")
        .end();
    let tar = base.path().join("a.tar");
    fs::write(&tar, archive).unwrap();
    let built = make(Source::Tar(tar), &base.path().join("image")).await.unwrap();
    assert_eq!(built.notes, ["2 extended attributes that Linux does not keep on ext4 were left out"]);
    let mounted = Mounted::read_only(&built.path);
    let mut value = [0; 9];
    let length = rustix::fs::lgetxattr(mounted.path().join("file"), "user.kept", &mut value).unwrap();
    assert_eq!(&value[..length], b"2");
}

#[tokio::test]
async fn a_directory_with_very_many_names_takes_no_longer_than_many_directories() {
    let base = tempfile::tempdir().unwrap();
    let mut took = Vec::new();
    for directories in [1_000, 1] {
        let mut tar = super::tar::Tar::default();
        for number in 0..100_000 {
            tar = tar.file(&format!("{}/file-{number}", number % directories), "");
        }
        let path = base.path().join("many.tar");
        fs::write(&path, tar.end()).unwrap();
        let start = std::time::Instant::now();
        let built = make(Source::Tar(path), &base.path().join(directories.to_string())).await.unwrap();
        took.push(start.elapsed());
        let mounted = Mounted::read_only(&built.path);
        assert_eq!(names(&mounted.path().join("0")).len(), 100_000 / directories);
    }
    // Quadratic time would take a hundred times as long.
    assert!(took[1] < took[0] * 3, "{took:?}");
}
