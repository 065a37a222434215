//! Malicious packages.

use std::io::Read;

use super::archive::{deb_of, tar};
use crate::asset::debian::deb::{More, each_file, read_whole};
use crate::asset::error::PackageProblem;
use crate::asset::stream::Compression;

/// The files of a package.
fn files(deb: &[u8], max: u64) -> Result<Vec<(String, Vec<u8>)>, PackageProblem> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), deb).unwrap();
    let mut found = Vec::new();
    let mut take = |path: &str, file: &mut dyn Read| {
        found.push((path.to_owned(), read_whole(path, file, max)?));
        Ok(More::Wanted)
    };
    each_file(file.path(), max, &mut |_| true, &mut take)?;
    Ok(found)
}

/// A tar archive of one entry with a path that the builder would refuse.
fn entry(path: &[u8], kind: tar::EntryType, size: u64, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(path: &str) -> Vec<u8> {
    entry(path.as_bytes(), tar::EntryType::Regular, 1, b"x")
}

fn packed(tar: &[u8]) -> Vec<u8> {
    deb_of(tar, Compression::Gzip)
}

#[test]
fn good_packages_of_every_compression_are_read() {
    let long = format!("./{}/file", "a-directory-with-a-long-name/".repeat(10).trim_end_matches('/'));
    let data = tar(&[("./bin/x", b"1"), (&long, b"2")]);
    for compression in [Compression::Plain, Compression::Gzip, Compression::Xz, Compression::Zstd] {
        let found = files(&deb_of(&data, compression), 100).unwrap();
        assert_eq!(found, [("bin/x".into(), b"1".to_vec()), (long[2..].to_owned(), b"2".to_vec())]);
    }
}

#[test]
fn paths_that_leave_the_tree_are_refused() {
    for path in ["../x", "./a/../../x", "/etc/passwd", "a/.."] {
        let problem = files(&packed(&file(path)), 100).unwrap_err();
        assert!(matches!(problem, PackageProblem::UnsafePath(_)), "{path} {problem:?}");
    }
    let mut long = entry(b"././@LongLink", tar::EntryType::GNULongName, 5, b"../x\0");
    long.extend(file("harmless"));
    assert!(matches!(files(&packed(&long), 100), Err(PackageProblem::UnsafePath(_))));
}

#[test]
fn a_long_name_is_not_longer_than_names_are() {
    let mut bytes = entry(b"././@LongLink", tar::EntryType::GNULongName, 1 << 20, &vec![b'a'; 1 << 20]);
    bytes.extend(file("x"));
    assert!(matches!(files(&packed(&bytes), 100), Err(PackageProblem::TooLarge { limit: 4096, .. })));
}

#[test]
fn only_regular_files_are_taken() {
    use tar::EntryType;
    for kind in [EntryType::Symlink, EntryType::Link, EntryType::Char, EntryType::Fifo, EntryType::Directory]
    {
        let problem = files(&packed(&entry(b"./x", kind, 0, b"")), 100).unwrap_err();
        assert!(matches!(problem, PackageProblem::NotAFile(_)), "{kind:?} {problem:?}");
    }
}

#[test]
fn sizes_are_limited() {
    let problem = files(&packed(&tar(&[("./x", &[0; 101])])), 100).unwrap_err();
    assert!(matches!(problem, PackageProblem::TooLarge { limit: 100, .. }), "{problem:?}");
    // The header promises more bytes than there are.
    for size in [5000, u64::MAX >> 1] {
        let bytes = entry(b"x", tar::EntryType::Regular, size, b"x");
        assert!(files(&packed(&bytes), u64::MAX).is_err(), "{size}");
    }
}

#[test]
fn only_the_first_file_of_a_name_is_taken() {
    let data =
        [entry(b"./x", tar::EntryType::Regular, 1, b"1"), entry(b"x", tar::EntryType::Regular, 1, b"2")]
            .concat();
    assert_eq!(files(&packed(&data), 100).unwrap(), [("x".into(), b"1".to_vec())]);
}

#[test]
fn damaged_ar_archives_are_refused() {
    let good = packed(&file("x"));
    assert!(matches!(files(b"", 9), Err(PackageProblem::Ar(_))));
    assert!(matches!(files(b"!<arch>\n", 9), Err(PackageProblem::NoData)));
    assert!(matches!(files(b"PK\x03\x04 a zip archive", 9), Err(PackageProblem::Ar(_))));
    for cut in 0..good.len() - 1 {
        // A cut behind the end of the tar archive's entry goes unnoticed.
        let _ = files(&good[..cut], 100);
    }
    let header =
        |name: &str, size: &str| format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 644);
    for (name, size) in [
        ("//", "9999999999"),
        ("/99999999", "4"),
        ("#1/9999999999", "9999999999"),
        ("debian-binary", "9999999999"),
        ("debian-binary", "-1"),
        ("debian-binary", "0x10"),
        ("data.tar.bz2", "4"),
        ("data.tar.xz", "9999999999"),
        ("data.tar", ""),
    ] {
        let deb = format!("!<arch>\n{}2.0\n", header(name, size));
        assert!(files(deb.as_bytes(), 100).is_err(), "{name} {size}");
    }
    let many = header("x", "0").repeat(1000);
    assert!(matches!(files(format!("!<arch>\n{many}").as_bytes(), 100), Err(PackageProblem::NoData)));
}

#[test]
fn dpkg_agrees_on_what_is_in_a_package() {
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    std::fs::create_dir_all(tree.join("usr/bin")).unwrap();
    let control =
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.test>\nDescription: x\n";
    std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
    std::fs::write(tree.join("usr/bin/x"), "contents").unwrap();
    std::os::unix::fs::symlink("x", tree.join("usr/bin/y")).unwrap();
    for compression in ["xz", "gzip", "zstd", "none"] {
        let deb = dir.path().join(format!("{compression}.deb"));
        let output = Command::new("dpkg-deb")
            .args(["--root-owner-group", &format!("-Z{compression}"), "--build"])
            .args([&tree, &deb])
            .output()
            .expect("dpkg-deb is installed");
        // dpkg supports Zstandard only on distributions that use it.
        if !output.status.success() && compression == "zstd" {
            eprintln!("SKIPPED: this dpkg-deb does not pack with zstd");
            continue;
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut found = Vec::new();
        each_file(&deb, 100, &mut |path| path == "usr/bin/x", &mut |path, file| {
            found.push((path.to_owned(), read_whole(path, file, 100)?));
            Ok(More::Enough)
        })
        .unwrap();
        assert_eq!(found, [("usr/bin/x".into(), b"contents".to_vec())]);
    }
}

proptest::proptest! {
    #[test]
    fn any_damage_is_survived(at: u16, byte: u8, plain: bool) {
        let compression = if plain { Compression::Plain } else { Compression::Xz };
        let mut deb = deb_of(&tar(&[("./bin/x", b"some contents"), ("./bin/y", &[7; 2000])]), compression);
        let length = deb.len();
        deb[usize::from(at) % length] = byte;
        if let Ok(found) = files(&deb, 4096) {
            proptest::prop_assert!(found.len() <= 3);
        }
    }
}
