//! Files out of a `.deb`: an `ar` archive with a compressed tar archive in it. Source of the format: `deb(5)`.
//!
//! The `ar` container is read here in a few lines, because the crates for it allocate whatever a header claims, or panic on
//! bad headers. A `.deb` needs none of the extensions that they support.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::asset::error::PackageProblem;
use crate::asset::stream::{Compression, capped, decompressed};

/// The most that a package may unpack to.
const MAX_UNPACKED: u64 = 8 << 30;
/// The longest name that Linux allows.
const MAX_NAME: u64 = 4096;
/// The most entries that a package may have.
const MAX_ENTRIES: usize = 1_000_000;

/// Passes each regular file that `chosen` accepts to `take`, with its path (`boot/vmlinuz-6.1`, no leading `./`). No file
/// may exceed `max_bytes`. Stops early once `take` has everything it needs.
pub(crate) fn each_file(
    deb: &Path,
    max_bytes: u64,
    chosen: &mut dyn FnMut(&str) -> bool,
    take: &mut dyn FnMut(&str, &mut dyn Read) -> Result<More, PackageProblem>,
) -> Result<(), PackageProblem> {
    let file = File::open(deb).map_err(PackageProblem::Data)?;
    let (data, compression) = data_member(BufReader::new(file))?;
    let tar = decompressed(data, compression).map_err(PackageProblem::Data)?;
    each_entry(capped(tar, MAX_UNPACKED), max_bytes, chosen, take)
}

/// Whether more files are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum More {
    Wanted,
    Enough,
}

fn each_entry(
    tar: impl Read,
    max_bytes: u64,
    chosen: &mut dyn FnMut(&str) -> bool,
    take: &mut dyn FnMut(&str, &mut dyn Read) -> Result<More, PackageProblem>,
) -> Result<(), PackageProblem> {
    let of_tar = |e| PackageProblem::of_read(e, "its data.tar");
    let mut seen = BTreeSet::new();
    let mut long_name = None;
    let mut archive = tar::Archive::new(tar);
    // Raw, because otherwise long names are read without a limit. dpkg supports only GNU's long names.
    for (number, entry) in archive.entries().map_err(of_tar)?.raw(true).enumerate() {
        let mut entry = entry.map_err(of_tar)?;
        if number >= MAX_ENTRIES {
            return Err(PackageProblem::TooLarge {
                what: "its list of files".into(),
                limit: MAX_ENTRIES as u64,
            });
        }
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            let mut name = read_whole("a long name", &mut entry, MAX_NAME)?;
            name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
            long_name = Some(name);
            continue;
        }
        if kind.is_gnu_longlink() {
            continue;
        }
        let path = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let path = inside(Path::new(OsStr::from_bytes(&path)))?;
        if !chosen(&path) || !seen.insert(path.clone()) {
            continue;
        }
        if !kind.is_file() {
            return Err(PackageProblem::NotAFile(path));
        }
        if entry.size() > max_bytes {
            return Err(PackageProblem::TooLarge { what: path, limit: max_bytes });
        }
        if take(&path, &mut entry)? == More::Enough {
            return Ok(());
        }
    }
    Ok(())
}

/// The path relative to the root; an error if it leaves the root.
fn inside(path: &Path) -> Result<String, PackageProblem> {
    let refused = || PackageProblem::UnsafePath(path.display().to_string());
    let mut inside = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) => inside.push(name),
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => return Err(refused()),
        }
    }
    // Names that are not UTF-8 are never chosen, but they do not make the package invalid.
    Ok(inside.to_string_lossy().into_owned())
}

const AR_MAGIC: &[u8; 8] = b"!<arch>\n";

/// Finds the data member. Members have a header of 60 bytes: name in 16, size in decimal at 48..58, then "`\n".
fn data_member<R: Read>(mut ar: R) -> Result<(io::Take<R>, Compression), PackageProblem> {
    let truncated = |_| PackageProblem::Ar("it ends too early");
    let mut magic = [0; 8];
    ar.read_exact(&mut magic).map_err(truncated)?;
    if &magic != AR_MAGIC {
        return Err(PackageProblem::Ar("it is none"));
    }
    // `debian-binary`, `control.tar.*`, `data.tar.*`, and perhaps a signature or two.
    for _ in 0..16 {
        let mut header = [0; 60];
        match ar.read_exact(&mut header) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(PackageProblem::NoData),
            other => other.map_err(PackageProblem::Data)?,
        }
        if &header[58..] != b"`\n" {
            return Err(PackageProblem::Ar("a header is damaged"));
        }
        let field =
            |range: std::ops::Range<usize>| std::str::from_utf8(&header[range]).unwrap_or("").trim_end();
        let size: u64 = field(48..58).parse().map_err(|_| PackageProblem::Ar("a size is no number"))?;
        let name = field(0..16).trim_end_matches('/');
        match name.strip_prefix("data.tar") {
            Some("") => return Ok((ar.take(size), Compression::Plain)),
            Some(".xz") => return Ok((ar.take(size), Compression::Xz)),
            Some(".gz") => return Ok((ar.take(size), Compression::Gzip)),
            Some(".zst") => return Ok((ar.take(size), Compression::Zstd)),
            Some(_) => return Err(PackageProblem::NoData),
            None => {}
        }
        // Members begin at even offsets.
        let padded = size.saturating_add(size % 2);
        let skipped = io::copy(&mut (&mut ar).take(padded), &mut io::sink()).map_err(PackageProblem::Data)?;
        if skipped < padded {
            return Err(PackageProblem::Ar("it ends too early"));
        }
    }
    Err(PackageProblem::NoData)
}

/// Reads a chosen file into memory.
pub(crate) fn read_whole(path: &str, file: &mut dyn Read, limit: u64) -> Result<Vec<u8>, PackageProblem> {
    let mut bytes = Vec::new();
    capped(file, limit).read_to_end(&mut bytes).map_err(|e| PackageProblem::of_read(e, path))?;
    Ok(bytes)
}
