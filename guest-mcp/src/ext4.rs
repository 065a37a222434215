//! What a guest needs from ext4: identifying a filesystem, and growing it.
//!
//! Layout of the superblock: Documentation/filesystems/ext4/super.rst of the kernel.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::sys::resize_ext4;

/// The offset of the superblock on its device.
pub(crate) const SUPERBLOCK_AT: u64 = 1024;

/// The fields needed from an ext4 superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    blocks: u64,
    block_size: u64,
    blocks_per_group: u64,
    label: [u8; 16],
}

impl Superblock {
    pub(crate) fn read(device: &File) -> io::Result<Self> {
        let mut bytes = [0; 1024];
        device.read_exact_at(&mut bytes, SUPERBLOCK_AT)?;
        Self::parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no ext4 superblock"))
    }

    /// Returns the UUID of the filesystem; `None` if it is not ext4.
    pub(crate) fn uuid(bytes: &[u8; 1024]) -> Option<[u8; 16]> {
        Self::parse(bytes)?;
        bytes[0x68..0x78].try_into().ok()
    }

    fn parse(bytes: &[u8; 1024]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let magic = u16::from_le_bytes([bytes[0x38], bytes[0x39]]);
        let log_block_size = word(0x18);
        if magic != 0xEF53 || log_block_size > 6 {
            return None;
        }
        // INCOMPAT_64BIT
        let high = if word(0x60) & 0x80 != 0 { u64::from(word(0x150)) } else { 0 };
        Some(Self {
            blocks: high << 32 | u64::from(word(0x4)),
            block_size: 1024 << log_block_size,
            blocks_per_group: u64::from(word(0x20)),
            label: bytes[0x78..0x88].try_into().unwrap_or_default(),
        })
    }

    /// Returns whether the filesystem has this label.
    pub(crate) fn is_labelled(&self, label: &str) -> bool {
        let end = self.label.iter().position(|byte| *byte == 0).unwrap_or(self.label.len());
        &self.label[..end] == label.as_bytes()
    }
}

/// Grows a mounted filesystem to the size of its device.
///
/// Once the reserved group descriptor blocks are used up, the kernel continues with meta_bg.
pub(crate) fn grow(device: &Path, mounted_at: &Path) -> io::Result<()> {
    let mut drive = File::open(device)?;
    let size = drive.seek(SeekFrom::End(0))?;
    let before = Superblock::read(&drive)?;
    let wanted = size / before.block_size;
    // The kernel does not add a last group that is smaller than its own metadata.
    let is_enough = |blocks: u64| blocks.saturating_add(before.blocks_per_group) > wanted;
    if wanted <= before.blocks || (is_enough(before.blocks) && wanted - before.blocks < 1024) {
        return Ok(());
    }
    resize_ext4(File::open(mounted_at)?, wanted)?;
    let after = Superblock::read(&drive)?;
    if is_enough(after.blocks) {
        return Ok(());
    }
    let mib = |blocks: u64| blocks.saturating_mul(before.block_size) >> 20;
    let text = format!("it stays at {} of {} MiB", mib(after.blocks), mib(wanted));
    Err(io::Error::other(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_are_read() {
        let mut bytes = [0; 1024];
        assert_eq!(Superblock::parse(&bytes), None);
        bytes[0x38..0x3a].copy_from_slice(&0xEF53_u16.to_le_bytes());
        bytes[0x4..0x8].copy_from_slice(&65_536_u32.to_le_bytes());
        bytes[0x18] = 2;
        bytes[0x20..0x24].copy_from_slice(&32_768_u32.to_le_bytes());
        bytes[0x78..0x7c].copy_from_slice(b"data");
        let parsed = Superblock {
            blocks: 65_536,
            block_size: 4096,
            blocks_per_group: 32_768,
            label: *b"data\0\0\0\0\0\0\0\0\0\0\0\0",
        };
        assert_eq!(Superblock::parse(&bytes), Some(parsed));
        assert!(parsed.is_labelled("data") && !parsed.is_labelled("dat") && !parsed.is_labelled("data\0"));
        bytes[0x68..0x78].copy_from_slice(&[7; 16]);
        assert_eq!(Superblock::uuid(&bytes), Some([7; 16]));
        assert_eq!(Superblock::uuid(&[0; 1024]), None);
        bytes[0x60] = 0x80;
        bytes[0x150] = 1;
        assert_eq!(Superblock::parse(&bytes).map(|s| s.blocks), Some((1 << 32) + 65_536));
    }
}
