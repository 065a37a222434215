//! A saved memory in its packed form: the pages that are not all zeros, compressed.
//!
//! ```text
//! magic (8 bytes) │ length │ occupied │ base │ one zstd frame with a checksum: [kept] records ─ offset │ count │ count bytes of pages
//!                                                                               the last: length │ 0
//! ```
//! `length` is that of the memory, `occupied` what it took on the disk. With `base`, the id of another memory, the frame begins with a bit for each page
//! that is as in that one, and the records are what is not ([`changes`]). All other pages are zeros. Offsets and lengths have 64 bits, counts 32, all
//! little-endian. What is read is checked as if anybody had written it; whether it is the memory that was packed is for its digest to say.

mod changes;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use nexus_schema::id::CheckpointId;
use zstd::stream::read::Decoder;
use zstd::stream::write::Encoder;

use super::ram::{self, Digest, PAGE, PIECE};
pub(crate) use changes::pack_changes;

/// The first bytes of a packed memory; the last one is the version of its form.
const MAGIC: [u8; 8] = *b"NXPACK\n\x01";
/// The length of what is before the frame, in bytes.
const HEADER: usize = 32;
/// The level of compression: higher ones take far more time for little less space.
const LEVEL: i32 = 3;

/// What a packed memory says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The length of the memory, in bytes.
    pub length: u64,
    /// What it occupied on the disk before it was packed, in bytes.
    pub occupied: u64,
    /// The checkpoint whose memory it is told by, if it has only what differs from that.
    pub base: Option<CheckpointId>,
}

/// A memory in one of its forms.
#[derive(Debug)]
pub(crate) enum Memory {
    /// As VMMs take it.
    Plain(File),
    /// Packed, and that of its base, if it has one.
    Packed(File, Option<Box<Memory>>),
}

/// What is called with pages in a row and the offset of the first.
type Each<'a> = dyn FnMut(u64, &[u8]) -> io::Result<()> + 'a;

impl Memory {
    /// What it says of itself. Of a plain one that is what it is.
    fn header(&self) -> io::Result<Header> {
        match self {
            Self::Plain(file) => {
                let found = file.metadata()?;
                Ok(Header { length: found.len(), occupied: found.blocks() * 512, base: None })
            }
            Self::Packed(file, _) => header(file),
        }
    }

    /// Calls `each` with all pages that are not all zeros, in order. `is_wanted` is asked again and again, with how many bytes of pages were read; once it
    /// is not, the work ends with [`io::ErrorKind::Interrupted`].
    fn pages(&self, is_wanted: &dyn Fn(u64) -> bool, each: &mut Each<'_>) -> io::Result<()> {
        let done = Cell::new(0);
        let mut each = |at: u64, pages: &[u8]| {
            done.set(done.get() + pages.len() as u64);
            each(at, pages)
        };
        match self {
            Self::Plain(file) => ram::pages(file, &|| is_wanted(done.get()), &mut each),
            Self::Packed(file, base) => {
                let header = header(file)?;
                let mut records = Records::open(file, header.length)?;
                match (header.base, base) {
                    (Some(_), Some(base)) => changes::pages(records, base, is_wanted, &mut each),
                    (Some(_), None) => Err(damaged("the memory that it differs from is missing")),
                    (None, _) => {
                        while let Some((at, count)) = records.next()? {
                            each(at, &records.buffer[..count])?;
                            if !is_wanted(done.get()) {
                                return Err(io::ErrorKind::Interrupted.into());
                            }
                        }
                        Ok(())
                    }
                }
            }
        }
    }

    /// Returns the digest of the memory, as that of a saved one. `is_wanted` is asked as by [`pack`]. Blocks.
    pub(crate) fn sha256(&self, is_wanted: &dyn Fn(u64) -> bool) -> io::Result<String> {
        let mut digest = Digest::default();
        self.pages(is_wanted, &mut |at, pages| {
            digest.add(at, pages);
            Ok(())
        })?;
        Ok(digest.finish())
    }
}

/// Packs a memory into `to`, a new file; returns the digest of what was packed. `is_wanted` is asked again and again, with how many bytes of pages were
/// read; once it is not, the work ends with [`io::ErrorKind::Interrupted`]. Nothing is synced. Blocks.
pub(crate) fn pack(from: &Memory, to: &File, is_wanted: &dyn Fn(u64) -> bool) -> io::Result<String> {
    let mut digest = Digest::default();
    let header = Header { base: None, ..from.header()? };
    let mut frame = begin(to, header)?;
    from.pages(is_wanted, &mut |at, pages| {
        digest.add(at, pages);
        write_record(&mut frame, at, pages)
    })?;
    end(frame, header.length)?;
    Ok(digest.finish())
}

/// Unpacks a memory into `to`, a new file in which pages of zeros are holes; returns the digest of what was written. As [`pack`] otherwise. Blocks.
pub(crate) fn unpack(from: &Memory, to: &File, is_wanted: &dyn Fn(u64) -> bool) -> io::Result<String> {
    to.set_len(from.header()?.length)?;
    let mut digest = Digest::default();
    from.pages(is_wanted, &mut |at, pages| {
        digest.add(at, pages);
        to.write_all_at(pages, at)
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
    let base = match number(24) {
        0 => None,
        id => match i64::try_from(id).ok().and_then(CheckpointId::from_i64) {
            Some(id) => Some(id),
            None => return Err(damaged("it differs from no memory that there can be")),
        },
    };
    Ok(Header { length: number(8), occupied: number(16), base })
}

/// A packed memory that is being written.
type Frame<'a> = Encoder<'static, BufWriter<&'a File>>;

/// Begins a packed memory.
fn begin(to: &File, header: Header) -> io::Result<Frame<'_>> {
    let base = header.base.map_or(0, |id| id.as_i64().unsigned_abs());
    let mut to = BufWriter::with_capacity(PIECE, to);
    to.write_all(&MAGIC)?;
    for number in [header.length, header.occupied, base] {
        to.write_all(&number.to_le_bytes())?;
    }
    let mut frame = Encoder::new(to, LEVEL)?;
    frame.include_checksum(true)?;
    Ok(frame)
}

fn write_record(frame: &mut Frame<'_>, at: u64, pages: &[u8]) -> io::Result<()> {
    let count = u32::try_from(pages.len()).map_err(io::Error::other)?;
    frame.write_all(&at.to_le_bytes())?;
    frame.write_all(&count.to_le_bytes())?;
    frame.write_all(pages)
}

fn end(mut frame: Frame<'_>, length: u64) -> io::Result<()> {
    write_record(&mut frame, length, &[])?;
    frame.finish()?.flush()
}

/// The records of a packed memory.
struct Records<'a> {
    frame: Decoder<'static, BufReader<Rest<'a>>>,
    length: u64,
    /// The end of the record before.
    end: u64,
    /// The pages of the record.
    buffer: Vec<u8>,
}

impl<'a> Records<'a> {
    fn open(file: &'a File, length: u64) -> io::Result<Self> {
        let frame = Decoder::new(Rest { file, at: HEADER as u64 })?;
        Ok(Self { frame, length, end: 0, buffer: vec![0; PIECE] })
    }

    /// Reads the next record; returns its offset, and how many bytes of pages are in the buffer. `None` at the end.
    fn next(&mut self) -> io::Result<Option<(u64, usize)>> {
        let (mut offset, mut count) = ([0; 8], [0; 4]);
        self.frame.read_exact(&mut offset)?;
        self.frame.read_exact(&mut count)?;
        let offset = u64::from_le_bytes(offset);
        let count = usize::try_from(u32::from_le_bytes(count)).map_err(io::Error::other)?;
        if count == 0 {
            // What follows is read for its checksum, and is nothing.
            let is_last = offset == self.length && self.frame.read(&mut [0])? == 0;
            return if is_last { Ok(None) } else { Err(damaged("it goes on after its end")) };
        }
        let end = offset.checked_add(count as u64).filter(|end| *end <= self.length);
        let is_whole = count.is_multiple_of(PAGE) || end == Some(self.length);
        let is_next = offset >= self.end && offset.is_multiple_of(PAGE as u64) && count <= PIECE && is_whole;
        let Some(end) = end.filter(|_| is_next) else { return Err(damaged("its pages are in no order")) };
        self.frame.read_exact(&mut self.buffer[..count])?;
        self.end = end;
        Ok(Some((offset, count)))
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
mod tests;
