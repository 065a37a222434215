//! A filesystem made from paths, and its expected content.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::{Rng, SeedableRng};

use super::super::*;
use crate::os::mounted::Mounted;

/// A filesystem to be written to.
pub(super) fn drive(label: &str) -> Options<'_> {
    Options { purpose: Purpose::Drive, label, identity: None, made: 1_600_000_000 }
}

pub(super) fn attributes(mode: u16) -> Attributes {
    Attributes::root(mode, 1_700_000_000)
}

/// Bytes without a block of zeros.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::rngs::StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes.iter_mut().step_by(64).for_each(|byte| *byte |= 1);
    bytes
}

/// Fails if anything is wrong with a filesystem.
#[track_caller]
pub(super) fn check(path: &Path) {
    let checked = Command::new("/sbin/e2fsck").arg("-fn").arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{said}{}", String::from_utf8_lossy(&checked.stderr));
}

pub(super) struct Trial {
    directory: tempfile::TempDir,
    pub(super) writer: Writer,
    nodes: Vec<Node>,
    contents: HashMap<NodeId, Vec<u8>>,
}

impl Trial {
    pub(super) fn new(size: Size) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let writer = Writer::create(&directory.path().join("image"), size, 0, &Progress::default()).unwrap();
        let root = Node::new(attributes(0o755), Body::directory());
        Self { directory, writer, nodes: vec![root], contents: HashMap::new() }
    }

    pub(super) fn content(&mut self, bytes: &[u8]) -> Content {
        self.writer.take(bytes, bytes.len() as u64).unwrap()
    }

    /// Skips blocks, so that the next content is elsewhere.
    pub(super) fn skip_to(&mut self, block: u64) {
        while self.writer.cursor.next() < block {
            self.writer.cursor.run(block - self.writer.cursor.next());
        }
    }

    pub(super) fn file(&mut self, path: &[u8], bytes: &[u8]) -> NodeId {
        let content = self.content(bytes);
        let node = self.put(path, attributes(0o644), Body::File(content));
        self.contents.insert(node, bytes.to_vec());
        node
    }

    pub(super) fn directory(&mut self, path: &[u8]) {
        let (parent, name) = self.parent(path);
        if !self.children(parent).contains_key(&name) {
            self.put(path, attributes(0o755), Body::directory());
        }
    }

    pub(super) fn put(&mut self, path: &[u8], attributes: Attributes, body: Body) -> NodeId {
        self.remove(path);
        self.nodes.push(Node { attributes, body, links: 0 });
        let node = self.nodes.len() as NodeId - 1;
        self.link(path, node);
        node
    }

    pub(super) fn link(&mut self, path: &[u8], node: NodeId) {
        let (parent, name) = self.parent(path);
        self.children(parent).insert(name, Child { node, layer: 0 });
        self.nodes[node as usize].links += 1;
    }

    pub(super) fn remove(&mut self, path: &[u8]) {
        let (parent, name) = self.parent(path);
        let mut gone: Vec<Child> = self.children(parent).remove(&name).into_iter().collect();
        while let Some(child) = gone.pop() {
            let node = &mut self.nodes[child.node as usize];
            node.links -= 1;
            if let Body::Directory(children) = &mut node.body {
                gone.extend(std::mem::take(children).into_values());
            }
        }
    }

    fn children(&mut self, node: NodeId) -> &mut BTreeMap<Box<[u8]>, Child> {
        match &mut self.nodes[node as usize].body {
            Body::Directory(children) => children,
            other => panic!("{other:?} is no directory"),
        }
    }

    /// The directory of a path, made if it is missing, and the name in it.
    fn parent(&mut self, path: &[u8]) -> (NodeId, Box<[u8]>) {
        let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        let (name, parents) = parts.split_last().unwrap();
        let mut at = ROOT;
        for part in parents {
            let there = self.children(at).get(*part).copied();
            at = there.map(|child| child.node).unwrap_or_else(|| {
                self.nodes.push(Node::new(attributes(0o755), Body::directory()));
                let node = self.nodes.len() as NodeId - 1;
                self.children(at).insert((*part).into(), Child { node, layer: 0 });
                node
            });
        }
        (at, (*name).into())
    }

    /// Completes and checks it.
    #[track_caller]
    pub(super) fn finish(self, options: &Options<'_>) -> Image {
        let made = self.writer.finish(&self.nodes, options).unwrap();
        let image = Image { directory: self.directory, nodes: self.nodes, contents: self.contents, made };
        check(&image.path());
        assert_eq!(fs::metadata(image.path()).unwrap().len(), made.size);
        image
    }

    /// Completes it without a check; the file exists as long as the directory.
    pub(super) fn finish_unchecked(self, options: &Options<'_>) -> (tempfile::TempDir, Made) {
        let made = self.writer.finish(&self.nodes, options).unwrap();
        (self.directory, made)
    }

    /// The number of a file's runs of blocks.
    pub(super) fn runs(&self, node: NodeId) -> u32 {
        match &self.nodes[node as usize].body {
            Body::File(content) => content.count,
            other => panic!("{other:?} is no file"),
        }
    }

    pub(super) fn has_name(&self, node: NodeId) -> bool {
        self.nodes[node as usize].links > 0
    }

    pub(super) fn describe(&mut self, node: NodeId, attributes: Attributes) {
        self.nodes[node as usize].attributes = attributes;
    }

    pub(super) fn try_finish(self, options: &Options<'_>) -> Result<Made, Ext4Error> {
        self.writer.finish(&self.nodes, options)
    }
}

pub(super) struct Image {
    directory: tempfile::TempDir,
    nodes: Vec<Node>,
    contents: HashMap<NodeId, Vec<u8>>,
    pub(super) made: Made,
}

impl Image {
    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// The output of `debugfs`.
    pub(super) fn debugfs(&self, command: &str) -> String {
        let said = Command::new("/sbin/debugfs").args(["-R", command]).arg(self.path()).output().unwrap();
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// Mounts it and compares everything in it.
    #[track_caller]
    pub(super) fn assert_mounted(&self) {
        let mounted = Mounted::read_only(&self.path());
        self.assert_same(mounted.path());
    }

    /// Fails unless a directory has the same contents.
    #[track_caller]
    pub(super) fn assert_same(&self, root: &Path) {
        let mut inodes = HashMap::new();
        let mut wrong = Vec::new();
        self.compare(ROOT, root, &mut inodes, &mut wrong);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let named = self.nodes.iter().filter(|node| node.links > 0).count();
        assert_eq!(inodes.len(), named, "some nodes were not found");
    }

    fn compare(&self, id: NodeId, path: &Path, inodes: &mut HashMap<NodeId, u64>, wrong: &mut Vec<String>) {
        if wrong.len() > 10 {
            return;
        }
        let Node { attributes, body, links } = &self.nodes[id as usize];
        let meta = match fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(error) => return wrong.push(format!("{}: {error}", path.display())),
        };
        let mut same = |what: &str, is: &dyn std::fmt::Debug, expected: &dyn std::fmt::Debug| {
            let (is, expected) = (format!("{is:?}"), format!("{expected:?}"));
            if is != expected {
                wrong.push(format!("{}: {what} is {is}, not {expected}", path.display()));
            }
        };
        let is_again = inodes.contains_key(&id);
        same("inode", &meta.ino(), inodes.entry(id).or_insert(meta.ino()));
        same("mode", &(meta.mode() & 0o7777), &u32::from(attributes.mode));
        same("owner", &(meta.uid(), meta.gid()), &(attributes.uid, attributes.gid));
        same("time", &(meta.mtime(), meta.mtime_nsec()), &(attributes.mtime, i64::from(attributes.mtime_ns)));
        if !is_again {
            let found: BTreeMap<_, _> = xattrs(path);
            let expected: BTreeMap<_, _> =
                attributes.xattrs.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
            same("attributes", &found, &expected);
        }
        let kind = meta.file_type();
        match body {
            Body::Directory(children) => {
                same("is a directory", &kind.is_dir(), &true);
                let is_directory =
                    |child: &&Child| matches!(self.nodes[child.node as usize].body, Body::Directory(_));
                let mut subdirectories = children.values().filter(is_directory).count() as u64;
                let mut expected: Vec<&[u8]> = children.keys().map(|name| &name[..]).collect();
                if id == ROOT && !expected.contains(&&b"lost+found"[..]) {
                    expected.push(b"lost+found");
                    subdirectories += 1;
                }
                let nlink = if subdirectories + 2 > u64::from(LINKS_MAX) { 1 } else { subdirectories + 2 };
                same("links", &meta.nlink(), &nlink);
                let mut found: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
                found.sort();
                expected.sort_unstable();
                let found: Vec<&[u8]> = found.iter().map(|name| name.as_bytes()).collect();
                same("names", &(found == expected), &true);
                for (name, child) in children {
                    self.compare(child.node, &path.join(OsStr::from_bytes(name)), inodes, wrong);
                }
                return;
            }
            Body::File(content) => {
                same("is a file", &kind.is_file(), &true);
                same("size", &meta.len(), &content.size);
                if let Some(expected) = self.contents.get(&id).filter(|_| !is_again) {
                    same("content", &(fs::read(path).unwrap() == *expected), &true);
                }
            }
            Body::Symlink(target) => {
                same("is a link", &kind.is_symlink(), &true);
                same("target", &fs::read_link(path).unwrap(), &Path::new(OsStr::from_bytes(target)));
            }
            Body::Device { block, major, minor } => {
                same("is a device", &(kind.is_block_device(), kind.is_char_device()), &(*block, !*block));
                let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
                same("number", &number, &(*major, *minor));
            }
            Body::Fifo => same("is a FIFO", &kind.is_fifo(), &true),
            Body::Socket => same("is a socket", &kind.is_socket(), &true),
        }
        same("links", &meta.nlink(), &u64::from(*links));
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0_u8; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0_u8; 64 << 10];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}
