//! Numbers in structures. What is past the end of the bytes reads as 0, and whoever reads a structure checks its length.

pub(super) fn u16_le(bytes: &[u8], at: usize) -> u16 {
    part(bytes, at).map_or(0, u16::from_le_bytes)
}

pub(super) fn u32_le(bytes: &[u8], at: usize) -> u32 {
    part(bytes, at).map_or(0, u32::from_le_bytes)
}

pub(super) fn u16_be(bytes: &[u8], at: usize) -> u16 {
    part(bytes, at).map_or(0, u16::from_be_bytes)
}

pub(super) fn u32_be(bytes: &[u8], at: usize) -> u32 {
    part(bytes, at).map_or(0, u32::from_be_bytes)
}

/// Two halves of a number.
pub(super) fn joined(low: u32, high: u32) -> u64 {
    (u64::from(high) << 32) | u64::from(low)
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}
