//! The superblock of an unmounted ext4 filesystem.
//!
//! Layout: `struct ext4_super_block` of linux/fs/ext4/ext4.h.

use std::os::unix::fs::FileExt;
use std::path::Path;

use fs_err as fs;

use super::Ext4Error;

/// Its offset on the disk.
const AT: u64 = 1024;
const MAGIC: u16 = 0xef53;
/// The offset of its second sector, which is written atomically.
const SECOND_SECTOR: usize = 512;
const OVERHEAD: usize = 0x248;
const CHECKSUM: usize = 0x3fc;

// Features: compatible, incompatible, and read-only compatible.
const HAS_JOURNAL: u32 = 0x4;
const SPARSE_SUPER2: u32 = 0x200;
const JOURNAL_DEVICE: u32 = 0x8;
const META_BG: u32 = 0x10;
const BITS_64: u32 = 0x80;
const SPARSE_SUPER: u32 = 0x1;
const BIGALLOC: u32 = 0x200;
const METADATA_CHECKSUMS: u32 = 0x400;

pub(super) struct Superblock {
    bytes: [u8; 1024],
}

impl Superblock {
    /// Reads it; `None` if the disk has no ext4 filesystem.
    pub(super) fn read(disk: &Path) -> Result<Option<Self>, Ext4Error> {
        let file = fs::File::open(disk).map_err(|e| Ext4Error::io(disk, e))?;
        let mut bytes = [0; 1024];
        match file.file().read_exact_at(&mut bytes, AT) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(Ext4Error::io(disk, error)),
        }
        let superblock = Self { bytes };
        Ok((superblock.half(0x38) == MAGIC).then_some(superblock))
    }

    /// The size of the filesystem in bytes; `None` if its fields are impossible.
    pub(super) fn length(&self) -> Option<u64> {
        self.block_size().map(|size| self.blocks().saturating_mul(size))
    }

    /// Whether it was ever mounted (`s_mtime`).
    pub(super) fn was_mounted(&self) -> bool {
        self.word(0x2c) != 0
    }

    /// Whether it was unmounted cleanly and has no errors (`s_state`).
    pub(super) fn is_clean(&self) -> bool {
        self.half(0x3a) & 3 == 1
    }

    /// The filesystem's label, without trailing zeros.
    pub(super) fn label(&self) -> &[u8] {
        let name = &self.bytes[0x78..0x88];
        &name[..name.iter().position(|byte| *byte == 0).unwrap_or(name.len())]
    }

    /// Writes the overhead (blocks that cannot hold files) to the superblock, which `resize2fs` does not do. Otherwise
    /// Linux would compute it at the first mount and rewrite every copy of the superblock. Does nothing if it is unknown.
    pub(super) fn note_overhead(mut self, disk: &Path) -> Result<(), Ext4Error> {
        let Some(overhead) = self.overhead().filter(|overhead| *overhead != self.word(OVERHEAD)) else {
            return Ok(());
        };
        if self.checksum() != self.word(CHECKSUM) {
            return Ok(());
        }
        self.bytes[OVERHEAD..OVERHEAD + 4].copy_from_slice(&overhead.to_le_bytes());
        let checksum = self.checksum().to_le_bytes();
        self.bytes[CHECKSUM..].copy_from_slice(&checksum);
        let file = fs::OpenOptions::new().write(true).open(disk).map_err(|e| Ext4Error::io(disk, e))?;
        let sector = &self.bytes[SECOND_SECTOR..];
        file.file().write_all_at(sector, AT + SECOND_SECTOR as u64).map_err(|e| Ext4Error::io(disk, e))
    }

    /// The overhead as Linux computes it: `ext4_calculate_overhead` of linux/fs/ext4/super.c, for the layouts that mke2fs
    /// makes today. `None` for others.
    fn overhead(&self) -> Option<u32> {
        let (compatible, incompatible, read_only) = self.features();
        let is_known = compatible & SPARSE_SUPER2 == 0
            && incompatible & (META_BG | JOURNAL_DEVICE) == 0
            && read_only & SPARSE_SUPER != 0
            && read_only & BIGALLOC == 0
            && read_only & METADATA_CHECKSUMS != 0;
        if !is_known {
            return None;
        }
        let block_size = self.block_size()?;
        let (first, per_group) = (u64::from(self.word(0x14)), u64::from(self.word(0x20)));
        let inodes = u64::from(self.word(0x28)) * u64::from(self.half(0x58));
        let descriptor = if incompatible & BITS_64 == 0 { 32 } else { u64::from(self.half(0xfe)) };
        let groups = self.blocks().checked_sub(first)?.div_ceil(non_zero(per_group)?);
        let descriptors = groups.div_ceil(non_zero(block_size.checked_div(descriptor)?)?);
        let reserved = u64::from(self.half(0xce));

        // Each group has two bitmaps and an inode table; some have a copy of the superblock and of the descriptors.
        let each = groups.checked_mul(2 + inodes / block_size)?;
        let copies = copies(groups).checked_mul(descriptors.checked_add(1 + reserved)?)?;
        let journal = if compatible & HAS_JOURNAL == 0 { 0 } else { self.journal()? / block_size };
        let all = [each, copies, journal].into_iter().try_fold(first, u64::checked_add)?;
        u32::try_from(all).ok()
    }

    /// The length of the journal in bytes: the copy of its inode's size (`s_jnl_blocks`).
    fn journal(&self) -> Option<u64> {
        let is_copied = self.bytes[0xfd] == 1;
        is_copied.then(|| u64::from(self.word(0x148)) << 32 | u64::from(self.word(0x14c)))
    }

    /// CRC-32C of everything before the checksum, as ext4 computes it: starting with all ones, and not inverted at the end.
    fn checksum(&self) -> u32 {
        const REVERSED: u32 = 0x82f6_3b78;
        let bit = |sum: u32, _| if sum & 1 == 1 { sum >> 1 ^ REVERSED } else { sum >> 1 };
        let byte = |sum: u32, byte: &u8| (0..8).fold(sum ^ u32::from(*byte), bit);
        self.bytes[..CHECKSUM].iter().fold(u32::MAX, byte)
    }

    fn block_size(&self) -> Option<u64> {
        1024_u64.checked_shl(self.word(0x18)).filter(|size| *size <= 1 << 16)
    }

    fn blocks(&self) -> u64 {
        let high = if self.word(0x60) & BITS_64 == 0 { 0 } else { self.word(0x150) };
        u64::from(high) << 32 | u64::from(self.word(0x04))
    }

    /// Its features: compatible, incompatible, and read-only compatible.
    pub(super) fn features(&self) -> (u32, u32, u32) {
        (self.word(0x5c), self.word(0x60), self.word(0x64))
    }

    /// Whether its journal is on another device (`s_journal_dev`).
    pub(super) fn has_external_journal(&self) -> bool {
        self.word(0x5c) & HAS_JOURNAL != 0 && self.word(0xe4) != 0
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = &self.bytes;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }
}

fn non_zero(number: u64) -> Option<u64> {
    (number != 0).then_some(number)
}

/// How many groups have a copy of the superblock: the first two, and powers of 3, 5 and 7.
fn copies(groups: u64) -> u64 {
    let powers = |of: u64| {
        let all = std::iter::successors(Some(of), move |power: &u64| power.checked_mul(of));
        all.take_while(|power| *power < groups).count() as u64
    };
    groups.min(2) + [3, 5, 7].into_iter().map(powers).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::mounted::{Mounted, run};

    const MIB: u64 = 1 << 20;

    fn made(disk: &Path, mebibytes: u64, options: &[&str]) -> Superblock {
        std::fs::File::create(disk).unwrap().set_len(mebibytes * MIB).unwrap();
        run(std::process::Command::new("/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4"])
            .args(options)
            .arg(disk));
        Superblock::read(disk).unwrap().unwrap()
    }

    #[test]
    fn the_overhead_is_what_mke2fs_counts() {
        let base = tempfile::tempdir().unwrap();
        let disk = base.path().join("disk");
        for (mebibytes, options) in [
            (40, &[][..]),
            (3_000, &[]),
            (30, &["-b", "1024"]),
            (700, &["-O", "^has_journal"]),
            (900, &["-O", "^64bit,^resize_inode"]),
            (8_192, &["-E", "resize=1000000000"]),
        ] {
            let block = made(&disk, mebibytes, options);
            assert_eq!(block.checksum(), block.word(CHECKSUM), "{mebibytes} MiB, {options:?}");
            assert_eq!(block.overhead(), Some(block.word(OVERHEAD)), "{mebibytes} MiB, {options:?}");
        }
        for options in [["-O", "bigalloc"], ["-O", "^metadata_csum"], ["-O", "meta_bg,^resize_inode"]] {
            assert_eq!(made(&disk, 300, &options).overhead(), None, "{options:?}");
        }
    }

    #[test]
    fn linux_agrees_with_the_overhead_of_a_grown_filesystem() {
        let base = tempfile::tempdir().unwrap();
        let disk = base.path().join("disk");
        made(&disk, 40, &[]);
        std::fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(8_192 * MIB).unwrap();
        run(std::process::Command::new("/sbin/resize2fs").arg(&disk));
        let grown = Superblock::read(&disk).unwrap().unwrap();
        grown.note_overhead(&disk).unwrap();
        let noted = Superblock::read(&disk).unwrap().unwrap();
        run(std::process::Command::new("/sbin/e2fsck").arg("-fn").arg(&disk));

        drop(Mounted::writable(&disk));
        let mounted = Superblock::read(&disk).unwrap().unwrap();
        assert!(mounted.was_mounted() && !noted.was_mounted());
        assert_eq!(mounted.word(OVERHEAD), noted.word(OVERHEAD));
    }

    #[test]
    fn copies_are_counted_without_looking_at_each_group() {
        assert_eq!([0, 1, 2, 3, 4, 9, 10, 50, 64].map(copies), [0, 1, 2, 2, 3, 5, 6, 9, 9]);
        assert!(copies(u64::MAX) < 100);
    }

    #[test]
    fn numbers_that_a_guest_made_up_are_no_overhead() {
        let base = tempfile::tempdir().unwrap();
        let mut block = made(&base.path().join("disk"), 40, &[]);
        block.bytes[0x150..0x154].fill(0xff);
        block.bytes[0x20..0x24].copy_from_slice(&1_u32.to_le_bytes());
        assert_eq!(block.overhead(), None);
        // No blocks in a group; descriptors of size zero, or larger than a block; then blocks of an impossible size.
        for (at, length, byte) in [(0x20, 4, 0), (0xfe, 2, 0), (0xfe, 2, 0xff)] {
            let mut block = made(&base.path().join("disk"), 40, &[]);
            block.bytes[at..at + length].fill(byte);
            assert_eq!(block.overhead(), None, "{at:#x} {byte:#x}");
        }
        block.bytes[0x18..0x1c].fill(0xff);
        assert_eq!((block.length(), block.overhead()), (None, None));
    }

    #[test]
    fn a_superblock_that_is_not_understood_is_left_alone() {
        let base = tempfile::tempdir().unwrap();
        let disk = base.path().join("disk");
        let mut block = made(&disk, 40, &[]);
        block.bytes[OVERHEAD] ^= 1;
        let before = std::fs::read(&disk).unwrap();
        block.note_overhead(&disk).unwrap();
        assert!(before == std::fs::read(&disk).unwrap(), "a wrong checksum was made right");
    }

    #[test]
    fn other_content_is_no_ext4() {
        let base = tempfile::tempdir().unwrap();
        let disk = base.path().join("disk");
        for content in [&b"short"[..], &[7; 4096]] {
            std::fs::write(&disk, content).unwrap();
            assert!(Superblock::read(&disk).unwrap().is_none());
        }
    }
}
