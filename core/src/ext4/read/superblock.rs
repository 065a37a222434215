//! What the superblock says about where things are.
//!
//! Layout: `struct ext4_super_block` of linux/fs/ext4/ext4.h.

use super::ReadError;
use super::bytes::{joined, u16_le, u32_le};

/// Its offset in the file, and its length.
pub(super) const AT: u64 = 1024;
pub(super) const LENGTH: usize = 1024;
const MAGIC: u16 = 0xef53;
/// The size of inodes of the first revision, and of the part that all inodes have.
pub(super) const OLD_INODE: usize = 128;
/// More than 512 TiB in groups of 128 MiB.
const GROUPS_MAX: u64 = 1 << 22;

const RECOVER: u32 = 0x4;
const META_BG: u32 = 0x10;
const BITS_64: u32 = 0x80;
const LARGE_DIRECTORIES: u32 = 0x4000;
/// The incompatible features that can be read: filetype, needs_recovery, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode,
/// csum_seed, large_dir, inline_data, casefold.
const READABLE: u32 = 0x2
    | RECOVER
    | META_BG
    | 0x40
    | BITS_64
    | 0x100
    | 0x200
    | 0x400
    | 0x2000
    | LARGE_DIRECTORIES
    | 0x8000
    | 0x2_0000;
const SPARSE_SUPER: u32 = 0x1;
const SPARSE_SUPER2: u32 = 0x200;

/// The places of a filesystem's tables.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    /// The bytes of a block: a power of two from 1 to 64 KiB.
    pub(super) block_size: usize,
    pub(super) blocks: u64,
    pub(super) inodes: u32,
    pub(super) inode_size: usize,
    pub(super) inodes_per_group: u32,
    pub(super) needs_recovery: bool,
    /// The inode of the journal, or 0.
    pub(super) journal: u32,
    pub(super) large_directories: bool,
    first_block: u64,
    blocks_per_group: u64,
    pub(super) descriptor_size: usize,
    first_meta_group: Option<u64>,
    compatible: u32,
    writable: u32,
    backups: [u32; 2],
}

impl Geometry {
    /// Reads the superblock's bytes and checks that its numbers fit one another.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, ReadError> {
        if bytes.len() < LENGTH || u16_le(bytes, 0x38) != MAGIC {
            return Err(ReadError::NoFilesystem);
        }
        let wrong = |what| ReadError::Damaged { what, of: "the superblock".to_owned() };
        let incompatible = u32_le(bytes, 0x60);
        if incompatible & !READABLE != 0 {
            let what = format!("incompatible features {:#x}", incompatible & !READABLE);
            return Err(ReadError::Unsupported { what });
        }
        let block_size = match u32_le(bytes, 0x18) {
            shift @ 0..=6 => 1024_usize << shift,
            _ => return Err(wrong("the block size")),
        };
        let dynamic = u32_le(bytes, 0x4c) > 0;
        let inode_size = if dynamic { usize::from(u16_le(bytes, 0x58)) } else { OLD_INODE };
        if !inode_size.is_power_of_two() || inode_size < OLD_INODE || inode_size > block_size {
            return Err(wrong("the inode size"));
        }
        let wide = incompatible & BITS_64 != 0;
        let descriptor_size = if wide { usize::from(u16_le(bytes, 0xfe)) } else { 32 };
        if !descriptor_size.is_power_of_two()
            || !(32..=1024).contains(&descriptor_size)
            || wide && descriptor_size < 64
        {
            return Err(wrong("the descriptor size"));
        }
        let geometry = Self {
            block_size,
            blocks: joined(u32_le(bytes, 0x4), if wide { u32_le(bytes, 0x150) } else { 0 }),
            inodes: u32_le(bytes, 0),
            inode_size,
            inodes_per_group: u32_le(bytes, 0x28),
            needs_recovery: incompatible & RECOVER != 0,
            journal: u32_le(bytes, 0xe0),
            large_directories: incompatible & LARGE_DIRECTORIES != 0,
            first_block: u64::from(u32_le(bytes, 0x14)),
            blocks_per_group: u64::from(u32_le(bytes, 0x20)),
            descriptor_size,
            first_meta_group: (incompatible & META_BG != 0).then(|| u64::from(u32_le(bytes, 0x104))),
            compatible: u32_le(bytes, 0x5c),
            writable: u32_le(bytes, 0x64),
            backups: [u32_le(bytes, 0x24c), u32_le(bytes, 0x250)],
        };
        if geometry.blocks_per_group == 0 || geometry.inodes_per_group == 0 {
            return Err(wrong("the size of groups"));
        }
        if geometry.first_block >= geometry.blocks || geometry.first_block > 1 || geometry.blocks > 1 << 48 {
            return Err(wrong("the number of blocks"));
        }
        if geometry.groups() > GROUPS_MAX {
            return Err(ReadError::TooLarge { what: format!("more than {GROUPS_MAX} groups") });
        }
        if u64::from(geometry.inodes) > geometry.groups() * u64::from(geometry.inodes_per_group) {
            return Err(wrong("the number of inodes"));
        }
        Ok(geometry)
    }

    fn groups(&self) -> u64 {
        (self.blocks - self.first_block).div_ceil(self.blocks_per_group)
    }

    /// The byte in the file where the descriptor of a group is.
    pub(super) fn descriptor(&self, group: u64) -> u64 {
        let (size, block_size) = (as_u64(self.descriptor_size), as_u64(self.block_size));
        let per_block = block_size / size;
        let (nth, within) = (group / per_block, group % per_block);
        let block = match self.first_meta_group {
            Some(first) if nth >= first => {
                let group = nth * per_block;
                let start = self.first_block + group * self.blocks_per_group;
                // A filesystem of 1 KiB blocks that begins at block 0 has the superblock in block 1.
                let shifted = block_size == 1024 && nth == 0 && self.first_block == 0;
                start + u64::from(self.has_superblock(group)) + u64::from(shifted)
            }
            _ => AT / block_size + 1 + nth,
        };
        block * block_size + within * size
    }

    fn has_superblock(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compatible & SPARSE_SUPER2 != 0 {
            return self.backups.iter().any(|backup| u64::from(*backup) == group);
        }
        let power = |of: u64| {
            let mut left = group;
            while left.is_multiple_of(of) {
                left /= of;
            }
            left == 1
        };
        self.writable & SPARSE_SUPER == 0 || group == 1 || power(3) || power(5) || power(7)
    }
}

/// A size in memory as a number in the file.
pub(super) fn as_u64(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}
