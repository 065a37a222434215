//! Assigns inode numbers: entries of one directory are adjacent, directory after directory.

use super::super::Ext4Error;
use super::inode::{FIRST_INODE, ROOT_INODE};
use super::node::{Body, Node, NodeId, ROOT};

/// Where a check puts lost files. Every filesystem has it; a new one gets this inode number.
pub(super) const LOST_AND_FOUND: &[u8] = b"lost+found";

/// A directory that has a name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Directory {
    pub(super) node: NodeId,
    /// The inode of the directory that it is in.
    pub(super) parent: u32,
}

/// The assignment of inode numbers.
pub(super) struct Numbers {
    /// Each node's inode; 0 for a node without a name.
    inodes: Vec<u32>,
    /// The nodes in the order of their inodes, without the root.
    pub(super) order: Vec<NodeId>,
    /// The directories in the order of their inodes, the root first.
    pub(super) directories: Vec<Directory>,
    /// The inode of the first in the order.
    first: u32,
    /// Whether the source has a `lost+found` of its own.
    pub(super) has_lost_and_found: bool,
}

impl Numbers {
    pub(super) fn of(nodes: &[Node]) -> Result<Self, Ext4Error> {
        let mut inodes = vec![0; nodes.len()];
        inodes[ROOT as usize] = ROOT_INODE;
        let (mut order, mut directories) = (Vec::new(), vec![Directory { node: ROOT, parent: ROOT_INODE }]);
        let own = match &nodes[ROOT as usize].body {
            Body::Directory(children) => children.get(LOST_AND_FOUND),
            _ => None,
        };
        if own.is_some_and(|child| !matches!(nodes[child.node as usize].body, Body::Directory(_))) {
            return Err(Ext4Error::LostAndFound);
        }
        let has_lost_and_found = own.is_some();
        let first = if has_lost_and_found { FIRST_INODE } else { FIRST_INODE + 1 };
        let mut at = 0;
        while let Some(directory) = directories.get(at).copied() {
            at += 1;
            let Body::Directory(children) = &nodes[directory.node as usize].body else { continue };
            let parent = inodes[directory.node as usize];
            for child in children.values() {
                let inode = &mut inodes[child.node as usize];
                if *inode != 0 {
                    continue;
                }
                *inode = u32::try_from(order.len())
                    .ok()
                    .and_then(|at| at.checked_add(first))
                    .ok_or(Ext4Error::TooLarge { what: "as many files" })?;
                order.push(child.node);
                if let Body::Directory(_) = &nodes[child.node as usize].body {
                    directories.push(Directory { node: child.node, parent });
                }
            }
        }
        Ok(Self { inodes, order, directories, first, has_lost_and_found })
    }

    pub(super) fn inode(&self, node: NodeId) -> u32 {
        self.inodes[node as usize]
    }

    /// The last number in use.
    pub(super) fn last(&self) -> u32 {
        self.first - 1 + self.order.len() as u32
    }

    /// All nodes with their inodes, in inode order.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, NodeId)> {
        std::iter::once((ROOT_INODE, ROOT)).chain((self.first..).zip(self.order.iter().copied()))
    }
}
