//! Numbers in blocks, and ext4's checksums.

use super::BLOCK;

/// A block of zeros.
pub(super) static ZEROS: [u8; BLOCK] = [0; BLOCK];

pub(super) fn set16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(super) fn set32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The journal's numbers are big-endian.
pub(super) fn set32_be(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// A 32-bit number in two separate halves.
pub(super) fn set_halves(bytes: &mut [u8], low: usize, high: usize, value: u32) {
    set16(bytes, low, value as u16);
    set16(bytes, high, (value >> 16) as u16);
}

/// A 64-bit number in two separate halves.
pub(super) fn set_words(bytes: &mut [u8], low: usize, high: usize, value: u64) {
    set32(bytes, low, value as u32);
    set32(bytes, high, (value >> 32) as u32);
}

/// CRC-32C as ext4 computes it: starting with a seed, and not inverted at the end.
pub(super) fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// The initial value of a filesystem's checksums.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seed(pub(super) u32);

impl Seed {
    pub(super) fn of(uuid: &[u8; 16]) -> Self {
        Self(crc(!0, uuid))
    }

    /// The initial value of the checksums of an inode's own blocks; all generations are 0.
    pub(super) fn inode(self, inode: u32) -> u32 {
        crc(crc(self.0, &inode.to_le_bytes()), &[0; 4])
    }
}
