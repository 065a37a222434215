//! Sparse files: GNU's old form with a map in headers, and the pax forms 0.1 (a map in a record) and 1.0 (a map before the
//! data).

use std::io::{self, Read};

use nexus_tree::pax::decimal;
use tar::Header;

use super::{BLOCK, Entry, ImageError, Reader};
use crate::ext4::{Content, fill};

/// A sparse file in pax form.
#[derive(Debug)]
pub(super) struct Holes {
    /// Its length including holes.
    real: u64,
    /// Its parts; `None` if the map precedes the data.
    map: Option<Vec<Part>>,
}

/// Offset and length.
type Part = (u64, u64);

const NONSENSE: &str = "a sparse file's map is invalid";

/// Reads the sparse records of an entry.
pub(super) fn holes<'r>(pax: impl Fn(&str) -> Option<&'r [u8]>) -> Result<Option<Holes>, &'static str> {
    let number = |key: &str| pax(key).map(|text| decimal(text).ok_or(NONSENSE)).transpose();
    if let Some(major) = number("GNU.sparse.major")? {
        let minor = number("GNU.sparse.minor")?.unwrap_or(0);
        let real = number("GNU.sparse.realsize")?.ok_or(NONSENSE)?;
        return match (major, minor) {
            (1, 0) => Ok(Some(Holes { real, map: None })),
            _ => Err("it is a sparse file of an unknown form"),
        };
    }
    if let Some(map) = pax("GNU.sparse.map") {
        let real = number("GNU.sparse.size")?.ok_or(NONSENSE)?;
        let numbers: Vec<u64> =
            map.split(|b| *b == b',').map(decimal).collect::<Option<_>>().ok_or(NONSENSE)?;
        return Ok(Some(Holes { real, map: Some(pairs(&numbers).ok_or(NONSENSE)?) }));
    }
    match pax("GNU.sparse.size").or(pax("GNU.sparse.offset")) {
        Some(_) => Err("it is a sparse file in the oldest pax form; write the archive without --sparse"),
        None => Ok(None),
    }
}

fn pairs(numbers: &[u64]) -> Option<Vec<Part>> {
    numbers.len().is_multiple_of(2).then(|| numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

impl<R: Read> Reader<'_, R> {
    /// A sparse file in GNU's old form: a map in the header and in blocks after it, then the parts.
    pub(super) fn sparse(&mut self, header: &Header, entry: &Entry) -> Result<Content, ImageError> {
        let gnu = header.as_gnu().ok_or_else(|| self.damaged("a sparse file has no map"))?;
        let real = gnu.real_size().map_err(|e| self.unpack(e))?;
        let mut map = Vec::new();
        for part in gnu.sparse.iter().filter(|part| !part.is_empty()) {
            map.push((part.offset(), part.length()));
        }
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            if fill(&mut self.source, block.as_mut_bytes()).map_err(|e| self.unpack(e))? < BLOCK {
                return Err(self.damaged("it ends within a header"));
            }
            for part in block.sparse.iter().filter(|part| !part.is_empty()) {
                map.push((part.offset(), part.length()));
            }
            self.check_map(map.len() as u64 * 24)?;
            more = block.is_extended();
        }
        let mut parts = Vec::new();
        for (offset, length) in map {
            parts.push((offset.map_err(|e| self.unpack(e))?, length.map_err(|e| self.unpack(e))?));
        }
        self.expand(parts, real, entry.size)
    }

    /// A sparse file in pax form, with its padding.
    pub(super) fn pax_sparse(&mut self, entry: &mut Entry) -> Result<Content, ImageError> {
        let Some(holes) = entry.holes.take() else { return Err(self.damaged(NONSENSE)) };
        let (map, head) = match holes.map {
            Some(map) => (map, 0),
            None => self.map_before_data(entry.size)?,
        };
        let content = self.expand(map, holes.real, entry.size - head)?;
        self.pad(entry.size)?;
        Ok(content)
    }

    /// Reads the map at the beginning of `size` bytes of content: the number of parts, then offset and length of each, one
    /// number a line, in whole blocks. Also returns its length in bytes.
    fn map_before_data(&mut self, size: u64) -> Result<(Vec<Part>, u64), ImageError> {
        let mut numbers: Vec<u64> = Vec::new();
        let (mut digits, mut taken) = (Vec::new(), 0);
        loop {
            let mut block = [0; BLOCK];
            taken += BLOCK as u64;
            self.check_map(taken)?;
            if taken > size {
                return Err(self.damaged(NONSENSE));
            }
            if fill(&mut self.source, &mut block).map_err(|e| self.unpack(e))? < BLOCK {
                return Err(self.damaged("it ends within a header"));
            }
            for byte in block {
                if byte != b'\n' {
                    digits.push(byte);
                    continue;
                }
                numbers.push(decimal(&digits).ok_or_else(|| self.damaged(NONSENSE))?);
                digits.clear();
                if numbers.len() as u64 == numbers[0].saturating_mul(2).saturating_add(1) {
                    let map = pairs(&numbers[1..]).ok_or_else(|| self.damaged(NONSENSE))?;
                    return Ok((map, taken));
                }
            }
        }
    }

    fn check_map(&self, bytes: u64) -> Result<(), ImageError> {
        let limit = self.limits.header_bytes;
        if bytes > limit { Err(ImageError::TooLarge { limit, what: "bytes in a header" }) } else { Ok(()) }
    }

    /// Stages the content of a sparse file; the source holds only its parts, `size` bytes.
    fn expand(&mut self, map: Vec<Part>, real: u64, size: u64) -> Result<Content, ImageError> {
        let (mut at, mut data) = (0_u64, 0_u64);
        for (offset, length) in &map {
            let end = offset.checked_add(*length).filter(|end| *offset >= at && *end <= real);
            at = end.ok_or_else(|| self.damaged(NONSENSE))?;
            data = data.saturating_add(*length);
        }
        if data != size {
            return Err(self.damaged(NONSENSE));
        }
        let expanded = Expanded { source: &mut self.source, parts: map.into_iter(), part: (0, 0), at: 0 };
        let taken = self.contents.take(expanded, real);
        taken.map_err(|stop| self.stopped(stop))
    }
}

/// A sparse file's content with its holes as zeros.
struct Expanded<R, P> {
    source: R,
    parts: P,
    /// The current part: where it starts, and what is left of it.
    part: Part,
    at: u64,
}

impl<R: Read, P: Iterator<Item = Part>> Read for Expanded<R, P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.part.1 == 0 {
            match self.parts.next() {
                Some(part) => self.part = part,
                None => self.part = (u64::MAX, u64::MAX),
            }
        }
        let room = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
        let read = if self.at < self.part.0 {
            let zeros = usize::try_from(room.min(self.part.0 - self.at)).unwrap_or(buffer.len());
            buffer[..zeros].fill(0);
            zeros
        } else {
            let want = usize::try_from(room.min(self.part.1)).unwrap_or(buffer.len());
            let read = self.source.read(&mut buffer[..want])?;
            self.part.0 += read as u64;
            self.part.1 -= read as u64;
            read
        };
        self.at += read as u64;
        Ok(read)
    }
}
