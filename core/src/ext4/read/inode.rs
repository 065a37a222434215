//! Inodes.
//!
//! Layout: `struct ext4_inode` of linux/fs/ext4/ext4.h.

use super::bytes::{joined, u16_le, u32_le};
use super::superblock::{OLD_INODE, as_u64};
use super::{Filesystem, ReadError};

pub(super) const ROOT: u32 = 2;
pub(super) const HAS_EXTENTS: u32 = 0x8_0000;
pub(super) const IS_INLINE: u32 = 0x1000_0000;
pub(super) const IS_ENCRYPTED: u32 = 0x800;
/// The bytes in an inode for the places of its blocks.
pub(super) const PLACES: usize = 60;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// Something that Linux does not know.
    Other,
}

/// A file's attributes.
#[derive(Debug, Clone)]
pub(crate) struct Inode {
    /// Its number.
    pub(crate) number: u32,
    /// Its type and permissions (`st_mode`).
    pub(crate) mode: u16,
    /// Its owner.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
    /// The bytes of its content, or of its link's target.
    pub(crate) size: u64,
    /// How many names it has.
    pub(crate) links: u16,
    /// When its content changed: seconds since 1970 and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// When its content or attributes changed: seconds since 1970 and nanoseconds.
    pub(crate) ctime: (i64, u32),
    /// Another one for each file that had this number.
    pub(crate) generation: u32,
    /// The major and minor number of a device.
    pub(crate) device: Option<(u32, u32)>,
    pub(super) flags: u32,
    /// The block of extended attributes, or 0.
    pub(super) xattr_block: u64,
    /// The places of its blocks, or the first bytes of its content.
    pub(super) places: [u8; PLACES],
    /// What follows the fields of the inode: its own extended attributes.
    pub(super) rest: Box<[u8]>,
}

impl Inode {
    /// What it is.
    pub(crate) fn kind(&self) -> Kind {
        match self.mode & 0o170_000 {
            0o100_000 => Kind::File,
            0o040_000 => Kind::Directory,
            0o120_000 => Kind::Symlink,
            0o020_000 => Kind::CharDevice,
            0o060_000 => Kind::BlockDevice,
            0o010_000 => Kind::Fifo,
            0o140_000 => Kind::Socket,
            _ => Kind::Other,
        }
    }

    fn read(number: u32, bytes: &[u8], has_large_directories: bool) -> Self {
        let extra = if bytes.len() > OLD_INODE { usize::from(u16_le(bytes, 0x80)) } else { 0 };
        // A field past the inode's own end is none.
        let field = |at: usize| if at + 4 <= OLD_INODE + extra { u32_le(bytes, at) } else { 0 };
        let time = |seconds: usize, extra: usize| {
            let (seconds, extra) = (u32_le(bytes, seconds).cast_signed(), field(extra));
            (i64::from(seconds) + (i64::from(extra & 3) << 32), (extra >> 2).min(999_999_999))
        };
        let halves =
            |low: usize, high: usize| (u32::from(u16_le(bytes, high)) << 16) | u32::from(u16_le(bytes, low));
        let mut inode = Self {
            number,
            mode: u16_le(bytes, 0),
            uid: halves(0x2, 0x78),
            gid: halves(0x18, 0x7a),
            size: u64::from(u32_le(bytes, 0x4)),
            links: u16_le(bytes, 0x1a),
            mtime: time(0x10, 0x88),
            ctime: time(0xc, 0x84),
            generation: u32_le(bytes, 0x64),
            device: None,
            flags: u32_le(bytes, 0x20),
            xattr_block: joined(u32_le(bytes, 0x68), u32::from(u16_le(bytes, 0x76))),
            places: bytes
                .get(0x28..0x28 + PLACES)
                .and_then(|part| part.try_into().ok())
                .unwrap_or([0; PLACES]),
            rest: bytes.get(OLD_INODE + extra..).unwrap_or_default().into(),
        };
        let kind = inode.kind();
        if kind == Kind::File || kind == Kind::Directory && has_large_directories {
            inode.size = joined(u32_le(bytes, 0x4), u32_le(bytes, 0x6c));
        }
        if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            inode.device = Some(match (u32_le(&inode.places, 0), u32_le(&inode.places, 4)) {
                (0, new) => ((new & 0xf_ff00) >> 8, (new & 0xff) | ((new >> 12) & 0xf_ff00)),
                (old, _) => ((old >> 8) & 0xff, old & 0xff),
            });
        }
        inode
    }
}

impl Filesystem {
    /// The attributes of an inode, whether it is in use or not.
    pub(crate) fn inode(&self, number: u32) -> Result<Inode, ReadError> {
        let geometry = &self.geometry;
        let index = match number.checked_sub(1) {
            Some(index) if number <= geometry.inodes => index,
            _ => return Err(ReadError::inode("the number", number)),
        };
        let group = u64::from(index / geometry.inodes_per_group);
        let nth = u64::from(index % geometry.inodes_per_group);
        let descriptor = self.disk.table(geometry.descriptor(group), geometry.descriptor_size)?;
        let table = joined(u32_le(&descriptor, 0x8), u32_le(&descriptor, 0x28));
        let block_size = as_u64(geometry.block_size);
        let offset = nth * as_u64(geometry.inode_size);
        if !self.disk.has(table, offset / block_size + 1) {
            return Err(ReadError::inode("the table's place", number));
        }
        let bytes = self.disk.table(table * block_size + offset, geometry.inode_size)?;
        Ok(Inode::read(number, &bytes, geometry.large_directories))
    }
}
