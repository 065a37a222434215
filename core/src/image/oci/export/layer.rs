//! The layer of an image: its whole tree as a tar archive, sorted by path, with pax headers for what others have no room for.

use std::collections::HashMap;
use std::io::{self, BufWriter, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use fs_err as fs;
use nexus_tree::pax;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use crate::ext4::{Filesystem, Inode, Kind};
use crate::image::filesystem::{FileReader, open, unreadable};
use crate::image::oci::digest::Digest;
use crate::image::oci::document::Blob;
use crate::image::tree::refuse;
use crate::image::{ImageError, Limits, METADATA, check_room};
use crate::progress::Progress;

const BLOCK: usize = 512;
/// How much of a file is copied at once.
const PIECE: usize = 256 << 10;
/// After how many bytes of content the free disk space is checked again.
const LOOK: u64 = 64 << 20;
/// The compression level: higher ones take far longer for little.
const LEVEL: u32 = 6;
/// The number of the root directory (`EXT4_ROOT_INO`).
const ROOT_INODE: u32 = 2;
/// The largest owner that a header has room for in digits.
const OWNER_MAX: u32 = 0o777_7777;
/// The largest size that a header has room for in digits.
const SIZE_MAX: u64 = 0o777_7777_7777;

/// A layer that was written.
pub(super) struct Layer {
    /// The packed archive.
    pub(super) blob: Blob,
    /// The digest of the unpacked archive.
    pub(super) diff_id: Digest,
    /// What was left out, and why.
    pub(super) notes: Vec<String>,
}

/// Writes the filesystem `image` as a layer to `file`, which does not exist. Blocks.
pub(super) fn write(image: &Path, file: &Path, progress: &Progress) -> Result<Layer, ImageError> {
    let filesystem = open(image)?;
    let created = fs::File::create_new(file).map_err(|e| ImageError::write(file, e))?;
    let packed = Hashing::new(BufWriter::with_capacity(1 << 20, created));
    let plain = Hashing::new(GzEncoder::new(packed, Compression::new(LEVEL)));
    let mut writer = Writer {
        filesystem: &filesystem,
        image,
        file,
        sink: plain,
        progress,
        done: 0,
        total: 0,
        unseen: 0,
        linked: HashMap::new(),
        sockets: 0,
        xattrs: 0,
    };
    writer.all()?;
    let Writer { sink: plain, sockets, xattrs, .. } = writer;
    let failed = |e| ImageError::write(file, e);
    let diff_id = Digest::of_pieces(plain.hash);
    let packed = plain.sink.finish().map_err(failed)?;
    let blob = Blob { digest: Digest::of_pieces(packed.hash), size: packed.bytes };
    packed.sink.into_inner().map_err(|e| failed(e.into_error()))?;
    let mut notes = Vec::new();
    for (count, what) in [
        (sockets, "sockets, which a layer cannot hold, were left out"),
        (xattrs, "extended attributes whose names a layer cannot hold were left out"),
    ] {
        if count > 0 {
            notes.push(format!("{count} {what}"));
        }
    }
    Ok(Layer { blob, diff_id, notes })
}

struct Writer<'a, W> {
    filesystem: &'a Filesystem,
    image: &'a Path,
    file: &'a Path,
    sink: W,
    progress: &'a Progress,
    /// Bytes of content that were written, and all of them.
    done: u64,
    total: u64,
    /// Bytes written since the disk was looked at.
    unseen: u64,
    /// The first path of each file with several names, by inode.
    linked: HashMap<u32, Vec<u8>>,
    sockets: u64,
    xattrs: u64,
}

impl<W: Write> Writer<'_, W> {
    fn all(&mut self) -> Result<(), ImageError> {
        let names = self.names()?;
        let root = self.filesystem.inode(ROOT_INODE).map_err(|e| unreadable(self.image, e))?;
        self.header(b"./", b"", &root, EntryType::Directory, 0)?;
        for (path, number) in names {
            self.progress.check()?;
            let inode = self.filesystem.inode(number).map_err(|e| unreadable(self.image, e))?;
            self.entry(path, &inode)?;
        }
        // Two blocks of zeros are the end.
        self.put(&[0; 2 * BLOCK])
    }

    /// Every path with its inode, sorted.
    fn names(&mut self) -> Result<Vec<(Vec<u8>, u32)>, ImageError> {
        let Limits { entries: limit, words: words_max, .. } = Limits::default();
        let (mut names, mut total, mut words) = (Vec::new(), 0_u64, 0_u64);
        let progress = self.progress;
        let walked = self.filesystem.walk(&mut |entry| {
            if !is_left_out(entry.path) {
                words = words.saturating_add(entry.path.len() as u64);
                names.push((entry.path.to_vec(), entry.inode.number));
                if entry.inode.kind() == Kind::File {
                    total = total.saturating_add(entry.inode.size);
                }
            }
            match progress.check().is_ok() && names.len() as u64 <= limit && words <= words_max {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        walked.map_err(|e| unreadable(self.image, e))?;
        progress.check()?;
        if names.len() as u64 > limit {
            return Err(ImageError::TooLarge { limit, what: "entries" });
        }
        if words > words_max {
            return Err(ImageError::TooLarge { limit: words_max, what: "bytes of names" });
        }
        names.sort_unstable();
        self.total = total;
        Ok(names)
    }

    fn entry(&mut self, mut path: Vec<u8>, inode: &Inode) -> Result<(), ImageError> {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        if name.starts_with(b".wh.") {
            return Err(refuse(&path, "names that begin with .wh. hide files in a layer"));
        }
        let kind = inode.kind();
        let is_linked = kind != Kind::Directory && inode.links > 1;
        if is_linked && let Some(first) = self.linked.get(&inode.number).cloned() {
            return self.header(&path, &first, inode, EntryType::Link, 0);
        }
        match kind {
            Kind::Directory => {
                path.push(b'/');
                self.header(&path, b"", inode, EntryType::Directory, 0)?;
            }
            Kind::File => {
                self.header(&path, b"", inode, EntryType::Regular, inode.size)?;
                self.content(inode)?;
            }
            Kind::Symlink => {
                let target = self.filesystem.link_target(inode).map_err(|e| unreadable(self.image, e))?;
                self.header(&path, &target, inode, EntryType::Symlink, 0)?;
            }
            Kind::CharDevice => self.header(&path, b"", inode, EntryType::Char, 0)?,
            Kind::BlockDevice => self.header(&path, b"", inode, EntryType::Block, 0)?,
            Kind::Fifo => self.header(&path, b"", inode, EntryType::Fifo, 0)?,
            Kind::Socket => {
                self.sockets += 1;
                return Ok(());
            }
            Kind::Other => return Err(refuse(&path, "its type is unknown")),
        }
        if is_linked {
            self.linked.insert(inode.number, path);
        }
        Ok(())
    }

    /// Writes the header of an entry, after a pax header if one is needed.
    fn header(
        &mut self,
        name: &[u8],
        link: &[u8],
        inode: &Inode,
        kind: EntryType,
        size: u64,
    ) -> Result<(), ImageError> {
        let mut header = Header::new_gnu();
        let mut records = Vec::new();
        if let Some(gnu) = header.as_gnu_mut() {
            for (field, value, key) in
                [(&mut gnu.name[..], name, "path"), (&mut gnu.linkname[..], link, "linkpath")]
            {
                field.iter_mut().zip(value).for_each(|(to, from)| *to = *from);
                if value.len() > field.len() {
                    pax::record(&mut records, key, value);
                }
            }
        }
        let (seconds, nanoseconds) = inode.mtime;
        if nanoseconds != 0 || seconds < 0 {
            pax::record(&mut records, "mtime", pax::time_text(seconds, nanoseconds).as_bytes());
        }
        for (key, owner) in [("uid", inode.uid), ("gid", inode.gid)] {
            if owner > OWNER_MAX {
                pax::record(&mut records, key, owner.to_string().as_bytes());
            }
        }
        if size > SIZE_MAX {
            pax::record(&mut records, "size", size.to_string().as_bytes());
        }
        if kind != EntryType::Link {
            self.xattr_records(inode, &mut records)?;
        }
        if !records.is_empty() {
            let mut extension = Header::new_gnu();
            if let Some(gnu) = extension.as_gnu_mut() {
                gnu.name.iter_mut().zip(b"@PaxHeader").for_each(|(to, from)| *to = *from);
            }
            extension.set_entry_type(EntryType::XHeader);
            extension.set_size(records.len() as u64);
            extension.set_mode(0o644);
            extension.set_cksum();
            self.put(extension.as_bytes())?;
            self.put(&records)?;
            self.pad(records.len() as u64)?;
        }
        header.set_entry_type(kind);
        header.set_mode(u32::from(inode.mode & 0o7777));
        header.set_uid(inode.uid.into());
        header.set_gid(inode.gid.into());
        header.set_mtime(u64::try_from(seconds).unwrap_or(0));
        header.set_size(size);
        if let (EntryType::Char | EntryType::Block, Some((major, minor))) = (kind, inode.device) {
            let numbered = header.set_device_major(major).and_then(|()| header.set_device_minor(minor));
            numbered.map_err(|e| ImageError::write(self.file, e))?;
        }
        header.set_cksum();
        self.put(header.as_bytes())
    }

    fn xattr_records(&mut self, inode: &Inode, records: &mut Vec<u8>) -> Result<(), ImageError> {
        let mut all = self.filesystem.xattrs(inode).map_err(|e| unreadable(self.image, e))?;
        all.sort_unstable();
        for (name, value) in all {
            match std::str::from_utf8(&name) {
                Ok(name) if !name.contains('=') => {
                    pax::record(records, &format!("SCHILY.xattr.{name}"), &value);
                }
                _ => self.xattrs += 1,
            }
        }
        Ok(())
    }

    fn content(&mut self, inode: &Inode) -> Result<(), ImageError> {
        let mut source = FileReader::new(self.filesystem, inode).take(inode.size);
        let mut buffer = vec![0; PIECE.min(usize::try_from(inode.size).unwrap_or(PIECE))];
        let mut written = 0_u64;
        while written < inode.size {
            self.progress.check()?;
            let read = source.read(&mut buffer).map_err(|e| ImageError::source(self.image, e))?;
            if read == 0 {
                let short = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(ImageError::source(self.image, short));
            }
            self.put(buffer.get(..read).unwrap_or_default())?;
            written += read as u64;
            self.done += read as u64;
            self.unseen += read as u64;
            self.progress.advance(self.done, Some(self.total));
            if self.unseen >= LOOK {
                self.unseen = 0;
                check_room(self.file.parent().unwrap_or(self.file), Limits::default().keep_free)?;
            }
        }
        self.pad(inode.size)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.sink.write_all(bytes).map_err(|e| ImageError::write(self.file, e))
    }

    /// Fills the block after this many bytes.
    fn pad(&mut self, bytes: u64) -> Result<(), ImageError> {
        let over = usize::try_from(bytes % BLOCK as u64).unwrap_or(0);
        match over {
            0 => Ok(()),
            over => self.put(&[0; BLOCK][over..]),
        }
    }
}

/// Whether a path is not part of what an image holds: what a check of the filesystem found, and what Nexus writes into each image.
fn is_left_out(path: &[u8]) -> bool {
    let lost = b"lost+found";
    let is_lost = path.strip_prefix(lost).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
    is_lost || METADATA.strip_prefix(b"/") == Some(path)
}

/// A writer that hashes and counts what is written.
struct Hashing<W> {
    sink: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Hashing<W> {
    fn new(sink: W) -> Self {
        Self { sink, hash: Sha256::new(), bytes: 0 }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(buffer)?;
        self.hash.update(buffer.get(..written).unwrap_or_default());
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}
