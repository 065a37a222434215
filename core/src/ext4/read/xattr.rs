//! Extended attributes: in the inode, in a block of their own, and large values in inodes of their own.
//!
//! Layout: linux/fs/ext4/xattr.h.

use super::bytes::{u16_le, u32_le};
use super::inode::ROOT;
use super::{Filesystem, Inode, ReadError};

const MAGIC: u32 = 0xea02_0000;
/// The header of a block; an inode has only the magic number.
const BLOCK_HEADER: usize = 32;
const INODE_HEADER: usize = 4;
/// The longest value in Linux, and the most attributes that are read of a file.
const VALUE_MAX: usize = 64 << 10;
const COUNT_MAX: usize = 4_096;
/// How many bytes the values of one file's attributes have together: they may be the same bytes of the filesystem many times.
const VALUES_MAX: usize = 1 << 20;
/// The kind of `system.` attributes, one of which is the rest of a content in an inode.
const SYSTEM: u8 = 7;
const REST: &[u8] = b"data";

/// An attribute as it is kept.
struct Kept<'a> {
    kind: u8,
    name: &'a [u8],
    /// The value, or the inode that has it and its length.
    value: Result<&'a [u8], (u32, usize)>,
}

/// Extended attributes: full names, such as `user.x`, and values.
pub(crate) type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

impl Filesystem {
    /// The extended attributes by their full names; access control lists have the form in which programs get them.
    pub(crate) fn xattrs(&self, inode: &Inode) -> Result<Attributes, ReadError> {
        let block = match inode.xattr_block {
            0 => Vec::new(),
            number => self.disk.block(number)?,
        };
        let wrong = || ReadError::inode("an extended attribute", inode.number);
        if !block.is_empty() && u32_le(&block, 0) != MAGIC {
            return Err(wrong());
        }
        let mut all = kept(own(inode), INODE_HEADER, INODE_HEADER).ok_or_else(wrong)?;
        all.extend(kept(&block, BLOCK_HEADER, 0).ok_or_else(wrong)?);
        if all.len() > COUNT_MAX {
            return Err(ReadError::TooLarge { what: format!("more than {COUNT_MAX} attributes of a file") });
        }
        let length = |kept: &Kept<'_>| kept.value.map_or_else(|(_, length)| length, <[u8]>::len);
        if all.iter().map(length).fold(0, usize::saturating_add) > VALUES_MAX {
            return Err(ReadError::TooLarge {
                what: format!("more than {VALUES_MAX} bytes of attributes of a file"),
            });
        }
        let mut found = Vec::new();
        for kept in all {
            if kept.kind == SYSTEM && kept.name == REST {
                continue;
            }
            let prefix: &[u8] = match kept.kind {
                0 => b"",
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                4 => b"trusted.",
                6 => b"security.",
                SYSTEM => b"system.",
                8 => b"system.richacl",
                _ => return Err(wrong()),
            };
            let value = match kept.value {
                Ok(value) => value.to_vec(),
                Err((number, length)) => self.long_value(number, length)?.ok_or_else(wrong)?,
            };
            let value = if matches!(kept.kind, 2 | 3) { long_acl(&value).ok_or_else(wrong)? } else { value };
            found.push(([prefix, kept.name].concat(), value));
        }
        Ok(found)
    }

    /// The rest of a content that is in the inode.
    pub(super) fn inline_rest(&self, inode: &Inode) -> Result<Option<Vec<u8>>, ReadError> {
        let all = kept(own(inode), INODE_HEADER, INODE_HEADER)
            .ok_or_else(|| ReadError::inode("an extended attribute", inode.number))?;
        let rest = all.into_iter().find(|kept| kept.kind == SYSTEM && kept.name == REST);
        Ok(rest.and_then(|rest| rest.value.ok().map(<[u8]>::to_vec)))
    }

    fn long_value(&self, number: u32, length: usize) -> Result<Option<Vec<u8>>, ReadError> {
        if length > VALUE_MAX || number <= ROOT {
            return Ok(None);
        }
        let mut value = vec![0; length];
        let count = self.read(&self.inode(number)?, 0, &mut value)?;
        Ok((count == length).then_some(value))
    }
}

/// The part of an inode with its attributes; empty if it has none.
fn own(inode: &Inode) -> &[u8] {
    if u32_le(&inode.rest, 0) == MAGIC { &inode.rest } else { &[] }
}

/// The attributes of an area whose entries begin at `first`, and whose values' offsets are counted from `base`. `None` if it
/// is damaged.
fn kept(area: &[u8], first: usize, base: usize) -> Option<Vec<Kept<'_>>> {
    let mut found = Vec::new();
    let mut rest = area.get(first..).unwrap_or_default();
    while rest.len() >= 4 && u32_le(rest, 0) != 0 {
        let (length, kind) = (usize::from(*rest.first()?), *rest.get(1)?);
        let name = rest.get(16..16 + length)?;
        let (offset, inode) = (usize::from(u16_le(rest, 2)), u32_le(rest, 4));
        let size = usize::try_from(u32_le(rest, 8)).ok()?;
        let value = if inode == 0 && size > 0 {
            let start = base + offset;
            Ok(area.get(start..start.checked_add(size)?)?)
        } else if inode == 0 {
            Ok(&[][..])
        } else {
            Err((inode, size))
        };
        found.push(Kept { kind, name, value });
        rest = rest.get((16 + length).next_multiple_of(4)..)?;
    }
    Some(found)
}

/// An access control list as programs see it: every entry has an id.
fn long_acl(kept: &[u8]) -> Option<Vec<u8>> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    let mut rest = kept.strip_prefix(&1_u32.to_le_bytes())?;
    while !rest.is_empty() {
        // The tag and the permissions; only those for one user or one group name it.
        let (entry, after) = rest.split_at_checked(4)?;
        acl.extend(entry);
        let is_of_one = matches!(u16_le(entry, 0), 2 | 8);
        let (id, after) = if is_of_one { after.split_at_checked(4)? } else { (&[0xff; 4][..], after) };
        acl.extend(id);
        rest = after;
    }
    Some(acl)
}
