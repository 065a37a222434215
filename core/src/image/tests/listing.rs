//! Lists everything about a directory's content.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// What is at one path.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fact {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    /// Length and hash of a file, target of a link, number of a device.
    content: String,
    /// The first path of the same file.
    same_as: PathBuf,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

pub(super) type Facts = BTreeMap<PathBuf, Fact>;

/// Everything in `root` except `lost+found` and what Nexus adds to images.
pub(super) fn facts(root: &Path) -> Facts {
    let mut facts = Facts::new();
    walk(root, Path::new("."), &mut HashMap::new(), &mut facts);
    facts
}

/// Fails with only the differences.
#[track_caller]
pub(super) fn assert_same(is: &Facts, expected: &Facts) {
    let mut wrong = Vec::new();
    for path in is.keys().chain(expected.keys()) {
        let (is, expected) = (is.get(path), expected.get(path));
        if is != expected {
            wrong.push(format!("{}\n  is       {is:?}\n  expected {expected:?}", path.display()));
        }
    }
    wrong.dedup();
    wrong.truncate(10);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!expected.is_empty());
}

fn walk(root: &Path, path: &Path, seen: &mut HashMap<u64, PathBuf>, facts: &mut Facts) {
    let full = root.join(path);
    let metadata = std::fs::symlink_metadata(&full).unwrap();
    let (kind, content) = describe(&full, &metadata);
    let same_as = match kind {
        "directory" => path.to_owned(),
        _ => seen.entry(metadata.ino()).or_insert_with(|| path.to_owned()).clone(),
    };
    facts.insert(
        path.to_owned(),
        Fact {
            kind,
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            content,
            same_as,
            xattrs: xattrs(&full),
        },
    );
    if kind == "directory" {
        let mut names: Vec<_> = std::fs::read_dir(&full).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            let inner = path.join(&name);
            if name != "lost+found" && inner != Path::new("./etc/nexus") {
                walk(root, &inner, seen, facts);
            }
        }
    }
}

fn describe(path: &Path, metadata: &std::fs::Metadata) -> (&'static str, String) {
    let kind = metadata.file_type();
    if kind.is_dir() {
        ("directory", String::new())
    } else if kind.is_symlink() {
        ("link", format!("{:?}", std::fs::read_link(path).unwrap()))
    } else if kind.is_file() {
        let hash = Sha256::digest(std::fs::read(path).unwrap());
        ("file", format!("{} {}", metadata.len(), data_encoding::HEXLOWER.encode(&hash)))
    } else if kind.is_fifo() {
        ("fifo", String::new())
    } else if kind.is_socket() {
        ("socket", String::new())
    } else {
        let number = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        (if kind.is_block_device() { "block" } else { "char" }, format!("{number:?}"))
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0_u8; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..length].split(|b| *b == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0_u8; 64 << 10];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}
