//! Reads the entries of a tar stream: v7, ustar, pax, GNU with long names, and GNU's sparse files. Every length is checked
//! against a limit before anything is stored.

use std::io::{self, BufRead};

use tar::{EntryType, Header};

use crate::attributes::Attribute;
use crate::error::TreeError;
use crate::header::{BLOCK, Sparse};
use crate::pax::{self, Records};
use crate::unpacking::Limits;

/// How much padding may follow the end of an archive, in bytes.
const PADDING_MAX: u64 = 1 << 20;

/// An entry, with the values of extensions applied.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: EntryType,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) device: Option<(u32, u32)>,
    /// Bytes of data that follow it in the archive.
    pub(crate) size: u64,
    pub(crate) sparse: Option<Sparse>,
    /// How much of the file's beginning was left out, because it is there already.
    pub(crate) from: u64,
    /// All that it has, also those that are not to be kept.
    pub(crate) attributes: Vec<Attribute>,
}

/// A tar stream.
pub(crate) struct Archive<'a, R> {
    source: R,
    limits: &'a Limits,
    at: u64,
    /// Bytes of the last entry's data that were not read yet.
    left: u64,
    /// Padding after them.
    padding: u64,
    /// How many bytes the extensions of the next entry have so far.
    extended: u64,
    global: Records,
}

#[derive(Default)]
struct Ahead {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Records,
}

impl<'a, R: BufRead> Archive<'a, R> {
    pub(crate) fn new(source: R, limits: &'a Limits) -> Self {
        Self { source, limits, at: 0, left: 0, padding: 0, extended: 0, global: Records::default() }
    }

    /// Returns the next entry; `None` at the end, after everything was read.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TreeError> {
        let mut ahead = Ahead::default();
        let mut extensions = 0;
        self.extended = 0;
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            match header.entry_type() {
                EntryType::GNULongName => ahead.path = Some(without_nul(self.extended(&header)?)),
                EntryType::GNULongLink => ahead.link = Some(without_nul(self.extended(&header)?)),
                EntryType::XHeader => {
                    let bytes = self.extended(&header)?;
                    ahead.records.read(&bytes).map_err(|what| self.damaged(what))?;
                }
                EntryType::XGlobalHeader => {
                    let bytes = self.extended(&header)?;
                    self.global.read(&bytes).map_err(|what| self.damaged(what))?;
                    // They stay until the end of the archive.
                    if self.global.bytes() > self.limits.header_bytes {
                        return Err(self.extended_too_far());
                    }
                }
                // The label of the archive.
                other if other.as_byte() == b'V' => drop(self.extended(&header)?),
                kind => return self.entry(kind, &header, ahead).map(Some),
            }
            extensions += 1;
            if extensions > 1000 {
                return Err(self.damaged("an entry has no end of extensions"));
            }
        }
    }

    /// Returns the next bytes of the entry's data, at most `max`; empty at its end. Call [`Self::took`] afterwards.
    pub(crate) fn data(&mut self, max: u64) -> Result<&[u8], TreeError> {
        let want = usize::try_from(self.left.min(max)).unwrap_or(usize::MAX);
        if want == 0 {
            return Ok(&[]);
        }
        let at = self.at;
        let ready = fill(&mut self.source)?;
        if ready.is_empty() {
            return Err(TreeError::Damaged { at, what: "it ends within an entry" });
        }
        Ok(&ready[..ready.len().min(want)])
    }

    /// Marks this many bytes of [`Self::data`] as read.
    pub(crate) fn took(&mut self, bytes: usize) {
        self.source.consume(bytes);
        self.at += bytes as u64;
        self.left -= bytes as u64;
    }

    fn header(&mut self) -> Result<Option<Header>, TreeError> {
        self.skip()?;
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        match self.read(block)? {
            0 => return Err(self.damaged("it ends without its end mark")),
            BLOCK => {}
            _ => return Err(self.damaged("it ends within a header")),
        }
        if block.iter().all(|b| *b == 0) {
            return self.finish().map(|()| None);
        }
        let sums = block.iter().enumerate();
        let sum: u32 = sums.map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) }).sum();
        if header.cksum().ok() != Some(sum) {
            return Err(self.damaged("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    /// Reads what follows the end mark, so that its writer does not block.
    fn finish(&mut self) -> Result<(), TreeError> {
        let mut padding = 0;
        loop {
            let ready = fill(&mut self.source)?.len();
            if ready == 0 {
                return Ok(());
            }
            self.source.consume(ready);
            self.at += ready as u64;
            padding += ready as u64;
            if padding > PADDING_MAX {
                return Err(self.damaged("it continues after its end mark"));
            }
        }
    }

    /// Skips the rest of the last entry.
    fn skip(&mut self) -> Result<(), TreeError> {
        let mut left = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        while left > 0 {
            let at = self.at;
            let ready = fill(&mut self.source)?.len();
            if ready == 0 {
                return Err(TreeError::Damaged { at, what: "it ends within an entry" });
            }
            let taken = usize::try_from(left).unwrap_or(ready).min(ready);
            self.source.consume(taken);
            self.at += taken as u64;
            left -= taken as u64;
        }
        Ok(())
    }

    /// Fills a buffer, or as much of it as the source has.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, TreeError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let ready = fill(&mut self.source)?;
            if ready.is_empty() {
                break;
            }
            let taken = ready.len().min(buffer.len() - filled);
            buffer[filled..filled + taken].copy_from_slice(&ready[..taken]);
            self.source.consume(taken);
            filled += taken;
        }
        self.at += filled as u64;
        Ok(filled)
    }

    fn extended_too_far(&self) -> TreeError {
        TreeError::TooLarge { limit: self.limits.header_bytes, what: "bytes in a header" }
    }

    /// Reads the content of an extension.
    fn extended(&mut self, header: &Header) -> Result<Vec<u8>, TreeError> {
        let size = self.size(header)?;
        self.extended = self.extended.saturating_add(size);
        if self.extended > self.limits.header_bytes {
            return Err(self.extended_too_far());
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| self.damaged("a header is too large"))?];
        if self.read(&mut bytes)? < bytes.len() {
            return Err(self.damaged("it ends within a header"));
        }
        (self.left, self.padding) = (0, padding_of(size));
        Ok(bytes)
    }

    fn size(&self, header: &Header) -> Result<u64, TreeError> {
        header.entry_size().map_err(|_| self.damaged("a header has no size"))
    }

    fn entry(&mut self, kind: EntryType, header: &Header, ahead: Ahead) -> Result<Entry, TreeError> {
        let records = [&ahead.records, &self.global];
        let pax = |key: &str| records.iter().find_map(|records| records.get(key));
        let number = |key: &str, here: io::Result<u64>| {
            let said = pax(key).map(pax::decimal);
            said.unwrap_or_else(|| here.ok()).ok_or_else(|| self.damaged("a header has no number"))
        };
        let mut path = pax("path")
            .map(<[u8]>::to_vec)
            .or(ahead.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax("linkpath").map(<[u8]>::to_vec).or(ahead.link);
        let link = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        if path.is_empty() {
            return Err(self.damaged("an entry has no name"));
        }
        if ["GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.size"].iter().any(|key| pax(key).is_some()) {
            return Err(TreeError::refused(
                &path,
                "it is a sparse file in pax form; write it with --format=gnu",
            ));
        }
        // Old archivers mark a directory only by a trailing slash.
        let kind = match kind {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => EntryType::Directory,
            other if other.as_byte() == b'D' => EntryType::Directory,
            EntryType::Continuous => EntryType::Regular,
            other => other,
        };
        while path.len() > 1 && path.ends_with(b"/") {
            path.pop();
        }
        let owner = |id: u64| u32::try_from(id).map_err(|_| self.damaged("an owner is out of range"));
        let mtime = match pax("mtime") {
            Some(text) => pax::time(text).ok_or_else(|| self.damaged("a pax record has no time"))?,
            None => (header.mtime().unwrap_or(0).cast_signed(), 0),
        };
        let device = match kind {
            EntryType::Char | EntryType::Block => {
                header.device_major().ok().flatten().zip(header.device_minor().ok().flatten())
            }
            _ => None,
        };
        let (uid, gid) = (owner(number("uid", header.uid())?)?, owner(number("gid", header.gid())?)?);
        let mode = header.mode().map_err(|_| self.damaged("a header has no mode"))? & 0o7777;
        // A hard link has no content, whatever its header says (as in GNU tar).
        let size = if kind == EntryType::Link { 0 } else { number("size", header.entry_size())? };
        if size > self.limits.bytes {
            return Err(TreeError::TooLarge { limit: self.limits.bytes, what: "bytes of content" });
        }
        let link = link.unwrap_or_default();
        let from = ahead.records.get(pax::FROM).map_or(Some(0), pax::decimal);
        let from = from.ok_or_else(|| self.damaged("a header holds no number"))?;
        let (sparse, attributes) = (None, ahead.records.xattrs().collect());
        let mut entry =
            Entry { kind, path, link, mode, uid, gid, mtime, device, size, sparse, from, attributes };
        if kind == EntryType::GNUSparse {
            entry.sparse = Some(self.sparse(header, size)?);
            entry.kind = EntryType::Regular;
        }
        (self.left, self.padding) = (size, padding_of(size));
        Ok(entry)
    }

    /// Reads the map of a sparse file: from its header, and from blocks after it.
    fn sparse(&mut self, header: &Header, size: u64) -> Result<Sparse, TreeError> {
        const NONSENSE: &str = "a sparse file's map is invalid";
        let gnu = header.as_gnu().ok_or_else(|| self.damaged(NONSENSE))?;
        let real = gnu.real_size().map_err(|_| self.damaged(NONSENSE))?;
        let mut map: Vec<_> =
            gnu.sparse.iter().map(|part| (part.offset[0], part.offset(), part.length())).collect();
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            if self.read(block.as_mut_bytes())? < BLOCK {
                return Err(self.damaged("it ends within a header"));
            }
            map.extend(block.sparse.iter().map(|part| (part.offset[0], part.offset(), part.length())));
            more = block.is_extended();
            if map.len() as u64 * 24 > self.limits.header_bytes {
                return Err(TreeError::TooLarge {
                    limit: self.limits.header_bytes,
                    what: "bytes in a header",
                });
            }
        }
        let (mut parts, mut at, mut data) = (Vec::new(), 0_u64, 0_u64);
        for (first, offset, length) in map {
            if first == 0 {
                continue;
            }
            let (offset, length) = offset.ok().zip(length.ok()).ok_or_else(|| self.damaged(NONSENSE))?;
            let end = offset.checked_add(length).filter(|end| offset >= at && *end <= real);
            at = end.ok_or_else(|| self.damaged(NONSENSE))?;
            data += length;
            parts.push((offset, length));
        }
        if data != size {
            return Err(self.damaged(NONSENSE));
        }
        Ok(Sparse { parts, real })
    }

    fn damaged(&self, what: &'static str) -> TreeError {
        TreeError::Damaged { at: self.at, what }
    }
}

fn fill(source: &mut impl BufRead) -> Result<&[u8], TreeError> {
    // Called twice, because the borrow checker does not allow returning the borrow from inside the loop.
    while let Err(error) = source.fill_buf() {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(TreeError::Stream(error));
        }
    }
    source.fill_buf().map_err(TreeError::Stream)
}

fn padding_of(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

fn without_nul(mut name: Vec<u8>) -> Vec<u8> {
    while name.last() == Some(&0) {
        name.pop();
    }
    name
}
