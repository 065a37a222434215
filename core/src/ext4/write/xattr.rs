//! Extended attributes: which ones ext4 can store, and how.
//!
//! A node's attributes are in the rest of its inode and in one separate block. Source: linux/fs/ext4/xattr.h, and acl.h for
//! access control lists, whose on-disk form is shorter than in system calls and archives.

use super::node::{Body, Xattrs};
use super::raw::{set16, set32};
use super::{BLOCK, INODE};

const MAGIC: u32 = 0xea02_0000;
/// Bytes of an entry before its name.
const ENTRY: usize = 16;
/// Bytes of the zeros after the last entry.
const END: usize = 4;
/// Where the attributes in an inode begin: after its 128 old and 32 new bytes.
pub(super) const IN_INODE: usize = 160;
/// Bytes before the first entry, in an inode and in a block.
const INODE_HEADER: usize = 4;
const BLOCK_HEADER: usize = 32;
/// Bytes of entries and values, in an inode and in a block.
const INODE_ROOM: usize = INODE - IN_INODE - INODE_HEADER - END;
const BLOCK_ROOM: usize = BLOCK - BLOCK_HEADER - END;

/// The supported namespaces with their numbers (`EXT4_XATTR_INDEX_*`).
const USER: (&[u8], u8) = (b"user.", 1);
const TRUSTED: (&[u8], u8) = (b"trusted.", 4);
const SECURITY: (&[u8], u8) = (b"security.", 6);
const ACL: (&[u8], u8) = (b"system.posix_acl_access", 2);
const DEFAULT_ACL: (&[u8], u8) = (b"system.posix_acl_default", 3);

/// Whether Linux on ext4 would allow root to set such an attribute on this kind of node with `setxattr`.
pub(crate) fn is_kept(body: &Body, name: &[u8]) -> bool {
    match index_of(name) {
        Some((1, _)) => matches!(body, Body::File(_) | Body::Directory(_)),
        Some((2, _)) => !matches!(body, Body::Symlink(_)),
        Some((3, _)) => matches!(body, Body::Directory(_)),
        found => found.is_some(),
    }
}

/// Checks the attributes to be stored; the error says what is wrong.
pub(crate) fn check(xattrs: &Xattrs) -> Result<(), &'static str> {
    for (name, value) in xattrs.iter() {
        if name.len() > 255 || name.contains(&0) {
            return Err("an attribute's name is too long or has a zero byte");
        }
        match index_of(name) {
            None => return Err("an attribute is of an unknown namespace"),
            Some((2 | 3, _)) if short_acl(value).is_none() => {
                return Err("its access control list is invalid");
            }
            Some(_) => {}
        }
    }
    match Split::of(xattrs) {
        Some(_) => Ok(()),
        None => Err("its extended attributes do not fit in a block"),
    }
}

/// A namespace's number, and the rest of the name.
fn index_of(name: &[u8]) -> Option<(u8, &[u8])> {
    let within = [USER, TRUSTED, SECURITY].into_iter().find_map(|(prefix, index)| {
        let rest = name.strip_prefix(prefix).filter(|rest| !rest.is_empty())?;
        Some((index, rest))
    });
    let exactly = || [ACL, DEFAULT_ACL].into_iter().find(|(whole, _)| *whole == name);
    within.or_else(|| exactly().map(|(_, index)| (index, &b""[..])))
}

/// The on-disk form of an access control list: version 1 instead of 2, and ids only where they are meaningful.
fn short_acl(value: &[u8]) -> Option<Vec<u8>> {
    const USER_ID: u16 = 0x02;
    const GROUP_ID: u16 = 0x08;
    const TAGS: [u16; 6] = [0x01, USER_ID, 0x04, GROUP_ID, 0x10, 0x20];
    let entries = value.strip_prefix(&2_u32.to_le_bytes())?;
    if entries.is_empty() || entries.len() % 8 != 0 {
        return None;
    }
    let mut short = 1_u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let permissions = u16::from_le_bytes([entry[2], entry[3]]);
        if !TAGS.contains(&tag) || permissions > 7 {
            return None;
        }
        short.extend_from_slice(&entry[..4]);
        if tag == USER_ID || tag == GROUP_ID {
            short.extend_from_slice(&entry[4..]);
        }
    }
    Some(short)
}

/// An attribute in its on-disk form.
struct Entry<'x> {
    index: u8,
    name: &'x [u8],
    value: std::borrow::Cow<'x, [u8]>,
}

impl Entry<'_> {
    fn size(&self) -> usize {
        ENTRY + self.name.len().next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }
}

/// Which attributes are in the inode and which in the block.
pub(super) struct Split<'x> {
    inside: Vec<Entry<'x>>,
    beside: Vec<Entry<'x>>,
}

impl<'x> Split<'x> {
    /// Fills the inode as well as possible, so that anything that can fit does fit; `None` if it cannot.
    pub(super) fn of(xattrs: &'x Xattrs) -> Option<Self> {
        let mut entries = Vec::new();
        for (name, value) in xattrs.iter() {
            let (index, name) = index_of(name)?;
            let value = match index {
                2 | 3 => short_acl(value)?.into(),
                _ => value.as_slice().into(),
            };
            entries.push(Entry { index, name, value });
        }
        // Lookups in a block rely on this order.
        entries.sort_by(|a, b| (a.index, a.name.len(), a.name).cmp(&(b.index, b.name.len(), b.name)));
        let chosen = fullest(entries.iter().map(Entry::size), INODE_ROOM);
        let mut split = Self { inside: Vec::new(), beside: Vec::new() };
        for (entry, is_inside) in entries.into_iter().zip(chosen) {
            if is_inside { split.inside.push(entry) } else { split.beside.push(entry) }
        }
        let beside: usize = split.beside.iter().map(Entry::size).sum();
        (beside <= BLOCK_ROOM).then_some(split)
    }

    /// Writes those in the inode.
    pub(super) fn put_inside(&self, inode: &mut [u8; INODE]) {
        if self.inside.is_empty() {
            return;
        }
        let area = &mut inode[IN_INODE..];
        set32(area, 0, MAGIC);
        // Offsets of values are relative to the first entry.
        put(&mut area[INODE_HEADER..], 0, &self.inside, false);
    }

    /// The block with the others, if any. Its checksum depends on its position on disk and goes to [`CHECKSUM`].
    pub(super) fn block(&self) -> Option<[u8; BLOCK]> {
        if self.beside.is_empty() {
            return None;
        }
        let mut block = [0; BLOCK];
        let hash = put(&mut block, BLOCK_HEADER, &self.beside, true);
        set32(&mut block, 0, MAGIC);
        // The number of nodes that use it, and its number of blocks.
        set32(&mut block, 4, 1);
        set32(&mut block, 8, 1);
        set32(&mut block, 12, hash);
        Some(block)
    }
}

/// Where a block of attributes has its checksum (`h_checksum`).
pub(super) const CHECKSUM: usize = 16;

/// Writes entries from `first` on, and their values backwards from the end of `area`; returns the hash of all.
fn put(area: &mut [u8], first: usize, entries: &[Entry<'_>], is_hashed: bool) -> u32 {
    let (mut at, mut end, mut all) = (first, area.len(), 0_u32);
    for Entry { index, name, value } in entries {
        let padded = value.len().next_multiple_of(4);
        end -= padded;
        area[end..end + value.len()].copy_from_slice(value);
        area[at] = name.len() as u8;
        area[at + 1] = *index;
        set16(area, at + 2, if value.is_empty() { 0 } else { end as u16 });
        set32(area, at + 8, value.len() as u32);
        area[at + ENTRY..at + ENTRY + name.len()].copy_from_slice(name);
        if is_hashed {
            let hash = hash(name, &area[end..end + padded]);
            set32(area, at + 12, hash);
            all = all.rotate_left(16) ^ hash;
        }
        at += ENTRY + name.len().next_multiple_of(4);
    }
    all
}

/// The hash of one entry (`ext4_xattr_hash_entry`).
fn hash(name: &[u8], padded: &[u8]) -> u32 {
    let name = name.iter().fold(0_u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
    padded.chunks_exact(4).fold(name, |hash, word| {
        hash.rotate_left(16) ^ u32::from_le_bytes([word[0], word[1], word[2], word[3]])
    })
}

/// Chooses the sizes, all multiples of 4, that fill `room` best.
fn fullest(sizes: impl Iterator<Item = usize>, room: usize) -> Vec<bool> {
    // Whether each sum can be reached with the first sizes: with the last of them, or without it.
    let mut ways: Vec<Vec<Option<bool>>> = vec![vec![None; room + 1]];
    ways[0][0] = Some(false);
    let sizes: Vec<usize> = sizes.collect();
    for (at, size) in sizes.iter().enumerate() {
        let before = &ways[at];
        let row = (0..=room).map(|sum| match before[sum] {
            Some(_) => Some(false),
            None => sum.checked_sub(*size).and_then(|rest| before[rest]).map(|_| true),
        });
        let row = row.collect();
        ways.push(row);
    }
    let mut sum = (0..=room).rev().find(|sum| ways[sizes.len()][*sum].is_some()).unwrap_or(0);
    let mut chosen = vec![false; sizes.len()];
    for at in (0..sizes.len()).rev() {
        if ways[at + 1][sum] == Some(true) {
            chosen[at] = true;
            sum -= sizes[at];
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattrs(all: &[(&str, usize)]) -> Xattrs {
        let all = all.iter().map(|(name, length)| (name.as_bytes().to_vec(), vec![7; *length]));
        Xattrs::from(all.collect::<std::collections::BTreeMap<_, _>>())
    }

    #[test]
    fn whatever_fits_in_any_way_is_kept() {
        // 16 bytes, the name and the value: 88 in the inode, 4,060 in the block.
        let sizes = |all: &Xattrs| Split::of(all).map(|s| (s.inside.len(), s.beside.len()));
        assert_eq!((INODE_ROOM, BLOCK_ROOM), (88, 4_060));
        assert_eq!(sizes(&xattrs(&[("user.a", 68)])), Some((1, 0)));
        assert_eq!(sizes(&xattrs(&[("user.a", 69)])), Some((0, 1)));
        assert_eq!(sizes(&xattrs(&[("user.a", 4_040)])), Some((0, 1)));
        assert_eq!(sizes(&xattrs(&[("user.a", 4_041)])), None);
        assert_eq!(sizes(&xattrs(&[("user.a", 4_000), ("user.b", 60), ("user.c", 4)])), Some((1, 2)));
        // Starting with the smallest would leave too much for the block.
        assert_eq!(sizes(&xattrs(&[("user.a", 4_000), ("user.b", 44), ("user.c", 68)])), None);
        assert_eq!(sizes(&xattrs(&[("user.a", 3_976), ("user.b", 44), ("user.c", 68)])), Some((1, 2)));
    }

    #[test]
    fn access_control_lists_take_the_form_of_the_disk() {
        let long = |entries: &[(u16, u16, u32)]| {
            let mut bytes = vec![2, 0, 0, 0];
            for (tag, permissions, id) in entries {
                bytes.extend(tag.to_le_bytes());
                bytes.extend(permissions.to_le_bytes());
                bytes.extend(id.to_le_bytes());
            }
            bytes
        };
        let acl =
            long(&[(1, 6, u32::MAX), (2, 4, 1_000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)]);
        let expected =
            [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 16, 0, 4, 0, 32, 0, 4, 0];
        assert_eq!(short_acl(&acl).unwrap(), expected);
        for bad in [&[][..], &[2, 0, 0, 0], &acl[..11], &long(&[(3, 6, 0)]), &long(&[(1, 8, 0)]), &expected] {
            assert!(short_acl(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn what_linux_would_not_keep_is_told() {
        let file = Body::File(Default::default());
        let (directory, link) = (Body::directory(), Body::Symlink((*b"x").into()));
        for (name, on_file, on_directory, on_link) in [
            ("user.a", true, true, false),
            ("user.", false, false, false),
            ("trusted.a", true, true, true),
            ("security.capability", true, true, true),
            ("system.posix_acl_access", true, true, false),
            ("system.posix_acl_default", false, true, false),
            ("system.nfs4_acl", false, false, false),
            ("com.apple.provenance", false, false, false),
        ] {
            let kept = [&file, &directory, &link].map(|body| is_kept(body, name.as_bytes()));
            assert_eq!(kept, [on_file, on_directory, on_link], "{name}");
        }
    }
}
