//! The future root filesystem in memory: names and attributes; the contents are already in the image.
//!
//! The names of a source's entries are used only in this tree. Links are followed inside it as the guest would, so no
//! entry can reach files of the host.

mod layers;

use std::collections::{BTreeMap, HashSet};

use super::{ImageError, Limits};
pub(crate) use crate::ext4::{Attributes, Body};
use crate::ext4::{Child, LINKS_MAX, Node, NodeId, ROOT, xattr};
use crate::os::shown::printable;

/// How many symbolic links are followed on one path; the kernel's limit.
const HOPS: usize = 40;

/// A root filesystem that is being made.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    entries: u64,
    words: u64,
    limits: Limits,
    /// The number of the current layer; 0 without layers.
    layer: u16,
    /// What this layer hides, as directory and name.
    whiteouts: HashSet<(NodeId, Vec<u8>)>,
    /// How many attributes were left out.
    left_out: u64,
}

/// A name in a directory.
struct Place {
    parent: NodeId,
    name: Vec<u8>,
}

impl Tree {
    /// A tree of an empty root directory.
    pub(crate) fn new(limits: Limits) -> Self {
        let nodes = vec![Node::implied_directory()];
        Self { nodes, entries: 0, words: 0, limits, layer: 0, whiteouts: HashSet::new(), left_out: 0 }
    }

    /// A node.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// All nodes by number, including those without a name.
    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// How many extended attributes were left out because Linux would not keep them on such nodes.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Whether it is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.children(ROOT).is_none_or(BTreeMap::is_empty)
    }

    /// The names in a directory; `None` if it is not a directory.
    pub(crate) fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Child>> {
        match &self.nodes[id as usize].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Counts an entry of the source, and the bytes of its names, targets and attributes that are stored.
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

    /// Counts an entry, and returns those of its attributes that Linux would keep on this type of node.
    fn keepable(
        &mut self,
        path: &[u8],
        mut attributes: Attributes,
        body: &Body,
    ) -> Result<Attributes, ImageError> {
        let target = if let Body::Symlink(target) = body { target.len() } else { 0 };
        let words: usize = attributes.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.count(path.len() + target + words)?;
        self.left_out += attributes.xattrs.retain(|name| xattr::is_kept(body, name));
        xattr::check(&attributes.xattrs).map_err(|what| refuse(path, what))?;
        Ok(attributes)
    }

    /// Makes a directory, or changes the attributes of an existing one. Anything else of that name is replaced.
    pub(crate) fn put_directory(&mut self, path: &[u8], attributes: Attributes) -> Result<(), ImageError> {
        let body = Body::directory();
        let attributes = self.keepable(path, attributes, &body)?;
        let Some(place) = self.place(path)? else {
            self.nodes[ROOT as usize].attributes = attributes;
            return Ok(());
        };
        match self.child(&place) {
            Some(there) if matches!(self.nodes[there as usize].body, Body::Directory(_)) => {
                self.nodes[there as usize].attributes = attributes;
                self.mark(&place);
            }
            _ => {
                self.insert(place, Node::new(attributes, body));
            }
        }
        Ok(())
    }

    /// Makes a file, link or device, replacing what has the name.
    pub(crate) fn put(&mut self, path: &[u8], attributes: Attributes, body: Body) -> Result<(), ImageError> {
        let attributes = self.keepable(path, attributes, &body)?;
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
        self.insert(place, Node::new(attributes, body));
        Ok(())
    }

    /// Adds another name to an existing file.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), ImageError> {
        self.count(path.len())?;
        let missing = || refuse(path, "it is a hard link to something that is not there");
        let node = self.find_existing(target)?.ok_or_else(missing)?;
        if matches!(self.nodes[node as usize].body, Body::Directory(_)) {
            return Err(refuse(path, "it is a hard link to a directory"));
        }
        if self.nodes[node as usize].links >= LINKS_MAX {
            return Err(refuse(path, "the file has more hard links than the 65,000 that ext4 can count"));
        }
        let Some(place) = self.place(path)? else {
            return Err(refuse(path, "the root is a directory"));
        };
        if self.child(&place) == Some(node) {
            self.mark(&place);
            return Ok(());
        }
        self.nodes[node as usize].links += 1;
        self.unname(&place);
        self.name(place, node);
        Ok(())
    }

    /// The node at a path, with all links followed as in the guest.
    pub(crate) fn find(&self, path: &[u8]) -> Option<NodeId> {
        self.walk(path)
    }

    /// The node of exactly that name; links are followed only on the way to it.
    fn find_existing(&self, path: &[u8]) -> Result<Option<NodeId>, ImageError> {
        let components = self.components(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(Some(ROOT)) };
        let Some(parent) = self.walk(&parents.join(&b'/')) else { return Ok(None) };
        Ok(self.children(parent).and_then(|children| children.get(*name)).map(|child| child.node))
    }

    /// The components of a path from a source.
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

    /// The place of a path; missing directories are made. `None` is the root itself.
    fn place(&mut self, path: &[u8]) -> Result<Option<Place>, ImageError> {
        let components = self.components(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(None) };
        let mut at = vec![ROOT];
        for part in parents {
            let here = at.last().copied().unwrap_or(ROOT);
            let next = self.children(here).and_then(|c| c.get(*part)).map(|child| child.node);
            match next.map(|id| (id, &self.nodes[id as usize].body)) {
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
                Some(_) => return Err(refuse(path, "a part of its path is not a directory")),
                None => {
                    self.count(part.len())?;
                    let place = Place { parent: here, name: part.to_vec() };
                    let id = self.insert(place, Node::implied_directory());
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

    /// Walks from the directory at the end of `at` along `path`, following links; returns the chain of nodes from the
    /// root. The last one need not be a directory.
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
            let next = children.get(part)?.node;
            match &self.nodes[next as usize].body {
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
        self.children(place.parent)?.get(&place.name[..]).map(|child| child.node)
    }

    fn insert(&mut self, place: Place, node: Node) -> NodeId {
        self.unname(&place);
        self.nodes.push(node);
        // Fits, because the number of entries is limited.
        let id = self.nodes.len() as NodeId - 1;
        self.name(place, id);
        id
    }

    fn name(&mut self, place: Place, id: NodeId) {
        let layer = self.layer;
        if let Body::Directory(children) = &mut self.nodes[place.parent as usize].body {
            children.insert(place.name.into(), Child { node: id, layer });
        }
    }

    /// Removes a name with everything below it.
    fn unname(&mut self, place: &Place) {
        let Body::Directory(children) = &mut self.nodes[place.parent as usize].body else { return };
        let mut gone: Vec<NodeId> =
            children.remove(&place.name[..]).into_iter().map(|child| child.node).collect();
        while let Some(id) = gone.pop() {
            let node = &mut self.nodes[id as usize];
            node.links = node.links.saturating_sub(1);
            if let Body::Directory(children) = &mut node.body {
                gone.extend(std::mem::take(children).into_values().map(|child| child.node));
            }
        }
    }
}

/// The error for an entry that is not allowed in an image.
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
    if name.contains(&0) { Err(refuse(path, "its name has a zero byte")) } else { Ok(()) }
}

fn check_target(path: &[u8], target: &[u8]) -> Result<(), ImageError> {
    if target.is_empty() || target.len() > 4095 {
        return Err(refuse(path, "the symbolic link's target is empty or too long"));
    }
    let has_zero = target.contains(&0);
    if has_zero { Err(refuse(path, "the symbolic link's target has a zero byte")) } else { Ok(()) }
}
