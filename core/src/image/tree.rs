//! The root filesystem as it will be, in memory: names and attributes here, contents in numbered files of the staging
//! directory.
//!
//! Whatever a source's entries are called, they are only ever names in this tree. Links are followed inside it as the
//! guest would follow them, so no entry reaches anything of the host.

mod layers;

use std::collections::{BTreeMap, HashSet};

use super::{ImageError, Limits};
use crate::os::shown::printable;

/// The number of a node.
pub(crate) type NodeId = usize;

/// The root directory's node.
pub(crate) const ROOT: NodeId = 0;

/// How many symbolic links are followed on one path, as in the kernel.
const HOPS: usize = 40;

/// What every sort of node has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    pub(crate) mtime_ns: u32,
    /// Names and values of extended attributes.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Attributes {
    /// Root's, with a mode.
    pub(crate) fn root(mode: u16, mtime: i64) -> Self {
        Self { mode, mtime, ..Self::default() }
    }
}

/// The content of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Content {
    /// The number of its file in the staging directory; an empty file has none.
    pub(crate) staged: Option<u64>,
    pub(crate) size: u64,
    /// 4 KiB blocks that are not holes.
    pub(crate) blocks: u64,
    /// Runs of such blocks.
    pub(crate) runs: u64,
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Body {
    Directory(BTreeMap<Vec<u8>, NodeId>),
    File(Content),
    Symlink(Vec<u8>),
    Device { block: bool, major: u32, minor: u32 },
    Fifo,
}

/// A file, directory, link or device.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) body: Body,
    /// Names that it has; none once it was replaced.
    pub(crate) links: u32,
}

impl Node {
    /// What its content takes in the image, in bytes.
    pub(crate) fn content_bytes(&self) -> u64 {
        match &self.body {
            Body::File(content) => content.blocks * 4096,
            _ => 0,
        }
    }
}

/// A root filesystem in the making.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    entries: u64,
    words: u64,
    limits: Limits,
    /// The names that the layer at hand put, where there are layers.
    upper: Option<HashSet<(NodeId, Vec<u8>)>>,
}

/// A name in a directory.
struct Place {
    parent: NodeId,
    name: Vec<u8>,
}

impl Tree {
    /// A tree of an empty root directory.
    pub(crate) fn new(limits: Limits) -> Self {
        let root =
            Node { attributes: Attributes::root(0o755, 0), body: Body::Directory(BTreeMap::new()), links: 1 };
        Self { nodes: vec![root], entries: 0, words: 0, limits, upper: None }
    }

    /// A node.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    /// All nodes that have a name.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.links > 0)
    }

    /// Whether nothing was put into it.
    pub(crate) fn is_empty(&self) -> bool {
        self.children(ROOT).is_none_or(BTreeMap::is_empty)
    }

    /// The names in a directory; `None` for what is none.
    pub(crate) fn children(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.nodes[id].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Counts an entry that came from the source, and the bytes of names, targets and attributes that are kept of it.
    fn count(&mut self, words: usize) -> Result<(), ImageError> {
        self.entries += 1;
        self.words += words as u64;
        if self.entries > self.limits.entries {
            return Err(ImageError::TooLarge { limit: self.limits.entries, what: "entries" });
        }
        if self.words > self.limits.words {
            return Err(ImageError::TooLarge {
                limit: self.limits.words,
                what: "bytes of names and attributes",
            });
        }
        Ok(())
    }

    /// Makes a directory, or gives the one that is there new attributes. Anything else of that name is replaced.
    pub(crate) fn put_directory(&mut self, path: &[u8], attributes: Attributes) -> Result<(), ImageError> {
        self.count(path.len() + check_attributes(path, &attributes)?)?;
        let Some(place) = self.place(path)? else {
            self.nodes[ROOT].attributes = attributes;
            return Ok(());
        };
        match self.child(&place) {
            Some(there) if matches!(self.nodes[there].body, Body::Directory(_)) => {
                self.nodes[there].attributes = attributes;
                self.mark(&place);
            }
            _ => {
                self.insert(place, Node { attributes, body: Body::Directory(BTreeMap::new()), links: 1 });
            }
        }
        Ok(())
    }

    /// Makes a file, link or device; what had the name is replaced.
    pub(crate) fn put(&mut self, path: &[u8], attributes: Attributes, body: Body) -> Result<(), ImageError> {
        let target = if let Body::Symlink(target) = &body { target.len() } else { 0 };
        self.count(path.len() + target + check_attributes(path, &attributes)?)?;
        match &body {
            Body::Symlink(target) => check_target(path, target)?,
            Body::Device { major, minor, .. } if *major > 0xfff || *minor > 0xf_ffff => {
                return Err(refuse(path, "its device number is out of range"));
            }
            _ => {}
        }
        let Some(place) = self.place(path)? else {
            return Err(refuse(path, "the root is a directory"));
        };
        self.insert(place, Node { attributes, body, links: 1 });
        Ok(())
    }

    /// Gives a file that is there another name.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), ImageError> {
        self.count(path.len())?;
        let missing = || refuse(path, "it is a hard link to something that is not there");
        let node = self.find_existing(target)?.ok_or_else(missing)?;
        if matches!(self.nodes[node].body, Body::Directory(_)) {
            return Err(refuse(path, "it is a hard link to a directory"));
        }
        if self.nodes[node].links >= 60_000 {
            return Err(refuse(path, "the file has too many hard links"));
        }
        let Some(place) = self.place(path)? else {
            return Err(refuse(path, "the root is a directory"));
        };
        if self.child(&place) == Some(node) {
            self.mark(&place);
            return Ok(());
        }
        self.nodes[node].links += 1;
        self.unname(&place);
        self.name(place, node);
        Ok(())
    }

    /// The node that a path means, all links followed as in the guest; `None` where there is none.
    pub(crate) fn find(&self, path: &[u8]) -> Option<NodeId> {
        self.walk(path)
    }

    /// The node of that very name, links followed on the way to it only.
    fn find_existing(&self, path: &[u8]) -> Result<Option<NodeId>, ImageError> {
        let components = self.components(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(Some(ROOT)) };
        let Some(parent) = self.walk(&parents.join(&b'/')) else { return Ok(None) };
        Ok(self.children(parent).and_then(|children| children.get(*name)).copied())
    }

    /// The parts of a path that comes from a source.
    fn components<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>, ImageError> {
        if path.len() > self.limits.path_bytes {
            return Err(refuse(path, "its path is too long"));
        }
        let mut components = Vec::new();
        for part in path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".") {
            check_name(path, part)?;
            components.push(part);
        }
        if components.len() > self.limits.depth {
            return Err(refuse(path, "it is too deep in directories"));
        }
        Ok(components)
    }

    /// Where a path is; its directories are made where they are missing. `None` is the root itself.
    fn place(&mut self, path: &[u8]) -> Result<Option<Place>, ImageError> {
        let components = self.components(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(None) };
        let mut at = vec![ROOT];
        for part in parents {
            let here = at.last().copied().unwrap_or(ROOT);
            let next = self.children(here).and_then(|c| c.get(*part)).copied();
            match next.map(|id| (id, &self.nodes[id].body)) {
                Some((id, Body::Directory(_))) => at.push(id),
                Some((_, Body::Symlink(target))) => {
                    let mut hops = 1;
                    let found = self.follow(at, target, &mut hops);
                    let directory =
                        found.filter(|at| at.last().is_some_and(|last| self.children(*last).is_some()));
                    at = directory.ok_or_else(|| {
                        refuse(path, "it goes through a symbolic link that leads to no directory")
                    })?;
                }
                Some(_) => return Err(refuse(path, "a part of its path is no directory")),
                None => {
                    self.count(part.len())?;
                    let node = Node {
                        attributes: Attributes::root(0o755, 0),
                        body: Body::Directory(BTreeMap::new()),
                        links: 1,
                    };
                    let id = self.insert(Place { parent: here, name: part.to_vec() }, node);
                    at.push(id);
                }
            }
            if at.len() > self.limits.depth {
                return Err(refuse(path, "it is too deep in directories"));
            }
        }
        Ok(Some(Place { parent: at.last().copied().unwrap_or(ROOT), name: name.to_vec() }))
    }

    /// The node at a path, links followed.
    fn walk(&self, path: &[u8]) -> Option<NodeId> {
        self.follow(vec![ROOT], path, &mut 0)?.last().copied()
    }

    /// Goes from the directory at the end of `at` along `path`, following links; gives the chain of nodes from the root.
    /// The last one may be no directory.
    fn follow(&self, mut at: Vec<NodeId>, path: &[u8], hops: &mut usize) -> Option<Vec<NodeId>> {
        if path.first() == Some(&b'/') {
            at.truncate(1);
        }
        for part in path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".") {
            let children = self.children(*at.last()?)?;
            if part == b".." {
                if at.len() > 1 {
                    at.pop();
                }
                continue;
            }
            let next = *children.get(part)?;
            match &self.nodes[next].body {
                Body::Symlink(target) => {
                    *hops += 1;
                    if *hops > HOPS {
                        return None;
                    }
                    at = self.follow(at, target, hops)?;
                }
                _ => at.push(next),
            }
            if at.len() > self.limits.depth + 1 {
                return None;
            }
        }
        Some(at)
    }

    fn child(&self, place: &Place) -> Option<NodeId> {
        self.children(place.parent)?.get(&place.name).copied()
    }

    fn insert(&mut self, place: Place, node: Node) -> NodeId {
        self.unname(&place);
        self.nodes.push(node);
        let id = self.nodes.len() - 1;
        self.name(place, id);
        id
    }

    fn name(&mut self, place: Place, id: NodeId) {
        self.mark(&place);
        if let Body::Directory(children) = &mut self.nodes[place.parent].body {
            children.insert(place.name, id);
        }
    }

    /// Takes a name away, with all that is below it.
    fn unname(&mut self, place: &Place) {
        let Body::Directory(children) = &mut self.nodes[place.parent].body else { return };
        let mut gone: Vec<NodeId> = children.remove(&place.name).into_iter().collect();
        while let Some(id) = gone.pop() {
            let node = &mut self.nodes[id];
            node.links = node.links.saturating_sub(1);
            if let Body::Directory(children) = &mut node.body {
                gone.extend(std::mem::take(children).into_values());
            }
        }
    }
}

/// An entry that cannot be part of an image.
pub(crate) fn refuse(path: &[u8], what: &'static str) -> ImageError {
    ImageError::Refused { name: printable(path), what }
}

fn check_name(path: &[u8], name: &[u8]) -> Result<(), ImageError> {
    if name == b".." {
        return Err(refuse(path, "`..` leaves the tree"));
    }
    if name.len() > 255 {
        return Err(refuse(path, "its name is longer than 255 bytes"));
    }
    check_text(path, name, "its name has a line break or a zero byte")
}

fn check_target(path: &[u8], target: &[u8]) -> Result<(), ImageError> {
    if target.is_empty() || target.len() > 4095 {
        return Err(refuse(path, "the symbolic link's target is empty or too long"));
    }
    check_text(path, target, "the symbolic link's target has a line break or a zero byte")
}

/// How many bytes of extended attributes there are.
fn check_attributes(path: &[u8], attributes: &Attributes) -> Result<usize, ImageError> {
    let mut bytes = 0;
    for (name, value) in &attributes.xattrs {
        bytes += name.len() + value.len();
        check_text(path, name, "an attribute's name has a line break or a zero byte")?;
        if name.is_empty() || name.len() > 255 {
            return Err(refuse(path, "an attribute's name is empty or too long"));
        }
    }
    if bytes > 4096 {
        return Err(refuse(path, "its extended attributes do not fit in a block"));
    }
    Ok(bytes)
}

/// Refuses what a line of a script cannot hold.
fn check_text(path: &[u8], text: &[u8], what: &'static str) -> Result<(), ImageError> {
    if text.iter().any(|b| matches!(b, b'\n' | b'\r' | 0)) { Err(refuse(path, what)) } else { Ok(()) }
}
