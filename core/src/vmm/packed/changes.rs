//! What differs between two memories, packed: a bit for each page that is the same in both, and the pages that are not.

use std::fs::File;
use std::io::{self, Read, Write};

use nexus_schema::id::CheckpointId;
use sha2::{Digest as _, Sha256};

use super::{Digest, Each, Header, Memory, PAGE, Records, begin, damaged, end, ram, write_record};

/// The largest set of bits that is read, in bytes: that of a memory of 2 TiB.
const KEPT_MAX: u64 = 64 << 20;

/// What a base may occupy, in bytes: 24 bytes of memory are used for each of its pages.
const COMPARED_MAX: u64 = 8 << 30;

/// Packs what differs between a memory and a base, another memory; returns the digest of the whole memory. `None`, and nothing is written, if less than
/// half of its pages are as in the base, or that is too large. As [`super::pack`] otherwise. Blocks.
pub(crate) fn pack_changes(
    from: &File,
    (id, base): (CheckpointId, &Memory),
    to: &File,
    is_wanted: &dyn Fn(u64) -> bool,
) -> io::Result<Option<String>> {
    let memory = Memory::Plain(from.try_clone()?);
    let header = Header { base: Some(id), ..memory.header()? };
    let of_base = base.header()?;
    if of_base.length != header.length || of_base.occupied > COMPARED_MAX {
        return Ok(None);
    }
    let Some(kept) = same(&memory, base, header.length, is_wanted)? else { return Ok(None) };
    let mut digest = Digest::default();
    let mut frame = begin(to, header)?;
    frame.write_all(&kept.0)?;
    memory.pages(is_wanted, &mut |at, pages| {
        digest.add(at, pages);
        kept.parts(false, at, pages, &mut |at, part| write_record(&mut frame, at, part))
    })?;
    end(frame, header.length)?;
    Ok(Some(digest.finish()))
}

/// The pages of a memory that are as in another one; `None` if those are less than half of its pages.
fn same(
    memory: &Memory,
    base: &Memory,
    length: u64,
    is_wanted: &dyn Fn(u64) -> bool,
) -> io::Result<Option<Kept>> {
    let mut known: Vec<(u64, [u8; 16])> = Vec::new();
    base.pages(is_wanted, &mut |at, pages| {
        known.extend(ram::numbered(at, pages).map(|(at, page)| (at, short_digest(page))));
        Ok(())
    })?;
    let mut kept = Kept::none(length);
    let (mut count, mut equal, mut place) = (0_u64, 0_u64, 0);
    memory.pages(is_wanted, &mut |at, pages| {
        for (at, page) in ram::numbered(at, pages) {
            while known.get(place).is_some_and(|(other, _)| *other < at) {
                place += 1;
            }
            count += 1;
            if known.get(place) == Some(&(at, short_digest(page))) {
                kept.add(at / PAGE as u64);
                equal += 1;
            }
        }
        Ok(())
    })?;
    Ok((equal * 2 >= count).then_some(kept))
}

/// Half of a digest: pages that have the same one are the same, or the digest of the whole memory says that they are not.
fn short_digest(page: &[u8]) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&Sha256::digest(page)[..16]);
    short
}

/// Calls `each` with all pages of a memory that are not all zeros, in order. `records` is where its frame begins.
pub(super) fn pages(
    mut records: Records<'_>,
    base: &Memory,
    is_wanted: &dyn Fn(u64) -> bool,
    each: &mut Each<'_>,
) -> io::Result<()> {
    let kept = Kept::read(&mut records.frame, records.length)?;
    let mut next = records.next()?;
    base.pages(is_wanted, &mut |at, pages| {
        kept.parts(true, at, pages, &mut |at, part| {
            while let Some((other, count)) = next
                && other < at
            {
                each(other, &records.buffer[..count])?;
                next = records.next()?;
            }
            each(at, part)
        })
    })?;
    while let Some((at, count)) = next {
        each(at, &records.buffer[..count])?;
        next = records.next()?;
    }
    Ok(())
}

/// A bit for each page of a memory: whether it is as in the base.
struct Kept(Vec<u8>);

impl Kept {
    fn none(length: u64) -> Self {
        Self(vec![0; usize::try_from(bytes(length)).unwrap_or(0)])
    }

    fn read(frame: &mut impl Read, length: u64) -> io::Result<Self> {
        if bytes(length) > KEPT_MAX {
            return Err(damaged("it is larger than any memory"));
        }
        let mut kept = Self::none(length);
        frame.read_exact(&mut kept.0)?;
        Ok(kept)
    }

    fn add(&mut self, page: u64) {
        let byte = usize::try_from(page / 8).ok().and_then(|at| self.0.get_mut(at));
        if let Some(byte) = byte {
            *byte |= 1_u8 << (page % 8);
        }
    }

    fn has(&self, page: u64) -> bool {
        let byte = usize::try_from(page / 8).ok().and_then(|at| self.0.get(at));
        byte.is_some_and(|byte| *byte & (1_u8 << (page % 8)) != 0)
    }

    /// Calls `each` with those pages in a row that are kept, or those that are not.
    fn parts(&self, are_kept: bool, at: u64, pages: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        let (first, count) = (at / PAGE as u64, pages.len().div_ceil(PAGE));
        let is_wanted = |number: usize| self.has(first + number as u64) == are_kept;
        let mut start = 0;
        while start < count {
            let end = (start..count).find(|number| !is_wanted(*number)).unwrap_or(count);
            if end > start {
                each(at + (start * PAGE) as u64, &pages[start * PAGE..(end * PAGE).min(pages.len())])?;
            }
            start = end.max(start + 1);
        }
        Ok(())
    }
}

/// How many bytes have a bit for each page.
fn bytes(length: u64) -> u64 {
    length.div_ceil(PAGE as u64).div_ceil(8)
}
