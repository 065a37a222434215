//! Packs a tree into a tar stream, or determines what would be packed.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nexus_schema::tools::tree::{SkipReason, TreeSummary};
use rustix::fs::{FileType, Mode, SeekFrom};
use rustix::io::Errno;
use tar::EntryType;

use crate::attributes::{self, Attribute};
use crate::chunks::{CHUNK, Sink};
use crate::error::TreeError;
use crate::filter::Filter;
use crate::header::{self, BLOCK, Fields, Sparse};
use crate::report::{Watch, copied, skip};
use crate::source::{FILE, Source};
use crate::walk::{Entry, walk, why};

/// The maximum number of parts of a sparse file; a file with more is packed with its holes as zeros.
const PARTS_MAX: usize = 10_000;

/// The options of packing.
#[derive(Debug, Clone)]
pub struct Packing {
    /// The name of the tree in the archive; if empty, names start with the tree's contents.
    pub top: Vec<u8>,
    /// What is left out.
    pub filter: Filter,
    /// Whether devices and named pipes are packed; otherwise they are skipped.
    pub specials: bool,
    /// How many bytes at the beginning are left out, if the source is a file: [`Source::same_part`] says how many.
    pub from: u64,
}

/// Packs a tree. Unreadable files are skipped and counted.
pub fn pack(
    source: &Source,
    how: &Packing,
    sink: &mut dyn Sink,
    watch: &mut dyn Watch,
) -> Result<TreeSummary, TreeError> {
    let mut summary = TreeSummary::default();
    let mut packer = Packer { how, sink, watch, name: Vec::new(), linked: Vec::new() };
    walk(source, &how.filter, true, &mut summary, &mut |entry, file, summary| {
        packer.entry(entry, file, summary)
    })?;
    // Two empty blocks end an archive.
    sink.write_all(&[0; 2 * BLOCK]).and_then(|()| sink.flush()).map_err(TreeError::Stream)?;
    Ok(summary)
}

/// Returns what [`pack`] would pack, as far as known without reading the files.
pub fn plan(source: &Source, how: &Packing, watch: &mut dyn Watch) -> Result<TreeSummary, TreeError> {
    let mut summary = TreeSummary::default();
    walk(source, &how.filter, false, &mut summary, &mut |entry, _, summary| {
        watch.at(summary.bytes, summary.entries())?;
        if entry.linked_to.is_some() {
            summary.hard_links += 1;
        } else if !count(entry, how, summary) {
            return Ok(false);
        } else if entry.kind == FileType::RegularFile {
            summary.bytes += entry.stat.st_size.unsigned_abs();
        }
        copied(summary, entry.path);
        Ok(true)
    })?;
    Ok(summary)
}

/// Counts an entry by its type; returns false if it is skipped.
fn count(entry: &Entry<'_>, how: &Packing, summary: &mut TreeSummary) -> bool {
    match entry.kind {
        FileType::RegularFile => summary.files += 1,
        FileType::Directory => summary.directories += 1,
        FileType::Symlink => summary.symlinks += 1,
        FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice if how.specials => {
            summary.specials += 1;
        }
        _ => {
            skip(summary, entry.path, SkipReason::Special);
            return false;
        }
    }
    true
}

struct Packer<'a> {
    how: &'a Packing,
    sink: &'a mut dyn Sink,
    watch: &'a mut dyn Watch,
    name: Vec<u8>,
    linked: Vec<u8>,
}

impl Packer<'_> {
    fn entry(
        &mut self,
        entry: &Entry<'_>,
        opened: Option<OwnedFd>,
        summary: &mut TreeSummary,
    ) -> Result<bool, TreeError> {
        self.watch.at(summary.bytes, summary.entries())?;
        self.name = in_archive(&self.how.top, entry.path, entry.kind == FileType::Directory);
        if let Some(first) = entry.linked_to {
            self.linked = in_archive(&self.how.top, first, false);
            let linked = std::mem::take(&mut self.linked);
            self.header(EntryType::Link, &linked, entry, 0, None, &[])?;
            summary.hard_links += 1;
            copied(summary, entry.path);
            return Ok(true);
        }
        match entry.kind {
            FileType::RegularFile => {
                let opened = match opened {
                    Some(file) => Ok((*entry.stat, file)),
                    None => rustix::fs::openat(entry.parent, entry.name, FILE, Mode::empty())
                        .and_then(|file| Ok((rustix::fs::fstat(&file)?, file))),
                };
                match opened {
                    Ok((stat, file)) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                        let entry = Entry { stat: &stat, ..*entry };
                        self.file(&entry, file, summary)?;
                    }
                    Ok(_) => {
                        skip(summary, entry.path, SkipReason::Changed);
                        return Ok(false);
                    }
                    // The source itself.
                    Err(error) if entry.path.is_empty() => {
                        return Err(TreeError::file("read", entry.name.as_encoded_bytes(), error));
                    }
                    Err(error) => {
                        skip(summary, entry.path, why(error));
                        return Ok(false);
                    }
                }
            }
            FileType::Symlink => {
                let target = match rustix::fs::readlinkat(entry.parent, entry.name, Vec::new()) {
                    Ok(target) => target,
                    Err(error) => {
                        skip(summary, entry.path, why(error));
                        return Ok(false);
                    }
                };
                self.header(EntryType::Symlink, target.as_bytes(), entry, 0, None, &[])?;
            }
            FileType::Directory => self.header(EntryType::Directory, b"", entry, 0, None, &[])?,
            FileType::Fifo if self.how.specials => self.header(EntryType::Fifo, b"", entry, 0, None, &[])?,
            FileType::CharacterDevice if self.how.specials => {
                self.header(EntryType::Char, b"", entry, 0, None, &[])?;
            }
            FileType::BlockDevice if self.how.specials => {
                self.header(EntryType::Block, b"", entry, 0, None, &[])?;
            }
            _ => {}
        }
        let is_counted = count(entry, self.how, summary);
        if is_counted {
            copied(summary, entry.path);
        }
        Ok(is_counted)
    }

    fn header(
        &mut self,
        kind: EntryType,
        link: &[u8],
        entry: &Entry<'_>,
        size: u64,
        sparse: Option<&Sparse>,
        attributes: &[Attribute],
    ) -> Result<(), TreeError> {
        let from = if sparse.is_some() { self.from(entry) } else { 0 };
        let fields =
            Fields { kind, name: &self.name, link, stat: entry.stat, size, sparse, from, attributes };
        header::write(self.sink, &fields).map_err(TreeError::Stream)
    }

    /// Where the data of a file starts.
    fn from(&self, entry: &Entry<'_>) -> u64 {
        if entry.path.is_empty() { self.how.from } else { 0 }
    }

    fn file(&mut self, entry: &Entry<'_>, file: OwnedFd, summary: &mut TreeSummary) -> Result<(), TreeError> {
        let size = entry.stat.st_size.unsigned_abs();
        let has_holes = entry.stat.st_blocks.unsigned_abs() * 512 < size;
        let mut sparse = if has_holes { parts_of(&file, size) } else { None };
        let from = self.from(entry).min(size);
        if from > 0 {
            let whole = || Sparse { parts: vec![(0, size)], real: size };
            sparse = Some(sparse.unwrap_or_else(whole).behind(from));
        }
        let attributes = attributes::read(&file);
        let file = File::from(file);
        let Some(sparse) = sparse else {
            self.header(EntryType::Regular, b"", entry, size, None, &attributes)?;
            self.data(entry, &file, 0, size, summary)?;
            return header::pad(self.sink, size).map_err(TreeError::Stream);
        };
        let data = sparse.parts.iter().map(|(_, length)| length).sum();
        self.header(EntryType::GNUSparse, b"", entry, data, Some(&sparse), &attributes)?;
        for (offset, length) in &sparse.parts {
            self.data(entry, &file, *offset, *length, summary)?;
        }
        header::pad(self.sink, data).map_err(TreeError::Stream)
    }

    /// Writes this many bytes of a file. If the file became shorter, it is padded with zeros, and noted.
    fn data(
        &mut self,
        entry: &Entry<'_>,
        file: &File,
        offset: u64,
        length: u64,
        summary: &mut TreeSummary,
    ) -> Result<(), TreeError> {
        let (mut at, end) = (offset, offset + length);
        let mut source = file;
        // Whether the file's own position is where the next bytes are.
        let mut is_at = offset == 0;
        while at < end {
            let moved = self.sink.move_from(file.as_fd(), at, end - at).map_err(TreeError::Stream)?;
            is_at &= moved == 0;
            let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let read = match moved {
                0 => self.sink.write_from(want, &mut |buffer| match is_at {
                    true => source.read(buffer),
                    false => source.read_at(buffer, at),
                }),
                moved => Ok(Ok(moved)),
            };
            let read = match read.map_err(TreeError::Stream)? {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            if read == 0 {
                skip(summary, entry.path, SkipReason::Changed);
                return io::copy(&mut io::repeat(0).take(end - at), &mut self.sink)
                    .map(drop)
                    .map_err(TreeError::Stream);
            }
            at += read as u64;
            summary.bytes += read as u64;
            if at < end {
                self.watch.at(summary.bytes, summary.entries())?;
            }
        }
        Ok(())
    }
}

/// Returns an entry's name in the archive.
fn in_archive(top: &[u8], path: &[u8], is_directory: bool) -> Vec<u8> {
    let mut name = Vec::with_capacity(top.len() + path.len() + 2);
    name.extend_from_slice(top);
    if !top.is_empty() && !path.is_empty() {
        name.push(b'/');
    }
    name.extend_from_slice(path);
    if name.is_empty() {
        name.push(b'.');
    }
    if is_directory {
        name.push(b'/');
    }
    name
}

/// Returns the parts of a file that have data; `None` if that is unknown or there are too many.
fn parts_of(file: &OwnedFd, size: u64) -> Option<Sparse> {
    let (mut parts, mut at) = (Vec::new(), 0);
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < size => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(data)).ok()?.min(size);
        if end <= data || parts.len() >= PARTS_MAX {
            return None;
        }
        parts.push((data, end - data));
        at = end;
    }
    // The last part may be empty: it states the file's length to readers that only use the map.
    if parts.last().is_none_or(|(offset, length)| offset + length < size) {
        parts.push((size, 0));
    }
    rustix::fs::seek(file, SeekFrom::Start(0)).ok()?;
    Some(Sparse { parts, real: size })
}
