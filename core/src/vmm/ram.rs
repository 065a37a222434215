//! A guest's memory as a file: its pages that are not all zeros, and copies that leave out the others.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::os::process;

/// Size of the pages that are left out if they are all zeros, in bytes.
pub(super) const PAGE: usize = 4096;
/// Size of the pieces that are read at once, in bytes; a multiple of [`PAGE`].
pub(super) const PIECE: usize = 1 << 20;

/// The name of the file that is the memory of a guest that can be saved.
pub(super) const MEMFD: &str = "guest-memory";
/// The end of that file's path in a jail.
const IN_JAIL: &str = "/memory/guest";

/// What the memory of a guest that can be saved occupies, in bytes, whether or not its VMM has touched it since it started. `None` if that cannot be
/// seen. Blocks.
pub(crate) fn occupied(shim: u32) -> Option<u64> {
    let memfd = format!("/memfd:{MEMFD}");
    process::allocated_to_open(shim, &|path| path.starts_with(&memfd) || path.ends_with(IN_JAIL))
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copied {
    /// Total length of the pages that are not all zeros, in bytes.
    pub bytes: u64,
    /// SHA-256, in hexadecimal, over each page that is not all zeros, in order: its offset (64 bits, little-endian), then its content.
    pub sha256: String,
}

/// The digest of a memory, over its pages that are not all zeros, in order: the offset of each (64 bits, little-endian), then its content.
#[derive(Debug, Default)]
pub(super) struct Digest(Sha256);

impl Digest {
    /// Adds pages in a row, which begin at an offset.
    pub(super) fn add(&mut self, at: u64, pages: &[u8]) {
        for (at, page) in numbered(at, pages) {
            self.0.update(at.to_le_bytes());
            self.0.update(page);
        }
    }

    /// The digest, in hexadecimal.
    pub(super) fn finish(self) -> String {
        data_encoding::HEXLOWER.encode(&self.0.finalize())
    }
}

/// Pages in a row, each with its offset.
pub(super) fn numbered(at: u64, pages: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    (at..).step_by(PAGE).zip(pages.chunks(PAGE))
}

/// Copies the memory in `from` to `to`, a new file, which becomes as long. Pages of zeros become holes. `is_wanted` is asked before each piece;
/// once it is not, the copy ends with [`io::ErrorKind::Interrupted`].
pub(super) fn copy(from: &File, to: &File, is_wanted: &dyn Fn() -> bool) -> io::Result<Copied> {
    let (mut bytes, mut digest) = (0, Digest::default());
    to.set_len(from.metadata()?.len())?;
    pages(from, is_wanted, &mut |at, pages| {
        digest.add(at, pages);
        bytes += pages.len() as u64;
        to.write_all_at(pages, at)
    })?;
    Ok(Copied { bytes, sha256: digest.finish() })
}

/// Returns the digest of a saved memory: that of [`Copied`]. Blocks.
pub(crate) fn sha256_of_memory(file: &Path) -> io::Result<String> {
    let mut digest = Digest::default();
    pages(&File::open(file)?, &|| true, &mut |at, pages| {
        digest.add(at, pages);
        Ok(())
    })?;
    Ok(digest.finish())
}

/// Returns the SHA-256 of a whole file, in hexadecimal. Blocks.
pub(crate) fn sha256_of_file(file: &Path) -> io::Result<String> {
    let mut file = File::open(file)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(data_encoding::HEXLOWER.encode(&hasher.finalize())),
            Ok(read) => hasher.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Fills `to`, a memory of zeros, with what is in `from`.
pub(super) fn fill(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    pages(from, &|| true, &mut |at, pages| to.write_all_at(pages, at))
}

/// Calls `each` with the pages of a memory that are not all zeros, in order: those in a row at once, at most [`PIECE`] bytes, with the offset of the
/// first.
pub(super) fn pages(
    from: &File,
    is_wanted: &dyn Fn() -> bool,
    each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let length = from.metadata()?.len();
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, length)? {
        at = start;
        while at < end {
            if !is_wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let want = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..want];
            from.read_exact_at(piece, at)?;
            pages_of(piece, at, each)?;
            at += want as u64;
        }
    }
    Ok(())
}

/// Returns the next range at or after `at` that may contain data, on the boundaries of pages.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start / PAGE as u64 * PAGE as u64,
        Err(Errno::NXIO) => return Ok(None),
        // The filesystem does not report holes: everything may be data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, length))),
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start.max(at))).unwrap_or(length);
    Ok(Some((start.max(at), end.next_multiple_of(PAGE as u64).min(length))))
}

/// Calls `each` with the pages of a piece that are not all zeros, those in a row at once.
fn pages_of(piece: &[u8], at: u64, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut give = |start: usize, end: usize| each(at + start as u64, &piece[start..end]);
    // The start of the pages that were not given yet.
    let mut pending: Option<usize> = None;
    for (number, page) in piece.chunks(PAGE).enumerate() {
        let start = number * PAGE;
        if page == &ZEROS[..page.len()] {
            if let Some(first) = pending.take() {
                give(first, start)?;
            }
        } else {
            pending.get_or_insert(start);
        }
    }
    pending.map_or(Ok(()), |first| give(first, piece.len()))
}

static ZEROS: [u8; PAGE] = [0; PAGE];

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a file of some mebibytes with these pages in it.
    fn file(length: u64, pages: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        for (offset, value) in pages {
            file.write_all_at(&[*value; PAGE], *offset).unwrap();
        }
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    #[test]
    fn copies_have_the_data_and_no_zeros() {
        use std::os::unix::fs::MetadataExt as _;
        let last = (3 << 20) - PAGE as u64;
        let pages =
            [(0, 1), (8192, 2), (12288, 3), (16384, 0), ((1 << 20) - 4096, 4), (1 << 20, 5), (last, 6)];
        let from = file(3 << 20, &pages);
        from.write_all_at(b"x", (2 << 20) + 5000).unwrap();
        let to = tempfile::tempfile().unwrap();
        let copied = copy(&from, &to, &|| true).unwrap();
        assert_eq!(copied.bytes, 7 * PAGE as u64);
        assert!(content(&to) == content(&from));
        assert!(to.metadata().unwrap().blocks() * 512 <= 64 << 10);
        // A copy of the copy is the same, whatever the holes are.
        let again = tempfile::tempfile().unwrap();
        assert_eq!(copy(&to, &again, &|| true).unwrap(), copied);
        let full = tempfile::tempfile().unwrap();
        full.write_all_at(&content(&from), 0).unwrap();
        assert_eq!(copy(&full, &tempfile::tempfile().unwrap(), &|| true).unwrap(), copied);
        // What a restore checks is what a save said.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        std::fs::write(&path, content(&to)).unwrap();
        assert_eq!(sha256_of_memory(&path).unwrap(), copied.sha256);
        let changed = File::options().write(true).open(&path).unwrap();
        changed.write_all_at(&[9], last - 5000).unwrap();
        assert_ne!(sha256_of_memory(&path).unwrap(), copied.sha256);
        let filled = file(3 << 20, &[]);
        fill(&to, &filled).unwrap();
        assert!(content(&filled) == content(&from));
    }

    #[test]
    fn the_digest_is_over_offsets_and_pages() {
        let from = file(1 << 20, &[(4096, 7), (40960, 8)]);
        let copied = copy(&from, &tempfile::tempfile().unwrap(), &|| true).unwrap();
        let mut expected = Sha256::new();
        for (offset, value) in [(4096u64, 7u8), (40960, 8)] {
            expected.update(offset.to_le_bytes());
            expected.update([value; PAGE]);
        }
        assert_eq!(copied.sha256, data_encoding::HEXLOWER.encode(&expected.finalize()));
        let moved = file(1 << 20, &[(8192, 7), (40960, 8)]);
        assert_ne!(copy(&moved, &tempfile::tempfile().unwrap(), &|| true).unwrap().sha256, copied.sha256);
    }

    #[test]
    fn an_empty_memory_is_all_holes() {
        let to = tempfile::tempfile().unwrap();
        let copied = copy(&file(1 << 20, &[]), &to, &|| true).unwrap();
        assert_eq!((copied.bytes, to.metadata().unwrap().len()), (0, 1 << 20));
    }

    #[test]
    fn a_copy_ends_when_nobody_wants_it() {
        let from = file(4 << 20, &[(0, 1), (3 << 20, 1)]);
        let to = tempfile::tempfile().unwrap();
        assert_eq!(copy(&from, &to, &|| false).unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}
