//! Files added to a tree and to an existing filesystem: the result is the same.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use nexus_schema::{ByteSize, ErrorCode};

use super::*;
use crate::os::mounted::Mounted;

fn overlay(content: &[u8], mode: u16) -> Overlay {
    Overlay { content: content.to_vec(), mode }
}

fn source(root: &Path) {
    for directory in ["etc/init.d", "usr/bin", "usr/sbin", "odd"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    symlink("usr/bin", root.join("bin")).unwrap();
    symlink("/usr/sbin", root.join("sbin")).unwrap();
    fs::write(root.join("usr/bin/busybox"), b"\x7fELF").unwrap();
    fs::write(root.join("usr/sbin/openrc"), b"\x7fELF").unwrap();
    symlink("/bin/busybox", root.join("usr/sbin/init")).unwrap();
    fs::write(root.join("etc/inittab"), "tty1::respawn:/sbin/getty 38400 tty1\n").unwrap();
    fs::write(root.join("etc/securetty"), "tty1\n").unwrap();
    fs::write(root.join("etc/motd"), "before").unwrap();
    symlink("/etc/motd", root.join("etc/link")).unwrap();
    for file in ["etc/motd", "etc/inittab"] {
        fs::set_permissions(root.join(file), PermissionsExt::from_mode(0o600)).unwrap();
    }
}

fn additions() -> Additions {
    let overlays = [
        ("/etc/motd", overlay(b"after\n", 0o640)),
        ("/etc/link", overlay(b"no link any more", 0o644)),
        ("/bin/tool", overlay(b"#!/bin/sh\n", 0o4755)),
        ("/sbin/deep/er/tool", overlay(b"x", 0o755)),
        ("/sbin/deep/er/second", overlay(b"y", 0o755)),
        ("/odd/with \"quotes\" and blanks/f ile", overlay(b"\0\xff", 0o600)),
        ("/empty", overlay(b"", 0o444)),
        ("/large", overlay(&vec![7; 700_000], 0o644)),
    ];
    Additions {
        overlays: overlays.into_iter().map(|(path, overlay)| (path.to_owned(), overlay)).collect(),
        for_init: true,
        size: Some(ByteSize::mib(96)),
    }
}

async fn lay(source: Source, into: &Path, additions: &Additions) -> Result<Built, ImageError> {
    let (limits, progress) = (Limits::default(), Progress::default());
    build_with(source, into, &meta(InitMode::System), additions, limits, &progress).await
}

fn assert_laid(root: &Path) {
    let is = |path: &str, content: &[u8], mode: u32| {
        let meta = fs::symlink_metadata(root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(meta.is_file(), "{path}");
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (mode, 0, 0), "{path}");
        assert_eq!(fs::read(root.join(path)).unwrap(), content, "{path}");
    };
    is("etc/motd", b"after\n", 0o640);
    is("etc/link", b"no link any more", 0o644);
    is("usr/bin/tool", b"#!/bin/sh\n", 0o4755);
    is("usr/sbin/deep/er/tool", b"x", 0o755);
    is("usr/sbin/deep/er/second", b"y", 0o755);
    is("odd/with \"quotes\" and blanks/f ile", b"\0\xff", 0o600);
    is("empty", b"", 0o444);
    is("large", &vec![7; 700_000], 0o644);
    assert!(fs::symlink_metadata(root.join("bin")).unwrap().is_symlink(), "links on the way stay");
    // What OpenRC needs in a VM.
    let inittab = fs::read_to_string(root.join("etc/inittab")).unwrap();
    assert!(inittab.contains("ttyS0::respawn") && !inittab.contains("tty1"), "{inittab}");
    assert!(fs::read_to_string(root.join("etc/fstab")).unwrap().contains("/dev/vda"));
    assert_eq!(fs::read_to_string(root.join("etc/securetty")).unwrap(), "tty1\n", "kept");
}

#[tokio::test]
async fn overlays_on_a_tree_and_on_a_filesystem_are_the_same_when_mounted() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    source(&root);
    let from_tree =
        lay(Source::Directory(root.clone()), &base.path().join("tree"), &additions()).await.unwrap();
    assert_eq!(from_tree.init_system, Some(InitSystem::OpenRc));
    let plain = make(Source::Directory(root), &base.path().join("plain")).await.unwrap();
    assert!(plain.size < ByteSize::mib(96));
    let from_file =
        lay(Source::Ext4(plain.path.clone()), &base.path().join("file"), &additions()).await.unwrap();
    for built in [&from_tree, &from_file] {
        assert_eq!(built.size, ByteSize::mib(96));
        assert_laid(Mounted::read_only(&built.path).path());
    }
    // The source is unchanged.
    let mounted = Mounted::read_only(&plain.path);
    assert_eq!(fs::read_to_string(mounted.path().join("etc/motd")).unwrap(), "before");
    assert!(fs::read_to_string(mounted.path().join("etc/inittab")).unwrap().contains("tty1"));
}

#[tokio::test]
async fn overlays_that_cannot_be_are_refused_and_leave_nothing() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    source(&root);
    symlink("loop", root.join("loop")).unwrap();
    let plain = make(Source::Directory(root.clone()), &base.path().join("plain")).await.unwrap();
    for path in ["/etc", "/etc/motd/below", "/loop/x"] {
        let overlays = [(path.to_owned(), overlay(b"x", 0o644))].into();
        let additions = Additions { overlays, ..Additions::default() };
        for source in [Source::Directory(root.clone()), Source::Ext4(plain.path.clone())] {
            let into = base.path().join("refused");
            let error = lay(source.clone(), &into, &additions).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::ImageFailed, "{path} on {source:?}: {error}");
            assert!(!into.exists(), "{path} on {source:?}");
        }
    }
}
