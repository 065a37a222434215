//! Reads a tar archive into a tree, and its contents into the image. Supports v7, ustar, pax, GNU with long names, and
//! sparse files of all but the oldest pax form.
//!
//! The archive is treated as hostile: every length is checked against a limit before anything is stored, and names are
//! only ever used in the tree.

mod sparse;

use std::io::{self, Read};

use nexus_tree::pax::{self, Records};
use tar::{EntryType, Header};

use super::contents::{Contents, Stop};
use super::tree::{Attributes, Body, Tree, refuse};
use super::{ImageError, Limits};
use crate::ext4::fill;
use crate::progress::Progress;

const BLOCK: usize = 512;

/// Reads the archive to its end.
pub(crate) fn read(
    source: impl Read,
    tree: &mut Tree,
    contents: &mut Contents,
    limits: &Limits,
    progress: &Progress,
) -> Result<(), ImageError> {
    let (source, global) = (Counted { source, at: 0 }, Records::default());
    Reader { source, tree, contents, limits, progress, extended: 0, global, is_layer: false }.read()
}

/// The same for a layer on top of the tree: it can hide what is below it.
pub(crate) fn read_layer(
    source: impl Read,
    tree: &mut Tree,
    contents: &mut Contents,
    limits: &Limits,
    progress: &Progress,
) -> Result<(), ImageError> {
    tree.begin_layer()?;
    let (source, global) = (Counted { source, at: 0 }, Records::default());
    Reader { source, tree, contents, limits, progress, extended: 0, global, is_layer: true }.read()
}

struct Reader<'a, R> {
    source: Counted<R>,
    tree: &'a mut Tree,
    contents: &'a mut Contents,
    limits: &'a Limits,
    progress: &'a Progress,
    /// How many bytes the extensions of the next entry have so far.
    extended: u64,
    global: Records,
    is_layer: bool,
}

/// What the extension headers before an entry say about it.
#[derive(Default)]
struct ReadAhead {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Records,
}

/// An entry's header, with the values of pax and GNU extensions applied.
struct Entry {
    path: Vec<u8>,
    link: Option<Vec<u8>>,
    size: u64,
    attributes: Attributes,
    /// The map of a sparse file in pax form.
    holes: Option<sparse::Holes>,
}

impl<R: Read> Reader<'_, R> {
    fn read(&mut self) -> Result<(), ImageError> {
        let mut ahead = ReadAhead::default();
        let mut shown = 0;
        while let Some(header) = self.header()? {
            self.progress.check()?;
            match header.entry_type() {
                EntryType::GNULongName => ahead.path = Some(without_nul(self.extended(&header)?)),
                EntryType::GNULongLink => ahead.link = Some(without_nul(self.extended(&header)?)),
                EntryType::XHeader => {
                    ahead.records.read(&self.extended(&header)?).map_err(|what| self.damaged(what))?;
                }
                EntryType::XGlobalHeader => {
                    let bytes = self.extended(&header)?;
                    self.global.read(&bytes).map_err(|what| self.damaged(what))?;
                    // They stay until the end of the archive.
                    if self.global.bytes() > self.limits.header_bytes {
                        return Err(self.extended_too_far());
                    }
                }
                kind => {
                    self.extended = 0;
                    self.entry(kind, &header, std::mem::take(&mut ahead))?;
                }
            }
            if self.contents.bytes() >> 20 != shown {
                shown = self.contents.bytes() >> 20;
                self.progress.advance(self.contents.bytes(), None);
            }
        }
        // The rest is padding. It must be read too: for a writer at the other end of a pipe, and for a checksum at the
        // end of a compressed stream.
        let mut rest = vec![0; 64 << 10];
        let mut padding: u64 = 0;
        loop {
            self.progress.check()?;
            let read = fill(&mut self.source, &mut rest).map_err(|e| self.unpack(e))?;
            padding += read as u64;
            if read == 0 {
                return Ok(());
            }
            if padding > self.limits.bytes {
                return Err(self.damaged("it has no end"));
            }
        }
    }

    /// The next header; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, ImageError> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        match fill(&mut self.source, block).map_err(|e| self.unpack(e))? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(self.damaged("it ends within a header")),
        }
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) })
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(self.damaged("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn extended_too_far(&self) -> ImageError {
        ImageError::TooLarge { limit: self.limits.header_bytes, what: "bytes in a header" }
    }

    /// The content of an extension's header.
    fn extended(&mut self, header: &Header) -> Result<Vec<u8>, ImageError> {
        let size = header.entry_size().map_err(|e| self.unpack(e))?;
        self.extended = self.extended.saturating_add(size);
        if self.extended > self.limits.header_bytes {
            return Err(self.extended_too_far());
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| self.damaged("a header is too large"))?];
        if fill(&mut self.source, &mut bytes).map_err(|e| self.unpack(e))? < bytes.len() {
            return Err(self.damaged("it ends within a header"));
        }
        self.pad(size)?;
        Ok(bytes)
    }

    fn entry(&mut self, kind: EntryType, header: &Header, ahead: ReadAhead) -> Result<(), ImageError> {
        let mut entry = self.describe(kind, header, ahead)?;
        // Old archivers mark a directory only by a trailing slash.
        let kind = match kind {
            EntryType::Regular if entry.path.ends_with(b"/") => EntryType::Directory,
            other if other.as_byte() == b'D' => EntryType::Directory,
            other => other,
        };
        if self.is_layer && self.tree.white_out(&entry.path)? {
            return self.skip(entry.size);
        }
        let attributes = std::mem::take(&mut entry.attributes);
        match kind {
            EntryType::Regular | EntryType::Continuous if entry.holes.is_some() => {
                let content = self.pax_sparse(&mut entry)?;
                self.tree.put(&entry.path, attributes, Body::File(content))
            }
            EntryType::Regular | EntryType::Continuous => {
                let taken = self.contents.take(&mut self.source, entry.size);
                let content = taken.map_err(|stop| self.stopped(stop))?;
                self.pad(entry.size)?;
                self.tree.put(&entry.path, attributes, Body::File(content))
            }
            EntryType::GNUSparse => {
                let content = self.sparse(header, &entry)?;
                self.pad(entry.size)?;
                self.tree.put(&entry.path, attributes, Body::File(content))
            }
            // A hard link has no content, whatever its header says (as in GNU tar).
            EntryType::Link => {
                let target = entry.link.ok_or_else(|| refuse(&entry.path, "it is a hard link to nothing"))?;
                self.tree.link(&entry.path, &target)
            }
            EntryType::Directory => {
                self.skip(entry.size)?;
                self.tree.put_directory(&entry.path, attributes)
            }
            EntryType::Symlink => {
                self.skip(entry.size)?;
                let target = entry.link.unwrap_or_default();
                self.tree.put(&entry.path, attributes, Body::Symlink(target.into()))
            }
            EntryType::Char | EntryType::Block => {
                self.skip(entry.size)?;
                let body = Body::Device {
                    block: kind == EntryType::Block,
                    major: number(header.device_major())
                        .ok_or_else(|| self.damaged("a device has no number"))?,
                    minor: number(header.device_minor())
                        .ok_or_else(|| self.damaged("a device has no number"))?,
                };
                self.tree.put(&entry.path, attributes, body)
            }
            EntryType::Fifo => {
                self.skip(entry.size)?;
                self.tree.put(&entry.path, attributes, Body::Fifo)
            }
            // The label of the archive.
            other if other.as_byte() == b'V' => self.skip(entry.size),
            _ => Err(refuse(&entry.path, "its type is unknown")),
        }
    }

    fn describe(&mut self, kind: EntryType, header: &Header, ahead: ReadAhead) -> Result<Entry, ImageError> {
        let records = [&ahead.records, &self.global];
        let pax = |key: &str| records.iter().find_map(|r| r.get(key));
        let number = |key: &str, here: io::Result<u64>| match pax(key) {
            Some(text) => pax::decimal(text).ok_or_else(|| self.damaged("a pax record holds no number")),
            None => here.map_err(|e| self.unpack(e)),
        };
        let path = pax("GNU.sparse.name")
            .or(pax("path"))
            .map(<[u8]>::to_vec)
            .or(ahead.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let holes = sparse::holes(pax).map_err(|what| refuse(&path, what))?;
        if path.is_empty() {
            return Err(self.damaged("an entry has no name"));
        }
        let link = pax("linkpath")
            .map(<[u8]>::to_vec)
            .or(ahead.link)
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let owner = |id: u64| u32::try_from(id).map_err(|_| refuse(&path, "its owner is out of range"));
        let (mtime, mtime_ns) = match pax("mtime") {
            Some(text) => {
                pax::time(text).ok_or_else(|| self.damaged("a pax record contains no valid time"))?
            }
            None => (header.mtime().unwrap_or(0).cast_signed(), 0),
        };
        let mut xattrs = std::collections::BTreeMap::new();
        for records in records.iter().rev() {
            xattrs.extend(records.xattrs());
        }
        let attributes = Attributes {
            mode: u16::try_from(header.mode().map_err(|e| self.unpack(e))? & 0o7777).unwrap_or(0),
            uid: owner(number("uid", header.uid())?)?,
            gid: owner(number("gid", header.gid())?)?,
            mtime,
            mtime_ns,
            xattrs: xattrs.into(),
        };
        let size = if kind == EntryType::Link { 0 } else { number("size", header.entry_size())? };
        Ok(Entry { path, link, size, attributes, holes })
    }

    /// Skips the padding after `size` bytes of content.
    fn pad(&mut self, size: u64) -> Result<(), ImageError> {
        let over = size % BLOCK as u64;
        if over == 0 { Ok(()) } else { self.drop_bytes(BLOCK as u64 - over) }
    }

    /// Skips content that is not used.
    fn skip(&mut self, size: u64) -> Result<(), ImageError> {
        if size > self.limits.bytes {
            return Err(ImageError::TooLarge { limit: self.limits.bytes, what: "bytes of content" });
        }
        self.drop_bytes(size)?;
        self.pad(size)
    }

    fn drop_bytes(&mut self, bytes: u64) -> Result<(), ImageError> {
        let mut buffer = [0; 8 << 10];
        let mut left = bytes;
        while left > 0 {
            self.progress.check()?;
            let want = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
            if fill(&mut self.source, &mut buffer[..want]).map_err(|e| self.unpack(e))? < want {
                return Err(self.damaged("it ends within an entry"));
            }
            left -= want as u64;
        }
        Ok(())
    }

    fn stopped(&self, stop: Stop) -> ImageError {
        match stop {
            Stop::Read(error) => self.unpack(error),
            Stop::Short => self.damaged("it ends within an entry"),
            Stop::Other(error) => error,
        }
    }

    fn damaged(&self, what: &'static str) -> ImageError {
        ImageError::Damaged { at: self.source.at, what }
    }

    fn unpack(&self, source: io::Error) -> ImageError {
        ImageError::Unpack { at: self.source.at, source }
    }
}

fn number(field: io::Result<Option<u32>>) -> Option<u32> {
    field.ok().flatten()
}

fn without_nul(mut name: Vec<u8>) -> Vec<u8> {
    while name.last() == Some(&0) {
        name.pop();
    }
    name
}

/// A reader that tracks its position.
struct Counted<R> {
    source: R,
    at: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.at += read as u64;
        Ok(read)
    }
}
