//! Bounded log files. `NAME` is written to; once it has reached its limit, it is renamed to `NAME.<offset of its first byte>` and a new
//! file begins. One full file is kept. Offsets count every byte since the log began, over all rotations and boots, so that
//! a reader can continue where it was and knows how many bytes it missed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::exit::write_atomic;

/// Suffix of the file with the offset at which the current boot began.
const BOOT: &str = ".boot";

/// Maximum size of that file, in bytes.
const BOOT_MAX: u64 = 32;

/// The writer of a log. There is one per log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    directory: PathBuf,
    name: &'static str,
    limit: u64,
    file: Option<File>,
    base: u64,
    length: u64,
}

impl LogWriter {
    /// Opens a log for one more boot. The output of earlier boots stays, followed by `separator`.
    pub(crate) fn open(
        directory: &Path,
        name: &'static str,
        limit: u64,
        separator: &str,
    ) -> io::Result<Self> {
        let segments = segments(directory, name)?;
        let base = segments.last().map_or(0, |s| s.base + s.length);
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(directory.join(name))?;
        let length = file.metadata()?.len();
        let mut log = Self {
            directory: directory.to_owned(),
            name,
            limit: limit.max(1),
            file: Some(file),
            base,
            length,
        };
        if log.end() > 0 {
            log.write(separator.as_bytes())?;
        }
        write_atomic(&directory.join(format!("{name}{BOOT}")), log.end().to_string().as_bytes(), false)?;
        Ok(log)
    }

    /// Returns the offset after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.length
    }

    /// Appends `bytes`. On an error the rest of `bytes` is dropped; later writes are attempted anyway.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.length >= self.limit {
                self.rotate()?;
            }
            let path = self.directory.join(self.name);
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(OpenOptions::new().append(true).create(true).mode(0o600).open(path)?),
            };
            let room = usize::try_from(self.limit - self.length).unwrap_or(usize::MAX).min(bytes.len());
            match file.write(&bytes[..room]) {
                Ok(written) => {
                    self.length += written as u64;
                    bytes = &bytes[written..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let old = segments(&self.directory, self.name)?;
        std::fs::rename(
            self.directory.join(self.name),
            self.directory.join(format!("{}.{}", self.name, self.base)),
        )?;
        self.file = None;
        self.base += self.length;
        self.length = 0;
        for segment in old {
            std::fs::remove_file(segment.path)?;
        }
        Ok(())
    }
}

/// One full file of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    base: u64,
    length: u64,
    path: PathBuf,
}

/// Returns the full files of a log, oldest first.
fn segments(directory: &Path, name: &str) -> io::Result<Vec<Segment>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let file_name = entry.file_name();
        let Some(base) = file_name.to_str().and_then(|n| n.strip_prefix(name)?.strip_prefix('.')) else {
            continue;
        };
        if !base.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(base) = base.parse() else { continue };
        match entry.metadata() {
            Ok(metadata) => found.push(Segment { base, length: metadata.size(), path: entry.path() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    found.sort_by_key(|s| s.base);
    Ok(found)
}

/// Offset of the first byte, length, and the file.
type Part = (u64, u64, File);

/// A log as it was at one moment, for reading.
#[derive(Debug)]
pub(crate) struct LogReader {
    /// Oldest first, without gaps between them.
    parts: Vec<Part>,
    boot: u64,
}

impl LogReader {
    /// Opens a log. A missing log is empty.
    pub(crate) fn open(directory: &Path, name: &str) -> io::Result<Self> {
        // A rotation may happen meanwhile, which changes the list of full files. Since a whole file must be written between two rotations,
        // a few retries are enough.
        let mut tries = 0;
        loop {
            let (before, parts) = Self::look(directory, name)?;
            tries += 1;
            if segments(directory, name)? == before || tries == 16 {
                let boot = crate::os::regular::open(&directory.join(format!("{name}{BOOT}")))
                    .and_then(|file| io::read_to_string(file.take(BOOT_MAX)))
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0);
                return Ok(Self { parts, boot });
            }
        }
    }

    fn look(directory: &Path, name: &str) -> io::Result<(Vec<Segment>, Vec<Part>)> {
        let full = segments(directory, name)?;
        let mut parts = Vec::new();
        for segment in &full {
            if let Some(file) = open_existing(&segment.path)? {
                parts.push((segment.base, segment.length, file));
            }
        }
        let base = full.last().map_or(0, |s| s.base + s.length);
        if let Some(file) = open_existing(&directory.join(name))? {
            let length = file.metadata()?.len();
            parts.push((base, length, file));
        }
        Ok((full, parts))
    }

    /// Returns the offset of the first byte that is still stored.
    pub(crate) fn start(&self) -> u64 {
        self.parts.first().map_or(0, |(base, ..)| *base)
    }

    /// Returns the offset after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.parts.last().map_or(0, |(base, length, _)| base + length)
    }

    /// Returns the offset at which the current boot began.
    pub(crate) fn boot(&self) -> u64 {
        self.boot.min(self.end())
    }

    /// Reads at most `max` bytes from the offset `from` on.
    pub(crate) fn read(&mut self, from: u64, max: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut at = from.max(self.start());
        for (base, length, file) in &mut self.parts {
            let end = *base + *length;
            if at >= end || bytes.len() >= max {
                continue;
            }
            let want = (end - at).min((max - bytes.len()) as u64);
            file.seek(SeekFrom::Start(at.saturating_sub(*base)))?;
            let read = Read::by_ref(file).take(want).read_to_end(&mut bytes)?;
            at += read as u64;
            if (read as u64) < want {
                break;
            }
        }
        Ok(bytes)
    }
}

fn open_existing(path: &Path) -> io::Result<Option<File>> {
    match crate::os::regular::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Returns the last bytes of the current boot in a log, at most `max`.
pub(crate) fn tail(directory: &Path, name: &str, max: usize) -> Vec<u8> {
    let read = || {
        let mut log = LogReader::open(directory, name)?;
        let from = log.end().saturating_sub(max as u64).max(log.boot());
        log.read(from, max)
    };
    match read() {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, log = name, "cannot read the end of a log");
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn keeps_one_full_file_and_counts_on() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(directory.path(), "x.log", 10, "").unwrap();
        log.write(b"0123456789").unwrap();
        assert_eq!(names(directory.path()), ["x.log", "x.log.boot"]);
        log.write(b"abcdefghijKLMNOPQRSTuv").unwrap();
        assert_eq!(names(directory.path()), ["x.log", "x.log.20", "x.log.boot"]);
        let mut read = LogReader::open(directory.path(), "x.log").unwrap();
        assert_eq!((read.start(), read.end()), (20, 32));
        assert_eq!(read.read(0, 100).unwrap(), b"KLMNOPQRSTuv");
        assert_eq!(read.read(28, 3).unwrap(), b"STu");
        assert_eq!(read.read(32, 3).unwrap(), b"");
        assert_eq!(tail(directory.path(), "x.log", 5), b"RSTuv");
    }

    #[test]
    fn the_tail_is_of_the_current_boot_only() {
        let directory = tempfile::tempdir().unwrap();
        LogWriter::open(directory.path(), "x.log", 100, "\n--\n").unwrap().write(b"first").unwrap();
        let mut log = LogWriter::open(directory.path(), "x.log", 100, "\n--\n").unwrap();
        assert_eq!(tail(directory.path(), "x.log", 100), b"");
        log.write(b"second").unwrap();
        assert_eq!(tail(directory.path(), "x.log", 100), b"second");
        let mut read = LogReader::open(directory.path(), "x.log").unwrap();
        assert_eq!(read.read(0, 100).unwrap(), b"first\n--\nsecond");
    }

    #[test]
    fn a_missing_log_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(tail(directory.path(), "x.log", 10), b"");
        assert!(LogReader::open(&directory.path().join("none"), "x.log").is_err());
    }

    proptest! {
        #[test]
        fn holds_the_end_of_what_was_written(
            writes in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..40), any::<bool>()), 0..30),
            limit in 1u64..50,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let mut all = Vec::new();
            let mut log = LogWriter::open(directory.path(), "x.log", limit, "").unwrap();
            for (bytes, reopen) in &writes {
                if *reopen {
                    log = LogWriter::open(directory.path(), "x.log", limit, "").unwrap();
                }
                log.write(bytes).unwrap();
                all.extend_from_slice(bytes);
            }
            let mut read = LogReader::open(directory.path(), "x.log").unwrap();
            prop_assert_eq!(read.end(), all.len() as u64);
            prop_assert!(read.end() - read.start() <= 2 * limit);
            prop_assert!(read.end() - read.start() >= limit.min(all.len() as u64));
            let start = usize::try_from(read.start()).unwrap();
            prop_assert_eq!(read.read(0, usize::MAX).unwrap(), &all[start..]);
        }
    }
}
