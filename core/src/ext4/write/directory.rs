//! The blocks of a directory: either one block of entries, or a hash index with blocks of entries after it.
//!
//! Source: linux/Documentation/filesystems/ext4/directory.rst, and `struct dx_root`, `dx_node` of linux/fs/ext4/namei.c.

use super::super::Ext4Error;
use super::BLOCK;
use super::hash::{self, hash};
use super::raw::{crc, set16, set32};

/// Bytes for entries in a block; the checksum follows, in the form of an entry without a name.
const ROOM: usize = BLOCK - TAIL;
const TAIL: usize = 12;
/// Length of the entry `.` or `..`.
const DOT: usize = 12;
/// Type of a directory in an entry.
const DIRECTORY: u8 = 2;

// Where the counts begin in an index root and in other index blocks, and how many entries fit.
const ROOT_COUNTS: usize = 32;
const NODE_COUNTS: usize = 8;
const IN_ROOT: usize = (BLOCK - ROOT_COUNTS - 8) / 8;
const IN_NODE: usize = (BLOCK - NODE_COUNTS - 8) / 8;

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'n> {
    pub(super) name: &'n [u8],
    pub(super) inode: u32,
    /// `EXT4_FT_*`.
    pub(super) kind: u8,
}

impl Entry<'_> {
    fn size(&self) -> usize {
        (8 + self.name.len()).next_multiple_of(4)
    }
}

/// A directory that is laid out, but not written yet.
pub(super) struct Directory<'e> {
    inode: u32,
    parent: u32,
    entries: &'e [Entry<'e>],
    /// That of the inode.
    seed: u32,
    form: Form,
}

enum Form {
    /// Entries in their given order, in this many blocks.
    Plain { blocks: usize },
    /// Entries ordered by hash.
    Indexed { order: Vec<u32>, leaves: Vec<Leaf> },
}

/// A block of entries: its hash in the index, and its range in the order.
struct Leaf {
    hash: u32,
    start: u32,
    end: u32,
}

impl<'e> Directory<'e> {
    /// Lays out a directory. A directory without an index gets at least `least` blocks.
    pub(super) fn lay_out(
        (inode, parent): (u32, u32),
        entries: &'e [Entry<'e>],
        seed: u32,
        hash_seed: &[u32; 4],
        least: usize,
    ) -> Result<Self, Ext4Error> {
        let bytes: usize = 2 * DOT + entries.iter().map(Entry::size).sum::<usize>();
        let form = if bytes <= ROOM {
            Form::Plain { blocks: least.max(1) }
        } else {
            let mut order: Vec<(u32, u32, u32)> = Vec::with_capacity(entries.len());
            for (at, entry) in (0_u32..).zip(entries) {
                let (hash, minor) = hash(hash_seed, entry.name);
                order.push((hash, minor, at));
            }
            order.sort_unstable();
            let leaves = leaves(&order, entries);
            if leaves.len() > IN_ROOT * IN_NODE {
                return Err(Ext4Error::TooLarge { what: "as many names in one directory" });
            }
            Form::Indexed { order: order.into_iter().map(|(_, _, at)| at).collect(), leaves }
        };
        Ok(Self { inode, parent, entries, seed, form })
    }

    /// Whether it has an index.
    pub(super) fn is_indexed(&self) -> bool {
        matches!(self.form, Form::Indexed { .. })
    }

    /// How many blocks it has.
    pub(super) fn blocks(&self) -> usize {
        match &self.form {
            Form::Plain { blocks } => *blocks,
            Form::Indexed { leaves, .. } if leaves.len() <= IN_ROOT => 1 + leaves.len(),
            Form::Indexed { leaves, .. } => 1 + leaves.len() + leaves.len().div_ceil(IN_NODE),
        }
    }

    /// Produces its blocks one by one.
    pub(super) fn write(
        &self,
        mut put: impl FnMut(&[u8; BLOCK]) -> Result<(), Ext4Error>,
    ) -> Result<(), Ext4Error> {
        match &self.form {
            Form::Plain { blocks } => {
                put(&self.only_block())?;
                for _ in 1..*blocks {
                    let mut block = [0; BLOCK];
                    set16(&mut block, 4, ROOM as u16);
                    self.end(&mut block);
                    put(&block)?;
                }
                Ok(())
            }
            Form::Indexed { order, leaves } => {
                let index: Vec<(u32, u32)> =
                    leaves.iter().zip(1..).map(|(leaf, block)| (leaf.hash, block)).collect();
                let nodes: Vec<&[(u32, u32)]> =
                    if index.len() <= IN_ROOT { Vec::new() } else { index.chunks(IN_NODE).collect() };
                let first = 1 + index.len() as u32;
                let above: Vec<(u32, u32)> =
                    nodes.iter().zip(first..).map(|(node, block)| (node[0].0, block)).collect();
                put(&self.root(if nodes.is_empty() { &index } else { &above }, !nodes.is_empty()))?;
                for leaf in leaves {
                    put(&self.leaf(&order[leaf.start as usize..leaf.end as usize]))?;
                }
                for node in nodes {
                    let mut block = [0; BLOCK];
                    set16(&mut block, 4, BLOCK as u16);
                    self.counts(&mut block, NODE_COUNTS, IN_NODE, node);
                    put(&block)?;
                }
                Ok(())
            }
        }
    }

    fn only_block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        self.dots(&mut block, if self.entries.is_empty() { ROOM - DOT } else { DOT });
        let mut at = 2 * DOT;
        for (number, entry) in self.entries.iter().enumerate() {
            let is_last = number + 1 == self.entries.len();
            let length = if is_last { ROOM - at } else { entry.size() };
            put_entry(&mut block, at, length, entry);
            at += length;
        }
        self.end(&mut block);
        block
    }

    fn leaf(&self, part: &[u32]) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut at = 0;
        for (number, entry) in part.iter().map(|at| &self.entries[*at as usize]).enumerate() {
            let length = if number + 1 == part.len() { ROOM - at } else { entry.size() };
            put_entry(&mut block, at, length, entry);
            at += length;
        }
        self.end(&mut block);
        block
    }

    fn root(&self, index: &[(u32, u32)], has_nodes: bool) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        self.dots(&mut block, BLOCK - DOT);
        block[2 * DOT + 4] = hash::VERSION;
        // Length of this header, and index levels below it.
        block[2 * DOT + 5] = 8;
        block[2 * DOT + 6] = u8::from(has_nodes);
        self.counts(&mut block, ROOT_COUNTS, IN_ROOT, index);
        block
    }

    fn dots(&self, block: &mut [u8; BLOCK], rest: usize) {
        put_entry(block, 0, DOT, &Entry { name: b".", inode: self.inode, kind: DIRECTORY });
        put_entry(block, DOT, rest, &Entry { name: b"..", inode: self.parent, kind: DIRECTORY });
    }

    /// Adds the checksum of a block of entries.
    fn end(&self, block: &mut [u8; BLOCK]) {
        set16(block, ROOM + 4, TAIL as u16);
        block[ROOM + 7] = 0xde;
        let checksum = crc(self.seed, &block[..ROOM]);
        set32(block, ROOM + 8, checksum);
    }

    /// Writes the entries of an index block, and its checksum. The counts take the place of the first entry's hash, which is
    /// that of the block itself.
    fn counts(&self, block: &mut [u8; BLOCK], from: usize, most: usize, index: &[(u32, u32)]) {
        for (at, (hash, below)) in index.iter().enumerate() {
            set32(block, from + 8 * at, *hash);
            set32(block, from + 8 * at + 4, *below);
        }
        set16(block, from, most as u16);
        set16(block, from + 2, index.len() as u16);
        let checksum = crc(crc(self.seed, &block[..from + 8 * index.len()]), &[0; 8]);
        set32(block, from + 8 * most + 4, checksum);
    }
}

fn put_entry(block: &mut [u8; BLOCK], at: usize, length: usize, entry: &Entry<'_>) {
    set32(block, at, entry.inode);
    set16(block, at + 4, length as u16);
    block[at + 6] = entry.name.len() as u8;
    block[at + 7] = entry.kind;
    block[at + 8..at + 8 + entry.name.len()].copy_from_slice(entry.name);
}

/// Fills blocks with entries in hash order.
fn leaves(order: &[(u32, u32, u32)], entries: &[Entry<'_>]) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = Vec::new();
    let (mut used, mut before) = (ROOM, None);
    for (at, (hash, _, entry)) in (0_u32..).zip(order) {
        let size = entries[*entry as usize].size();
        if used + size > ROOM {
            // The lowest bit means that names with this hash are also in the previous block.
            let hash = if before == Some(*hash) { hash | 1 } else { *hash };
            leaves.push(Leaf { hash, start: at, end: at });
            used = 0;
        }
        used += size;
        before = Some(*hash);
        if let Some(leaf) = leaves.last_mut() {
            leaf.end = at + 1;
        }
    }
    leaves
}
