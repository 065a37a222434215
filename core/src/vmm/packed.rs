//! A saved memory in its packed form: the pages that are not all zeros, compressed.
//!
//! ```text
//! magic (8 bytes) │ length │ occupied │ one zstd frame with a checksum: records ─ offset │ count │ count bytes of pages
//!                                                                        the last: length │ 0
//! ```
//! `length` is that of the memory, `occupied` what it took on the disk. Offsets and lengths have 64 bits, counts 32, all little-endian. What is read
//! is checked as if anybody had written it; whether it is the memory that was packed is for its digest to say.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use super::ram::{self, Digest, PAGE, PIECE};

/// The first bytes of a packed memory; the last one is the version of its form.
const MAGIC: [u8; 8] = *b"NXPACK\n\x01";
/// The level of compression: higher ones take far more time for little less space.
const LEVEL: i32 = 3;

/// What a packed memory says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The length of the memory, in bytes.
    pub length: u64,
    /// What it occupied on the disk before it was packed, in bytes.
    pub occupied: u64,
}

/// Packs the memory `from` into `to`, a new file; returns the digest of what was packed. `is_wanted` is asked before each piece, with how many bytes of
/// pages were read; once it is not, the work ends with [`io::ErrorKind::Interrupted`]. Nothing is synced. Blocks.
pub(crate) fn pack(from: &File, to: &File, is_wanted: &dyn Fn(u64) -> bool) -> io::Result<String> {
    let found = from.metadata()?;
    let length = found.len();
    let mut to = BufWriter::with_capacity(PIECE, to);
    to.write_all(&MAGIC)?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&(found.blocks() * 512).to_le_bytes())?;
    let mut frame = zstd::stream::write::Encoder::new(to, LEVEL)?;
    frame.include_checksum(true)?;
    let (done, mut digest) = (Cell::new(0), Digest::default());
    ram::pages(from, &|| is_wanted(done.get()), &mut |at, pages| {
        digest.add(at, pages);
        done.set(done.get() + pages.len() as u64);
        frame.write_all(&at.to_le_bytes())?;
        frame.write_all(&u32::try_from(pages.len()).map_err(io::Error::other)?.to_le_bytes())?;
        frame.write_all(pages)
    })?;
    frame.write_all(&length.to_le_bytes())?;
    frame.write_all(&0_u32.to_le_bytes())?;
    frame.finish()?.flush()?;
    Ok(digest.finish())
}

/// Unpacks `from` into `to`, a new file in which pages of zeros are holes; returns the digest of its memory. As [`pack`] otherwise. Blocks.
pub(crate) fn unpack(from: &File, to: &File, is_wanted: &dyn Fn(u64) -> bool) -> io::Result<String> {
    to.set_len(header(from)?.length)?;
    let mut digest = Digest::default();
    records(from, is_wanted, &mut |at, pages| {
        digest.add(at, pages);
        to.write_all_at(pages, at)
    })?;
    Ok(digest.finish())
}

/// Returns the digest of a packed memory, as [`unpack`] does, but writes nothing. Blocks.
pub(crate) fn sha256_of_packed(from: &File, is_wanted: &dyn Fn(u64) -> bool) -> io::Result<String> {
    let mut digest = Digest::default();
    records(from, is_wanted, &mut |at, pages| {
        digest.add(at, pages);
        Ok(())
    })?;
    Ok(digest.finish())
}

/// Reads what a packed memory says of itself.
pub(crate) fn header(file: &File) -> io::Result<Header> {
    let mut bytes = [0; HEADER];
    file.read_exact_at(&mut bytes, 0)?;
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(number)
    };
    if bytes[..8] != MAGIC {
        return Err(damaged("it is no packed memory"));
    }
    Ok(Header { length: number(8), occupied: number(16) })
}

/// The length of what is before the frame, in bytes.
const HEADER: usize = 24;

/// Calls `each` with all pages of a packed memory, in order, and their offsets.
fn records(
    file: &File,
    is_wanted: &dyn Fn(u64) -> bool,
    each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let Header { length, .. } = header(file)?;
    let mut frame = zstd::stream::read::Decoder::new(Rest { file, at: HEADER as u64 })?;
    let (mut buffer, mut end, mut done) = (vec![0; PIECE], 0, 0);
    loop {
        if !is_wanted(done) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let (mut offset, mut count) = ([0; 8], [0; 4]);
        frame.read_exact(&mut offset)?;
        frame.read_exact(&mut count)?;
        let offset = u64::from_le_bytes(offset);
        let count = usize::try_from(u32::from_le_bytes(count)).map_err(io::Error::other)?;
        if count == 0 {
            // What follows is read for its checksum, and is nothing.
            let is_last = offset == length && frame.read(&mut [0])? == 0;
            return if is_last { Ok(()) } else { Err(damaged("it goes on after its end")) };
        }
        let is_whole = count.is_multiple_of(PAGE) || offset.checked_add(count as u64) == Some(length);
        let is_next = offset >= end && offset.is_multiple_of(PAGE as u64) && count <= PIECE && is_whole;
        if !is_next || offset.checked_add(count as u64).is_none_or(|end| end > length) {
            return Err(damaged("its pages are in no order"));
        }
        let pages = &mut buffer[..count];
        frame.read_exact(pages)?;
        each(offset, pages)?;
        end = offset + count as u64;
        done += count as u64;
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Reads a file from a place on, wherever others read it.
struct Rest<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Rest<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A memory of some mebibytes with these pages in it, each of other bytes.
    fn memory(length: u64, pages: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        let mut state = 1_u32;
        for at in pages {
            let page: Vec<u8> = (0..PAGE)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state.to_be_bytes()[0]
                })
                .collect();
            file.write_all_at(&page, *at).unwrap();
        }
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    fn new() -> File {
        tempfile::tempfile().unwrap()
    }

    const LENGTH: u64 = 8 << 20;

    fn sample() -> File {
        let last = LENGTH - PAGE as u64;
        let file = memory(LENGTH, &[0, 8192, 12288, (1 << 20) - 4096, 1 << 20, 3 << 20, last]);
        // Zeros that are written, and what compresses well.
        file.write_all_at(&[0; PAGE], 16384).unwrap();
        file.write_all_at(&vec![7_u8; 2 << 20], 5 << 20).unwrap();
        file
    }

    #[test]
    fn a_memory_comes_back_with_its_holes_and_its_digest() {
        let (from, packed, to) = (sample(), new(), new());
        let sha256 = pack(&from, &packed, &|_| true).unwrap();
        assert_eq!(sha256, ram::copy(&from, &new(), &|| true).unwrap().sha256);
        let occupied = from.metadata().unwrap().blocks() * 512;
        assert_eq!(header(&packed).unwrap(), Header { length: LENGTH, occupied });
        assert!(packed.metadata().unwrap().len() < 48 << 10, "{}", packed.metadata().unwrap().len());
        assert_eq!(sha256_of_packed(&packed, &|_| true).unwrap(), sha256);
        // What was read before of the file is no matter.
        (&packed).read_exact(&mut [0; 100]).unwrap();
        assert_eq!(unpack(&packed, &to, &|_| true).unwrap(), sha256);
        assert!(content(&to) == content(&from));
        assert!(to.metadata().unwrap().blocks() * 512 <= (2 << 20) + (64 << 10));
    }

    #[test]
    fn memories_without_pages_and_of_odd_lengths_come_back() {
        for length in [0, 1, 4096, 5000, (1 << 20) + 1] {
            let (from, packed, to) = (new(), new(), new());
            from.set_len(length).unwrap();
            pack(&from, &packed, &|_| true).unwrap();
            unpack(&packed, &to, &|_| true).unwrap();
            assert!(content(&to) == content(&from), "{length} of zeros");
            let full = vec![9_u8; usize::try_from(length).unwrap()];
            from.write_all_at(&full, 0).unwrap();
            let (packed, to) = (new(), new());
            pack(&from, &packed, &|_| true).unwrap();
            unpack(&packed, &to, &|_| true).unwrap();
            assert!(content(&to) == full, "{length} of data");
        }
    }

    #[test]
    fn each_flipped_byte_and_each_missing_end_is_found() {
        let packed = new();
        let sha256 = pack(&sample(), &packed, &|_| true).unwrap();
        let whole = content(&packed);
        let read = |bytes: &[u8]| {
            let file = new();
            file.write_all_at(bytes, 0).unwrap();
            sha256_of_packed(&file, &|_| true)
        };
        assert_eq!(read(&whole).unwrap(), sha256);
        // What it occupied is not needed for anything that must be right.
        for at in (0..whole.len()).step_by(97).filter(|at| !(16..24).contains(at)).chain([3, 8, 15, 24]) {
            let mut other = whole.clone();
            other[at] ^= 0x10;
            assert!(read(&other).is_err(), "byte {at} of {}", whole.len());
        }
        for length in (0..whole.len()).step_by(211).chain([whole.len() - 1]) {
            assert!(read(&whole[..length]).is_err(), "{length} of {}", whole.len());
        }
        assert!(read(&[whole.as_slice(), b"more"].concat()).is_err());
    }

    #[test]
    fn records_out_of_order_or_beyond_the_end_are_refused() {
        let written = |records: &[(u64, u32)]| {
            let file = new();
            let mut head = MAGIC.to_vec();
            head.extend((64_u64 << 10).to_le_bytes());
            head.extend(0_u64.to_le_bytes());
            let mut frame = Vec::new();
            for (at, count) in records {
                frame.extend(at.to_le_bytes());
                frame.extend(count.to_le_bytes());
                frame.extend(vec![1_u8; usize::try_from(*count).unwrap()]);
            }
            head.extend(zstd::stream::encode_all(frame.as_slice(), 1).unwrap());
            file.write_all_at(&head, 0).unwrap();
            unpack(&file, &new(), &|_| true)
        };
        let end = (64 << 10, 0);
        written(&[(4096, 8192), end]).unwrap();
        for records in [
            &[(4096, 8192), (8192, 4096), end][..],
            &[(100, 4096), end],
            &[(4096, 100), end],
            &[(60 << 10, 8192), end],
            &[(u64::MAX - 4095, 4096), end],
            &[(0, (1 << 20) + 4096), end],
            &[(4096, 0)],
            &[(4096, 8192)],
            &[(4096, 8192), end, end],
        ] {
            assert!(written(records).is_err(), "{records:?}");
        }
    }

    #[test]
    fn the_work_ends_when_nobody_wants_it_or_the_disk_is_full() {
        let (from, packed) = (sample(), new());
        let stopped = |result: io::Result<String>| result.unwrap_err().kind() == io::ErrorKind::Interrupted;
        assert!(stopped(pack(&from, &new(), &|done| done < 1 << 20)));
        pack(&from, &packed, &|_| true).unwrap();
        assert!(stopped(unpack(&packed, &new(), &|done| done < 1 << 20)));
        assert!(stopped(sha256_of_packed(&packed, &|_| false)));
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(pack(&from, &full, &|_| true).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
