//! The contents of a filesystem to be written: numbered nodes, and names in directories.

use std::collections::BTreeMap;

/// The number of a node: its index among all nodes.
pub(crate) type NodeId = u32;

/// The root directory's node.
pub(crate) const ROOT: NodeId = 0;

/// The maximum number of hard links (`EXT4_LINK_MAX`).
pub(crate) const LINKS_MAX: u32 = 65_000;

/// The attributes that every kind of node has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) xattrs: Xattrs,
}

impl Attributes {
    /// Owned by root, with this mode.
    pub(crate) fn root(mode: u16, mtime: i64) -> Self {
        Self { mode, mtime, ..Self::default() }
    }
}

/// Names and values of extended attributes, as in `getxattr`. Most nodes have none, which takes only one word of memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::box_collection, reason = "a million nodes without attributes are kept in memory")]
pub(crate) struct Xattrs(Option<Box<BTreeMap<Vec<u8>, Vec<u8>>>>);

impl Xattrs {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Vec<u8>, &Vec<u8>)> {
        self.0.iter().flat_map(|all| all.iter())
    }

    /// Removes those that `keep` refuses; returns their number.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&[u8]) -> bool) -> u64 {
        let Some(all) = &mut self.0 else { return 0 };
        let before = all.len();
        all.retain(|name, _| keep(name));
        let left_out = before - all.len();
        if all.is_empty() {
            self.0 = None;
        }
        left_out as u64
    }
}

impl From<BTreeMap<Vec<u8>, Vec<u8>>> for Xattrs {
    fn from(all: BTreeMap<Vec<u8>, Vec<u8>>) -> Self {
        Self((!all.is_empty()).then(|| Box::new(all)))
    }
}

/// The content of a file: `size` bytes, in `count` runs of the writer starting at run `first`. The rest is holes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) size: u64,
    pub(super) first: u32,
    pub(super) count: u32,
}

/// A name's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) node: NodeId,
    /// The layer of the source that put the name there; not stored in the filesystem.
    pub(crate) layer: u16,
}

/// The kind of a node, with its data.
#[derive(Debug)]
pub(crate) enum Body {
    /// Names of any bytes but `/` and NUL, 1 to 255 of them.
    Directory(BTreeMap<Box<[u8]>, Child>),
    File(Content),
    /// A target of 1 to 4095 bytes.
    Symlink(Box<[u8]>),
    /// A major number of 12 bits and a minor one of 20.
    Device {
        block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

impl Body {
    /// An empty directory.
    pub(crate) fn directory() -> Self {
        Self::Directory(BTreeMap::new())
    }

    /// The type in a directory entry (`EXT4_FT_*`).
    pub(super) fn entry_type(&self) -> u8 {
        match self {
            Self::File(_) => 1,
            Self::Directory(_) => 2,
            Self::Device { block: false, .. } => 3,
            Self::Device { block: true, .. } => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink(_) => 7,
        }
    }

    /// The type in a mode (`S_IFMT`, its four bits).
    pub(super) fn mode_type(&self) -> u16 {
        match self {
            Self::Fifo => 0o1,
            Self::Device { block: false, .. } => 0o2,
            Self::Directory(_) => 0o4,
            Self::Device { block: true, .. } => 0o6,
            Self::File(_) => 0o10,
            Self::Symlink(_) => 0o12,
            Self::Socket => 0o14,
        }
    }
}

/// A file, directory, link or device.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) body: Body,
    /// How many names it has, at most [`LINKS_MAX`]; zero once it was replaced.
    pub(crate) links: u32,
}

impl Node {
    /// A node with one name.
    pub(crate) fn new(attributes: Attributes, body: Body) -> Self {
        Self { attributes, body, links: 1 }
    }

    /// An empty directory owned by root, for a path without an entry of its own.
    pub(crate) fn implied_directory() -> Self {
        Self::implied_directory_at(0)
    }

    /// The same, with a time stamp.
    pub(super) fn implied_directory_at(mtime: i64) -> Self {
        Self::new(Attributes::root(0o755, mtime), Body::directory())
    }
}
