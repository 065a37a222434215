//! Digest of a memory file: SHA-256 over every page that is not all zeros, in order, each after its offset as 8 bytes, least significant first.
//! Holes and pages of zeros are the same, so the digest does not depend on how the file is stored.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use data_encoding::HEXLOWER;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

/// The size of a page, in bytes.
const PAGE: usize = 4096;
/// How many pages are read at once.
const PAGES: usize = 64;

/// The digest of a memory file, in hexadecimal. Blocks.
pub(crate) fn sha256(file: &Path) -> io::Result<String> {
    let file = File::open(file)?;
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; PAGE * PAGES];
    let mut at = 0;
    while at < length {
        at = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data - data % PAGE as u64,
            Err(Errno::NXIO) => break,
            // The filesystem does not report holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&file, SeekFrom::Hole(at)).unwrap_or(length).min(length);
        // A hole may begin within a page.
        let end = end.next_multiple_of(PAGE as u64);
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(buffer.len()).min(buffer.len());
            let read = read_full(&file, &mut buffer[..wanted], at)?;
            if read == 0 {
                break;
            }
            for page in buffer[..read].chunks(PAGE) {
                if page.iter().any(|byte| *byte != 0) {
                    hash.update(at.to_le_bytes());
                    hash.update(page);
                }
                at += PAGE as u64;
            }
        }
        at = at.max(end);
    }
    Ok(HEXLOWER.encode(&hash.finalize()))
}

fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The SHA-256 of a whole file, in hexadecimal. Blocks.
pub(crate) fn sha256_of_file(file: &Path) -> io::Result<String> {
    let file = File::open(file)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; PAGE * PAGES];
    let mut at = 0;
    loop {
        let read = read_full(&file, &mut buffer, at)?;
        if read == 0 {
            return Ok(HEXLOWER.encode(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
        at += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pages: &[(u64, u8)]) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        let file = File::create_new(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        for (page, byte) in pages {
            file.write_all_at(&[*byte; PAGE], page * PAGE as u64).unwrap();
        }
        (directory, path)
    }

    #[test]
    fn zeros_are_holes_and_everything_else_counts() {
        let (_one, sparse) = memory(&[(3, 7), (200, 9)]);
        let expected = {
            let mut hash = Sha256::new();
            for (page, byte) in [(3_u64, 7), (200, 9)] {
                hash.update((page * PAGE as u64).to_le_bytes());
                hash.update([byte; PAGE]);
            }
            HEXLOWER.encode(&hash.finalize())
        };
        assert_eq!(sha256(&sparse).unwrap(), expected);
        let (_two, written) = memory(&[(2, 0), (3, 7), (4, 0), (200, 9)]);
        assert_eq!(sha256(&written).unwrap(), expected);
        // Another byte, and the same page at another place.
        let file = File::options().write(true).open(&written).unwrap();
        file.write_all_at(&[1], 200 * PAGE as u64 + 5).unwrap();
        assert_ne!(sha256(&written).unwrap(), expected);
        let (_three, moved) = memory(&[(3, 7), (201, 9)]);
        assert_ne!(sha256(&moved).unwrap(), expected);
    }

    #[test]
    fn a_whole_file_has_its_usual_digest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let bytes = vec![5; PAGE * PAGES + 17];
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(sha256_of_file(&path).unwrap(), HEXLOWER.encode(&Sha256::digest(&bytes)));
    }
}
