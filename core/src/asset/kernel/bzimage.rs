//! Kernel images: parses a bzImage, and checks whether an ELF file is a kernel.
//!
//! Source of the formats: the kernel's `Documentation/arch/x86/boot.rst` and `Documentation/arch/arm64/booting.rst` (header fields, offsets
//! from the file's start), and the ELF specification (gABI).

use std::io::Read;

use nexus_schema::Arch;

use crate::asset::error::KernelProblem;
use crate::asset::stream::{Compression, capped, decompressed};

/// The most that a kernel image may have, packed or not.
pub(crate) const MAX_KERNEL: u64 = 1 << 30;

/// A parsed bzImage header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BzImage<'a> {
    /// The version that it names, such as `6.1.0-40-cloud-amd64`.
    pub(crate) version: Option<String>,
    payload: &'a [u8],
    compression: Compression,
    /// How many bytes it unpacks to.
    unpacked: u64,
}

/// The kind of a file, by its first bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Image<'a> {
    Elf,
    BzImage(BzImage<'a>),
    /// What VMMs boot on arm64: the kernel as it is in memory, with a header.
    Arm64,
}

/// Looks at a kernel file.
pub(crate) fn examine(file: &[u8]) -> Result<Image<'_>, KernelProblem> {
    if file.starts_with(b"\x7fELF") {
        return Ok(Image::Elf);
    }
    if file.get(0x202..0x206) == Some(b"HdrS") && file.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) {
        return bz_image(file).map(Image::BzImage);
    }
    if file.get(0x38..0x3c) == Some(b"ARM\x64") {
        return arm64(file).map(|()| Image::Arm64);
    }
    Err(KernelProblem::UnknownFormat)
}

/// The length of the header of an arm64 image, in bytes.
const ARM64_HEADER: usize = 64;

/// Checks the header of an arm64 image.
fn arm64(file: &[u8]) -> Result<(), KernelProblem> {
    let bad = KernelProblem::Malformed;
    let u64_at = |at: usize| Some(u64::from_le_bytes(*file.get(at..)?.first_chunk()?));
    let (size, flags) = u64_at(0x10).zip(u64_at(0x18)).ok_or(bad("it ends too early"))?;
    if file.len() < ARM64_HEADER {
        return Err(bad("it ends too early"));
    }
    if flags & 1 != 0 {
        return Err(bad("it is big-endian"));
    }
    // The memory that it takes is at least the file.
    if size < file.len() as u64 {
        return Err(bad("its header says a size that is smaller than the file"));
    }
    Ok(())
}

fn bz_image(file: &[u8]) -> Result<BzImage<'_>, KernelProblem> {
    let bad = KernelProblem::Malformed;
    let u32_at = |at: usize| Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?));
    let u16_at = |at: usize| Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?));
    if u16_at(0x206).is_none_or(|version| version < 0x208) {
        return Err(bad("its boot protocol is older than 2.08"));
    }
    // 0 means 4, for historical reasons.
    let sectors = match file.get(0x1f1) {
        Some(0) | None => 4,
        Some(n) => usize::from(*n),
    };
    let offset = u32_at(0x248).ok_or(bad("it ends too early"))? as usize;
    let length = u32_at(0x24c).ok_or(bad("it ends too early"))? as usize;
    let start = (sectors + 1) * 512 + offset;
    let payload = start
        .checked_add(length)
        .and_then(|end| file.get(start..end))
        .ok_or(bad("its payload is not inside the file"))?;
    let version = u16_at(0x20e).filter(|at| *at != 0).and_then(|at| {
        let text = file.get(usize::from(at) + 0x200..)?;
        let text = &text[..text.len().min(256)];
        let word = text.split(|b| *b == 0 || *b == b' ').next()?;
        let word = std::str::from_utf8(word).ok()?;
        super::is_version(word).then(|| word.to_owned())
    });
    if payload.starts_with(b"\x7fELF") {
        let unpacked = payload.len() as u64;
        return Ok(BzImage { version, payload, compression: Compression::Plain, unpacked });
    }
    let compression = Compression::of_magic(payload).ok_or(KernelProblem::Compression(match payload {
        [b'B', b'Z', b'h', ..] => "bzip2",
        [0x5d, 0, 0, ..] => "lzma",
        [0x89, b'L', b'Z', b'O', ..] => "lzo",
        _ => "something unknown",
    }))?;
    // The last four bytes are the unpacked size. In gzip they are part of the format; in the other formats they are appended.
    let (packed, size) = payload.split_last_chunk::<4>().ok_or(bad("its payload is too short"))?;
    let payload = if compression == Compression::Gzip { payload } else { packed };
    Ok(BzImage { version, payload, compression, unpacked: u32::from_le_bytes(*size).into() })
}

impl<'a> BzImage<'a> {
    /// How many bytes it unpacks to.
    pub(crate) fn unpacked(&self) -> u64 {
        self.unpacked
    }

    /// Reads the unpacked payload, at most as much as the header promises.
    pub(crate) fn reader(&self) -> Result<impl Read + use<'a>, KernelProblem> {
        if self.unpacked > MAX_KERNEL {
            return Err(KernelProblem::TooLarge { limit: MAX_KERNEL });
        }
        let reader = decompressed(self.payload, self.compression).map_err(KernelProblem::Damaged)?;
        Ok(capped(reader, self.unpacked))
    }
}

/// Checks that an ELF file can be a kernel for VMs of this host, and returns its architecture. VMMs boot ELF files of x86_64; those of
/// arm64 want an image instead. `start` is at least the file's first 64 KiB, `length` its whole length.
pub(crate) fn check_elf(start: &[u8], length: u64) -> Result<Arch, KernelProblem> {
    let wrong = |why| KernelProblem::WrongElf(Arch::HOST.as_str(), why);
    let u16_at = |at: usize| Some(u16::from_le_bytes(*start.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*start.get(at..)?.first_chunk()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(*start.get(at..)?.first_chunk()?));
    if start.get(4..6) != Some(&[2, 1]) {
        return Err(wrong("it is not 64-bit little-endian"));
    }
    let fits = |arch: &Arch| arch.is_host() || *arch == Arch::X86_64;
    let arch = Arch::of_elf(start).filter(fits).ok_or_else(|| wrong("it is for another machine"))?;
    if !matches!(u16_at(0x10), Some(2 | 3)) {
        return Err(wrong("it is not executable"));
    }
    let short = || wrong("its program headers are not where they should be");
    let table = u64_at(0x20).and_then(|at| usize::try_from(at).ok()).ok_or_else(short)?;
    let (size, count) = (u16_at(0x36).ok_or_else(short)?, u16_at(0x38).ok_or_else(short)?);
    if size < 56 {
        return Err(short());
    }
    let mut loads = false;
    for number in 0..usize::from(count) {
        let at = table.checked_add(number * usize::from(size)).ok_or_else(short)?;
        let kind = u32_at(at).ok_or_else(short)?;
        // PT_LOAD: what it loads from the file must be in the file.
        if kind == 1 {
            let offset = u64_at(at.saturating_add(8)).ok_or_else(short)?;
            let bytes = u64_at(at.saturating_add(32)).ok_or_else(short)?;
            if offset.checked_add(bytes).is_none_or(|end| end > length) {
                return Err(wrong("it is cut off"));
            }
            loads = true;
        }
    }
    if loads { Ok(arch) } else { Err(wrong("it loads nothing")) }
}
