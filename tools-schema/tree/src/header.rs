//! Writes the headers of entries: GNU's, preceded by a pax header for values that do not fit.

use std::io::{self, Write};

use rustix::fs::Stat;
use tar::{EntryType, GnuExtSparseHeader, Header};

use crate::attributes::Attribute;
use crate::pax;

/// The unit of an archive, in bytes.
pub(crate) const BLOCK: usize = 512;
/// The maximum number of parts in the header of a sparse file.
const PARTS: usize = 4;

/// The data of a sparse file: offset and length of each part, and the total length including holes.
#[derive(Debug)]
pub(crate) struct Sparse {
    pub(crate) parts: Vec<(u64, u64)>,
    pub(crate) real: u64,
}

impl Sparse {
    /// What of it is behind an offset.
    pub(crate) fn behind(mut self, from: u64) -> Self {
        self.parts.retain_mut(|(offset, length)| {
            let end = *offset + *length;
            *offset = from.max(*offset).min(end);
            *length = end - *offset;
            *length > 0
        });
        if self.parts.last().is_none_or(|(offset, length)| offset + length < self.real) {
            self.parts.push((self.real, 0));
        }
        self
    }
}

/// The fields of an entry's header.
pub(crate) struct Fields<'a> {
    pub(crate) kind: EntryType,
    pub(crate) name: &'a [u8],
    pub(crate) link: &'a [u8],
    pub(crate) stat: &'a Stat,
    /// Bytes of data that follow it.
    pub(crate) size: u64,
    pub(crate) sparse: Option<&'a Sparse>,
    /// Where the data starts, if the file's beginning is left out.
    pub(crate) from: u64,
    pub(crate) attributes: &'a [Attribute],
}

/// Writes all headers of an entry.
pub(crate) fn write(sink: &mut dyn Write, fields: &Fields<'_>) -> io::Result<()> {
    let mut header = Header::new_gnu();
    let (seconds, nanoseconds) = (fields.stat.st_mtime, fields.stat.st_mtime_nsec);
    let mut records = Vec::new();
    let Some(gnu) = header.as_gnu_mut() else { return Err(io::Error::other("a header without a form")) };
    if !put(&mut gnu.name, fields.name) {
        pax::record(&mut records, "path", fields.name);
    }
    if !put(&mut gnu.linkname, fields.link) {
        pax::record(&mut records, "linkpath", fields.link);
    }
    if nanoseconds != 0 || seconds < 0 {
        pax::record(&mut records, "mtime", pax::time_text(seconds, nanoseconds as u32).as_bytes());
    }
    if fields.from > 0 {
        pax::record(&mut records, pax::FROM, fields.from.to_string().as_bytes());
    }
    for (name, value) in fields.attributes {
        // A key ends at the first `=`.
        if let Some(name) = std::str::from_utf8(name).ok().filter(|name| !name.contains('=')) {
            pax::record(&mut records, &format!("{}{name}", pax::XATTR), value);
        }
    }
    if !records.is_empty() {
        let mut extension = Header::new_gnu();
        if let Some(gnu) = extension.as_gnu_mut() {
            put(&mut gnu.name, b"@PaxHeader");
        }
        extension.set_entry_type(EntryType::XHeader);
        extension.set_size(records.len() as u64);
        extension.set_mode(0o644);
        extension.set_cksum();
        sink.write_all(extension.as_bytes())?;
        sink.write_all(&records)?;
        pad(sink, records.len() as u64)?;
    }
    header.set_entry_type(fields.kind);
    header.set_mode(fields.stat.st_mode & 0o7777);
    header.set_uid(fields.stat.st_uid.into());
    header.set_gid(fields.stat.st_gid.into());
    header.set_mtime(u64::try_from(seconds).unwrap_or(0));
    header.set_size(fields.size);
    if matches!(fields.kind, EntryType::Char | EntryType::Block) {
        let device = fields.stat.st_rdev;
        header.set_device_major(rustix::fs::major(device))?;
        header.set_device_minor(rustix::fs::minor(device))?;
    }
    let mut more = &[][..];
    if let (Some(sparse), Some(gnu)) = (fields.sparse, header.as_gnu_mut()) {
        let (first, rest) = sparse.parts.split_at(sparse.parts.len().min(PARTS));
        for (place, part) in gnu.sparse.iter_mut().zip(first) {
            fill(place, *part);
        }
        gnu.set_real_size(sparse.real);
        gnu.set_is_extended(!rest.is_empty());
        more = rest;
    }
    header.set_cksum();
    sink.write_all(header.as_bytes())?;
    while !more.is_empty() {
        let mut block = GnuExtSparseHeader::new();
        let (now, rest) = more.split_at(more.len().min(block.sparse.len()));
        for (place, part) in block.sparse.iter_mut().zip(now) {
            fill(place, *part);
        }
        block.set_is_extended(!rest.is_empty());
        sink.write_all(block.as_bytes())?;
        more = rest;
    }
    Ok(())
}

/// Writes the padding after this many bytes.
pub(crate) fn pad(sink: &mut dyn Write, bytes: u64) -> io::Result<()> {
    let over = (bytes % BLOCK as u64) as usize;
    if over == 0 { Ok(()) } else { sink.write_all(&[0; BLOCK][over..]) }
}

fn fill(place: &mut tar::GnuSparseHeader, (offset, length): (u64, u64)) {
    place.set_offset(offset);
    place.set_length(length);
}

/// Puts a name into its field, truncated if necessary; returns whether it fits.
fn put(field: &mut [u8], name: &[u8]) -> bool {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
    length == name.len()
}
