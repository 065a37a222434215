//! Finds the files that the kernel opens in addition to a program when it executes it.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `PT_INTERP` of elf(5).
const PT_INTERP: u64 = 3;
/// The longest path that the kernel accepts (`PATH_MAX`).
const PATH_MAX: u64 = 4096;
/// The offset and the size in a program header of a 64-bit file, and the length of the header.
const HEADER: usize = 56;
/// The most program headers that are read: the kernel allows no more than fit in a page.
const HEADERS_MAX: u64 = 128;

/// The interpreter of a program: the loader of a dynamically linked one (`PT_INTERP`), or the interpreter in the first
/// line of a script. `None` for a statically linked program, and for anything that is not a little-endian 64-bit program.
pub(crate) fn interpreter(program: &Path) -> io::Result<Option<PathBuf>> {
    let file = File::open(program)?;
    let mut start = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(&file, 256), &mut start)?;
    if let Some(line) = start.strip_prefix(b"#!") {
        let word = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let mut words = word.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty());
        return Ok(words.next().map(path));
    }
    // ELF, 64 bits, little-endian; see elf(5).
    if !start.starts_with(b"\x7fELF\x02\x01") || start.len() < 64 {
        return Ok(None);
    }
    let (at, size, count) = (number(&start, 0x20, 8), number(&start, 0x36, 2), number(&start, 0x38, 2));
    if size != HEADER as u64 || count > HEADERS_MAX {
        return Ok(None);
    }
    let mut headers = vec![0; HEADER * usize::try_from(count).unwrap_or_default()];
    file.read_exact_at(&mut headers, at)?;
    let mut all = headers.chunks_exact(HEADER);
    let Some(found) = all.find(|header| number(header, 0, 4) == PT_INTERP) else { return Ok(None) };
    let (at, length) = (number(found, 8, 8), number(found, 32, 8).min(PATH_MAX));
    let mut name = vec![0; usize::try_from(length).unwrap_or_default()];
    file.read_exact_at(&mut name, at)?;
    Ok(Some(path(name.split(|byte| *byte == 0).next().unwrap_or_default())))
}

fn path(bytes: &[u8]) -> PathBuf {
    std::ffi::OsString::from_vec(bytes.to_vec()).into()
}

/// A little-endian number of this length.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_name_their_loader_and_scripts_their_shell() {
        let loader = interpreter(Path::new("/bin/sh")).unwrap().unwrap();
        assert!(loader.file_name().unwrap().to_str().unwrap().starts_with("ld-"), "{loader:?}");
        assert_eq!(interpreter(&loader).unwrap(), None, "a loader is linked statically");

        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        for (content, found) in [
            (&b"#! /bin/sh -e\nexit"[..], Some("/bin/sh")),
            (b"#!", None),
            (b"text", None),
            (b"\x7fELF\x02\x01 cut off", None),
        ] {
            std::fs::write(&file, content).unwrap();
            assert_eq!(interpreter(&file).unwrap(), found.map(PathBuf::from));
        }
        let mut hostile = std::fs::read("/bin/sh").unwrap()[..64].to_vec();
        hostile[0x38..0x3a].fill(0xff);
        std::fs::write(&file, &hostile).unwrap();
        assert_eq!(interpreter(&file).unwrap(), None);
    }
}
