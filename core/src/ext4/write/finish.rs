//! Writes the metadata, after all contents.

use sha2::{Digest, Sha256};

use super::super::Ext4Error;
use super::directory::{Directory, Entry};
use super::extents::{self, Extent, IN_ROOT, Tree};
use super::groups::{self, Used};
use super::inode::{Blocks, FIRST_INODE, Inode, JOURNAL_INODE, LONG_TARGET, RESIZE_INODE, ROOT_INODE};
use super::layout::{INODES_PER_BLOCK, Layout, Needs};
use super::numbers::{self, LOST_AND_FOUND, Numbers};
use super::output::{Output, has_head};
use super::raw::{Seed, crc, set32};
use super::superblock::{self, Facts, Journal};
use super::xattr::{self, Split};
use super::{Attributes, BLOCK, Body, Content, GROUP, INODE, Made, Node, Options, Purpose, Size, Writer};

/// Blocks of the journal, and of the journal in a filesystem smaller than [`SMALL`]. They occupy disk space only once used.
const JOURNAL: u64 = 4_096;
const SMALL_JOURNAL: u64 = 1_024;
/// In blocks.
const SMALL: u64 = 16_384;
/// Blocks that stay free in a writable filesystem.
const SLACK: u64 = 4_096;
/// The minimum number of inodes per group in such a filesystem: one for every 16 KiB, which matters once it has grown.
const INODES: u64 = 8_192;
/// Blocks of `lost+found`: a check needs room in it.
const LOST_AND_FOUND_BLOCKS: usize = 4;
/// Cancellation is checked after this many nodes.
const LOOK: usize = 4_096;

/// The metadata written for the nodes, in the order of their inodes.
#[derive(Default)]
struct Written {
    /// Blocks of extended attributes.
    attributes: Vec<(u32, u64)>,
    /// Blocks of targets that are too long for the inode.
    targets: Vec<(u32, u64)>,
    /// Trees of files with many runs.
    trees: Vec<(u32, Tree)>,
    directories: Vec<WrittenDirectory>,
    lost_and_found: Option<WrittenDirectory>,
}

struct WrittenDirectory {
    blocks: Blocks,
    subdirectories: u32,
    is_indexed: bool,
}

/// Values that all parts need.
struct Common {
    seed: Seed,
    hash_seed: [u32; 4],
    made: u32,
}

impl Writer {
    /// Writes the metadata and completes the filesystem. `nodes` are the nodes by number, the root first; nodes without links
    /// are left out.
    pub(crate) fn finish(mut self, nodes: &[Node], options: &Options<'_>) -> Result<Made, Ext4Error> {
        if options.label.len() > 16 {
            return Err(Ext4Error::Label { label: options.label.to_owned() });
        }
        let numbers = Numbers::of(nodes)?;
        let identity = options.identity.unwrap_or_else(|| self.identity(nodes, &numbers, options));
        let (uuid, hash_seed) = uuid_and_seed(&identity);
        let words = std::array::from_fn(|at| {
            let word = &hash_seed[4 * at..4 * at + 4];
            u32::from_le_bytes([word[0], word[1], word[2], word[3]])
        });
        let common = Common { seed: Seed::of(&uuid), hash_seed: words, made: options.made };

        let contents = self.cursor.next();
        let mut written = Written::default();
        self.put_far(nodes, &numbers, &common, &mut written)?;
        self.put_directories(nodes, &numbers, &common, &mut written)?;
        let journal = self.put_journal(&uuid, options.purpose)?;
        let (index, _) = self.cursor.run(1);

        let needs = Needs {
            size: self.size,
            slack: if options.purpose == Purpose::Drive { SLACK } else { 0 },
            inodes: numbers.last(),
            density: if options.purpose == Purpose::Drive { INODES } else { INODES_PER_BLOCK },
            head: self.head,
        };
        let layout = Layout::find(self.cursor, &needs)?;
        if superblock::descriptor_blocks(layout.groups) >= self.head {
            return Err(Ext4Error::TooLarge { what: "contents that large" });
        }
        let has_reserve = superblock::reserve(&layout) > 0;
        // Allocated last; without a reserve it stays free.
        let end = if has_reserve { index + 1 } else { index };
        let used = self.used(nodes, &layout, contents..end);
        for (start, blocks) in used.gaps(self.head, contents) {
            self.output.clear(start, blocks)?;
        }
        if has_reserve {
            superblock::put_reserve(&layout, index, &mut self.output)?;
        }
        let directories = self.put_inodes(nodes, &numbers, &written, &layout, &common, (journal, index))?;
        let (seed, last) = (common.seed, numbers.last());
        let groups = groups::put(&layout, &used, last, &directories, seed, &mut self.output)?;
        let facts = Facts {
            uuid,
            hash_seed,
            label: options.label,
            made: options.made,
            free_blocks: groups.free_blocks,
            used_inodes: last,
            journal,
        };
        superblock::put_heads(&layout, &facts, &groups.descriptors, &mut self.output)?;
        self.output.finish(layout.blocks)?;
        Ok(Made { uuid, size: layout.blocks * BLOCK as u64 })
    }

    /// A digest of everything that determines the filesystem.
    fn identity(&self, nodes: &[Node], numbers: &Numbers, options: &Options<'_>) -> [u8; 32] {
        let mut digest = Sha256::new_with_prefix(b"nexus ext4 1");
        digest.update(self.digest.clone().finalize());
        digest.update(format!("{:?} {:?} {:?} {}", self.size, options.purpose, options.label, options.made));
        let words = |digest: &mut Sha256, bytes: &[u8]| {
            digest.update((bytes.len() as u32).to_le_bytes());
            digest.update(bytes);
        };
        for (_, id) in numbers.all() {
            let Node { attributes, body, links } = &nodes[id as usize];
            let mut fixed = [0; 30];
            fixed[..2].copy_from_slice(&(body.mode_type() << 12 | attributes.mode).to_le_bytes());
            fixed[2..6].copy_from_slice(&attributes.uid.to_le_bytes());
            fixed[6..10].copy_from_slice(&attributes.gid.to_le_bytes());
            fixed[10..18].copy_from_slice(&attributes.mtime.to_le_bytes());
            fixed[18..22].copy_from_slice(&attributes.mtime_ns.to_le_bytes());
            fixed[22..26].copy_from_slice(&links.to_le_bytes());
            fixed[26..].copy_from_slice(&(attributes.xattrs.iter().count() as u32).to_le_bytes());
            digest.update(fixed);
            for (name, value) in attributes.xattrs.iter() {
                words(&mut digest, name);
                words(&mut digest, value);
            }
            match body {
                Body::Directory(children) => {
                    digest.update((children.len() as u64).to_le_bytes());
                    for (name, child) in children {
                        words(&mut digest, name);
                        digest.update(numbers.inode(child.node).to_le_bytes());
                    }
                }
                Body::File(content) => {
                    digest.update(content.size.to_le_bytes());
                    digest.update(content.count.to_le_bytes());
                    for extent in self.runs(*content) {
                        for number in [extent.logical, extent.length, extent.start] {
                            digest.update(number.to_le_bytes());
                        }
                    }
                }
                Body::Symlink(target) => words(&mut digest, target),
                Body::Device { major, minor, .. } => {
                    digest.update(major.to_le_bytes());
                    digest.update(minor.to_le_bytes());
                }
                Body::Fifo | Body::Socket => {}
            }
        }
        digest.finalize().into()
    }

    /// Writes what does not fit into inodes: attributes, targets, trees.
    fn put_far(
        &mut self,
        nodes: &[Node],
        numbers: &Numbers,
        common: &Common,
        written: &mut Written,
    ) -> Result<(), Ext4Error> {
        for (at, (inode, id)) in numbers.all().enumerate() {
            if at % LOOK == 0 {
                self.output.check()?;
            }
            let Node { attributes, body, .. } = &nodes[id as usize];
            if let Some(mut block) = split(attributes)?.block() {
                let (start, _) = self.cursor.run(1);
                let checksum = crc(crc(common.seed.0, &start.to_le_bytes()), &block);
                set32(&mut block, xattr::CHECKSUM, checksum);
                self.output.put(start, &block)?;
                written.attributes.push((inode, start));
            }
            match body {
                Body::Symlink(target) if target.len() >= LONG_TARGET => {
                    let (start, _) = self.cursor.run(1);
                    self.output.put(start, target)?;
                    written.targets.push((inode, start));
                }
                Body::File(content) if content.count as usize > IN_ROOT => {
                    let tree = self.tree(*content, common.seed.inode(inode))?;
                    written.trees.push((inode, tree));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The tree of a content.
    fn tree(&mut self, content: Content, seed: u32) -> Result<Tree, Ext4Error> {
        let runs = &self.extents[content.first as usize..][..content.count as usize];
        if runs.len() <= IN_ROOT {
            return Ok(Tree { root: extents::flat(runs), blocks: 0 });
        }
        extents::deep(runs, seed, &mut self.cursor, &mut self.output)
    }

    fn put_directories(
        &mut self,
        nodes: &[Node],
        numbers: &Numbers,
        common: &Common,
        written: &mut Written,
    ) -> Result<(), Ext4Error> {
        if !numbers.has_lost_and_found {
            let own = (FIRST_INODE, ROOT_INODE);
            written.lost_and_found = Some(self.put_directory(own, &[], LOST_AND_FOUND_BLOCKS, common)?);
        }
        let mut entries = Vec::new();
        for numbers::Directory { node, parent } in &numbers.directories {
            self.output.check()?;
            let Body::Directory(children) = &nodes[*node as usize].body else { continue };
            entries.clear();
            entries.extend(children.iter().map(|(name, child)| Entry {
                name,
                inode: numbers.inode(child.node),
                kind: nodes[child.node as usize].body.entry_type(),
            }));
            let inode = numbers.inode(*node);
            if inode == ROOT_INODE && !numbers.has_lost_and_found {
                let kind = Body::directory().entry_type();
                entries.push(Entry { name: LOST_AND_FOUND, inode: FIRST_INODE, kind });
            }
            written.directories.push(self.put_directory((inode, *parent), &entries, 1, common)?);
        }
        Ok(())
    }

    fn put_directory(
        &mut self,
        (inode, parent): (u32, u32),
        entries: &[Entry<'_>],
        least: usize,
        common: &Common,
    ) -> Result<WrittenDirectory, Ext4Error> {
        let seed = common.seed.inode(inode);
        let directory = Directory::lay_out((inode, parent), entries, seed, &common.hash_seed, least)?;
        let first = self.extents.len();
        let mut logical = 0;
        directory.write(|block| {
            self.append(first, logical, block)?;
            logical += 1;
            Ok(())
        })?;
        debug_assert_eq!(logical as usize, directory.blocks());
        let count = u64::from(logical);
        // The runs are not known before.
        let content = Content { size: 0, first: first as u32, count: (self.extents.len() - first) as u32 };
        let tree = self.tree(content, seed)?;
        self.extents.truncate(first);
        let subdirectories = entries.iter().filter(|entry| entry.kind == Body::directory().entry_type());
        Ok(WrittenDirectory {
            blocks: Blocks {
                size: count * BLOCK as u64,
                count: count + u64::from(tree.blocks),
                root: Some(tree.root),
                attributes: 0,
            },
            subdirectories: subdirectories.count() as u32,
            is_indexed: directory.is_indexed(),
        })
    }

    /// Allocates the blocks of the journal; only the first is written.
    fn put_journal(&mut self, uuid: &[u8; 16], purpose: Purpose) -> Result<Option<Journal>, Ext4Error> {
        if purpose == Purpose::ReadOnly {
            return Ok(None);
        }
        let size = match self.size {
            Size::AtLeast(bytes) => (bytes / BLOCK as u64).max(self.cursor.next() + JOURNAL + SLACK),
            Size::Exactly(bytes) => bytes / BLOCK as u64,
        };
        let blocks = if size < SMALL { SMALL_JOURNAL } else { JOURNAL };
        let first = self.extents.len();
        let mut logical = 0;
        while logical < blocks {
            let (_, length) = self.allocate(first, logical as u32, blocks - logical)?;
            logical += length;
        }
        let runs = self.extents.split_off(first);
        // The space between two heads is enough for several journals.
        debug_assert!(runs.len() <= IN_ROOT);
        self.output.put(runs[0].start.into(), &superblock::journal(uuid, blocks))?;
        Ok(Some(Journal { blocks, root: extents::flat(&runs) }))
    }

    /// Which blocks are in use: those of contents, and all metadata blocks in `written`.
    fn used(&self, nodes: &[Node], layout: &Layout, written: std::ops::Range<u64>) -> Used {
        let mut used = Used::new(layout.with_content());
        for group in (0..layout.with_content()).filter(|group| has_head(*group)) {
            used.mark(group * GROUP, layout.head);
        }
        for group in 0..layout.with_content() {
            let place = layout.place(group);
            used.mark(place.block_bitmap, 1);
            used.mark(place.inode_bitmap, 1);
            used.mark(place.table, layout.table_blocks);
        }
        for node in nodes.iter().filter(|node| node.links > 0) {
            if let Body::File(content) = &node.body {
                for Extent { start, length, .. } in self.runs(*content) {
                    used.mark((*start).into(), (*length).into());
                }
            }
        }
        used.mark(written.start, written.end - written.start);
        used
    }

    /// Writes the inodes in order; returns the number of directories of each group.
    fn put_inodes(
        &mut self,
        nodes: &[Node],
        numbers: &Numbers,
        written: &Written,
        layout: &Layout,
        common: &Common,
        (journal, index): (Option<Journal>, u64),
    ) -> Result<Vec<u32>, Ext4Error> {
        let mut table =
            Table { layout, seed: common.seed, block: [0; BLOCK], next: 1, directories: Vec::new() };
        let mut directories = written.directories.iter();
        let (mut attributes, mut targets, mut trees) =
            (By::new(&written.attributes), By::new(&written.targets), By::new(&written.trees));
        for (at, (inode, id)) in numbers.all().enumerate() {
            if at % LOOK == 0 {
                self.output.check()?;
            }
            // The filesystem's own inodes come first, and between the root and the others.
            while table.next < inode {
                let own = own_inode(table.next, written, layout, common, (journal, index));
                table.put(own, &mut self.output)?;
            }
            let node = &nodes[id as usize];
            let mut blocks = Blocks::default();
            if let Some(block) = attributes.of(inode) {
                blocks.attributes = *block;
                blocks.count += 1;
            }
            let mut raw = match &node.body {
                Body::Directory(_) => {
                    let Some(directory) = directories.next() else { continue };
                    let mut all = directory.blocks;
                    all.count += blocks.count;
                    all.attributes = blocks.attributes;
                    table.count_directory();
                    directory.inode(&node.attributes, &all)
                }
                body => {
                    match body {
                        Body::File(content) => {
                            let runs = self.runs(*content);
                            let held: u64 = runs.iter().map(|run| u64::from(run.length)).sum();
                            let tree = trees.of(inode).copied();
                            let tree = tree.unwrap_or_else(|| Tree { root: extents::flat(runs), blocks: 0 });
                            blocks.size = content.size;
                            blocks.count += held + u64::from(tree.blocks);
                            blocks.root = Some(tree.root);
                        }
                        Body::Symlink(target) => {
                            blocks.size = target.len() as u64;
                            if let Some(block) = targets.of(inode) {
                                let run = Extent { logical: 0, length: 1, start: *block as u32 };
                                blocks.root = Some(extents::flat(&[run]));
                                blocks.count += 1;
                            }
                        }
                        _ => {}
                    }
                    Inode::new(body, &node.attributes, node.links, &blocks)
                }
            };
            split(&node.attributes)?.put_inside(&mut raw.0);
            table.put(Some(raw), &mut self.output)?;
        }
        while table.next <= numbers.last() {
            let own = own_inode(table.next, written, layout, common, (journal, index));
            table.put(own, &mut self.output)?;
        }
        table.end(&mut self.output)?;
        if written.lost_and_found.is_some() {
            table.count_in(FIRST_INODE);
        }
        Ok(table.directories)
    }
}

impl WrittenDirectory {
    fn inode(&self, attributes: &Attributes, blocks: &Blocks) -> Inode {
        Inode::directory(attributes, self.subdirectories, self.is_indexed, blocks)
    }
}

/// A reserved inode, if it is in use.
fn own_inode(
    number: u32,
    written: &Written,
    layout: &Layout,
    common: &Common,
    (journal, index): (Option<Journal>, u64),
) -> Option<Inode> {
    match number {
        RESIZE_INODE if superblock::reserve(layout) > 0 => {
            let reserve = superblock::reserve(layout);
            // All blocks of the double-indirect tree at its maximum size.
            let in_block = (BLOCK / 4) as u64;
            let size = (in_block * in_block + in_block + 12) * BLOCK as u64;
            let count = 1 + reserve * (1 + layout.copies().count() as u64);
            let blocks = Blocks { size, count, ..Blocks::default() };
            Some(Inode::resize(common.made, index, &blocks))
        }
        JOURNAL_INODE => journal.map(|Journal { blocks, root }| {
            let size = blocks * BLOCK as u64;
            let blocks = Blocks { size, count: blocks, root: Some(root), attributes: 0 };
            Inode::journal(common.made, &blocks)
        }),
        FIRST_INODE => written.lost_and_found.as_ref().map(|directory| {
            directory.inode(&Attributes::root(0o700, common.made.into()), &directory.blocks)
        }),
        _ => None,
    }
}

fn split(attributes: &Attributes) -> Result<Split<'_>, Ext4Error> {
    Split::of(&attributes.xattrs).ok_or(Ext4Error::TooLarge { what: "an entry's extended attributes" })
}

/// The UUID made from a digest (RFC 9562, version 8), and the hash seed.
fn uuid_and_seed(identity: &[u8; 32]) -> ([u8; 16], [u8; 16]) {
    let (mut uuid, mut seed) = ([0; 16], [0; 16]);
    uuid.copy_from_slice(&identity[..16]);
    seed.copy_from_slice(&identity[16..]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    (uuid, seed)
}

/// A value that some inodes have, looked up in the order of inodes.
struct By<'w, T> {
    rest: &'w [(u32, T)],
}

impl<'w, T> By<'w, T> {
    fn new(all: &'w [(u32, T)]) -> Self {
        Self { rest: all }
    }

    fn of(&mut self, inode: u32) -> Option<&'w T> {
        let ((number, value), rest) = self.rest.split_first()?;
        if *number != inode {
            return None;
        }
        self.rest = rest;
        Some(value)
    }
}

/// The inode tables, filled in order.
struct Table<'l> {
    layout: &'l Layout,
    seed: Seed,
    block: [u8; BLOCK],
    /// The number of the next inode.
    next: u32,
    /// How many directories each group has.
    directories: Vec<u32>,
}

impl Table<'_> {
    fn place(&self, number: u32) -> (u64, u64) {
        let at = u64::from(number - 1);
        (at / self.layout.inodes_per_group, at % self.layout.inodes_per_group)
    }

    /// Writes the next inode; an unused one is all zeros.
    fn put(&mut self, inode: Option<Inode>, output: &mut Output) -> Result<(), Ext4Error> {
        let (_, within) = self.place(self.next);
        let at = (within % INODES_PER_BLOCK) as usize * INODE;
        if let Some(inode) = inode {
            self.block[at..at + INODE].copy_from_slice(&inode.finish(self.seed, self.next));
        }
        self.next += 1;
        if at + INODE == BLOCK { self.flush(self.next - 1, output) } else { Ok(()) }
    }

    /// Writes the last block.
    fn end(&mut self, output: &mut Output) -> Result<(), Ext4Error> {
        let last = self.next - 1;
        let is_written = self.place(last).1 % INODES_PER_BLOCK == INODES_PER_BLOCK - 1;
        if is_written { Ok(()) } else { self.flush(last, output) }
    }

    fn flush(&mut self, number: u32, output: &mut Output) -> Result<(), Ext4Error> {
        let (group, within) = self.place(number);
        output.put(self.layout.place(group).table + within / INODES_PER_BLOCK, &self.block)?;
        self.block = [0; BLOCK];
        Ok(())
    }

    fn count_directory(&mut self) {
        self.count_in(self.next);
    }

    fn count_in(&mut self, number: u32) {
        let group = self.place(number).0 as usize;
        self.directories.resize(self.directories.len().max(group + 1), 0);
        self.directories[group] += 1;
    }
}
