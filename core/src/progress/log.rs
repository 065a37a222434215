//! The log of an operation: a file that can be read while it is written.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use fs_err::{File, OpenOptions};

/// The longest log, in bytes; the rest is dropped.
const LOG_MAX: u64 = 4 << 20;
/// The longest line, in bytes.
const LINE_MAX: usize = 4 << 10;

/// A log that is being written. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    bytes: u64,
}

impl Log {
    /// Opens the log at `path`: a new one, or an existing one to append to.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { inner: Arc::new(Mutex::new(Inner { file, bytes })) })
    }

    /// Writes a line, prefixed with the time.
    pub(crate) fn line(&self, text: &str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.bytes > LOG_MAX {
            return;
        }
        let text: String =
            nexus_wire::fold::fold(text).chars().filter(|c| !c.is_control()).take(LINE_MAX).collect();
        let mut line = format!("{} {text}\n", crate::os::clock::now());
        inner.bytes += line.len() as u64;
        if inner.bytes > LOG_MAX {
            line.push_str("the log is full: nothing more is written\n");
        }
        // A failed log line does not matter; a full disk makes the work itself fail.
        if let Err(error) = inner.file.write_all(line.as_bytes()) {
            tracing::debug!(%error, "a line of a log is lost");
        }
    }
}

/// Complete lines of the log at `path` from byte `from` on, and where they end: at most `max` bytes, but at least one line.
pub(crate) fn read(path: &Path, from: u64, max: usize) -> io::Result<(Vec<u8>, u64)> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), from)),
        Err(error) => return Err(error),
    };
    let from = from.min(file.metadata()?.len());
    file.seek(SeekFrom::Start(from))?;
    let mut text = Vec::new();
    file.take(max as u64).read_to_end(&mut text)?;
    // The last line may be incomplete.
    if let Some(end) = text.iter().rposition(|b| *b == b'\n') {
        text.truncate(end + 1);
    }
    let end = from + text.len() as u64;
    Ok((text, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_while_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert_eq!(read(&path, 0, 100).unwrap(), (Vec::new(), 0));
        let log = Log::open(&path).unwrap();
        log.line("one\u{1b}[2J\nstill one");
        let (text, end) = read(&path, 0, 1000).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with("Z onestill one\n"), "{text}");
        log.line(" 10%\r 50%\r100% \u{1b}[32mdone\u{1b}[0m\r");
        let (bar, end) = read(&path, end, 1000).unwrap();
        assert!(bar.ends_with(b"Z 100% done\n"), "{bar:?}");
        log.line("two");
        let (text, end) = read(&path, end, 1000).unwrap();
        assert!(text.ends_with(b" two\n") && text.iter().filter(|b| **b == b'\n').count() == 1);
        assert_eq!(read(&path, end, 1000).unwrap(), (Vec::new(), end));
        Log::open(&path).unwrap().line("three");
        assert!(read(&path, end, 1000).unwrap().0.ends_with(b" three\n"));
    }

    #[test]
    fn a_log_has_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = Log::open(&path).unwrap();
        for _ in 0..2000 {
            log.line(&"x".repeat(10_000));
        }
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() < (LOG_MAX as usize) + 10_000 && bytes.ends_with(b"nothing more is written\n"));
    }
}
