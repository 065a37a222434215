//! Reading a VM's console: what its guest wrote to the serial port.

use std::io;
use std::path::Path;

use nexus_wire::fold;

use super::log::{self, LogReader};
use crate::os::paths::vm_files;

/// A piece of a console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The guest's output; any bytes.
    pub text_bytes: Vec<u8>,
    /// Cursor of the next read.
    pub cursor: String,
    /// Number of bytes between the given cursor and this chunk that were lost by rotation.
    pub lost_bytes: u64,
}

/// Reads at most `max` bytes from `cursor` on; without one, the end of the console. A cursor stays valid across rotation,
/// reboots and restarts of the daemon. An invalid cursor fails with [`io::ErrorKind::InvalidInput`].
pub fn read(directory: &Path, cursor: Option<&str>, max: usize) -> io::Result<Chunk> {
    let asked: Option<u64> = cursor
        .map(str::parse)
        .transpose()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "invalid console cursor"))?;
    let mut console = LogReader::open(directory, vm_files::CONSOLE)?;
    let (from, lost_bytes) = match asked {
        Some(at) => {
            let at = at.min(console.end());
            (at.max(console.start()), console.start().saturating_sub(at))
        }
        None => (console.end().saturating_sub(max as u64).max(console.start()), 0),
    };
    let mut text_bytes = console.read(from, max)?;
    if from + (text_bytes.len() as u64) < console.end() {
        text_bytes.truncate(whole_characters(&text_bytes));
    }
    text_bytes.truncate(fold::whole(&text_bytes));
    let cursor = (from + text_bytes.len() as u64).to_string();
    Ok(Chunk { text_bytes, cursor, lost_bytes })
}

/// Lines to omit, by a part of their text: every healthy guest prints them, and they do not matter. Virtual machines without a PCI bus
/// have no configuration space to access.
const NO_NEWS: [&str; 1] = ["PCI: Fatal: No config space access function found"];

/// Makes a piece of a console readable: folded as a terminal would show it, without the lines to omit.
pub fn readable(bytes: &[u8]) -> String {
    let text = fold::fold(&String::from_utf8_lossy(bytes));
    let is_news = |line: &&str| !NO_NEWS.iter().any(|words| line.contains(words));
    text.split_inclusive('\n').filter(is_news).collect()
}

/// Returns the last bytes of the current boot, at most `max`; empty if there are none.
pub fn tail(directory: &Path, max: usize) -> Vec<u8> {
    log::tail(directory, vm_files::CONSOLE, max)
}

/// Returns the number of bytes without a UTF-8 character that is cut off at the end; all bytes if there is nothing but
/// the cut character.
fn whole_characters(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let at = bytes.len() - back;
        let width = match bytes[at] {
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            0x80..=0xBF => continue,
            _ => 1,
        };
        return if width > back && at > 0 { at } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::super::log::LogWriter;
    use super::*;

    #[test]
    fn a_cursor_reads_on_and_counts_what_was_lost() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        assert_eq!(
            read(directory, None, 10).unwrap(),
            Chunk { text_bytes: vec![], cursor: "0".into(), lost_bytes: 0 }
        );
        let mut log = LogWriter::open(directory, vm_files::CONSOLE, 10, "").unwrap();
        log.write(b"one\ntwo").unwrap();
        let first = read(directory, Some("0"), 4).unwrap();
        assert_eq!((first.text_bytes.as_slice(), first.cursor.as_str()), (&b"one\n"[..], "4"));
        let second = read(directory, Some(&first.cursor), 100).unwrap();
        assert_eq!(second.text_bytes, b"two");
        log.write(b"0123456789abcdefghij").unwrap();
        let third = read(directory, Some(&second.cursor), 100).unwrap();
        assert_eq!((third.text_bytes.as_slice(), third.lost_bytes), (&b"3456789abcdefghij"[..], 3));
        assert_eq!(read(directory, Some("99999"), 5).unwrap().cursor, "27");
        assert_eq!(read(directory, Some("x"), 5).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read(directory, None, 5).unwrap().text_bytes, b"fghij");
        assert_eq!(tail(directory, 3), b"hij");
    }

    #[test]
    fn a_healthy_console_is_quiet_and_is_read_as_a_terminal_shows_it() {
        let console = b"[    0.061208] PCI: Fatal: No config space access function found\r\n\x1b[0;32mok\x1b[0m\r\n 10%\r100%\r\n";
        assert_eq!(readable(console), "ok\n100%\n");
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let mut log = LogWriter::open(directory, vm_files::CONSOLE, 100, "").unwrap();
        log.write(b"one\x1b[0;3").unwrap();
        let first = read(directory, None, 100).unwrap();
        assert_eq!(readable(&first.text_bytes), "one");
        log.write(b"2mtwo\x1b[0m\n").unwrap();
        let second = read(directory, Some(&first.cursor), 100).unwrap();
        assert_eq!(readable(&second.text_bytes), "two\n");
    }

    #[test]
    fn a_chunk_does_not_cut_a_character() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        LogWriter::open(directory, vm_files::CONSOLE, 100, "").unwrap().write("aé€😀".as_bytes()).unwrap();
        let (mut cursor, mut all) = ("0".to_owned(), String::new());
        for _ in 0..4 {
            let chunk = read(directory, Some(&cursor), 4).unwrap();
            all.push_str(std::str::from_utf8(&chunk.text_bytes).unwrap());
            cursor = chunk.cursor;
        }
        assert_eq!(all, "aé€😀");
        assert_eq!(whole_characters(b"\xFF\xFF"), 2);
        assert_eq!(whole_characters(b"\xF0\x9F\x98"), 3);
        assert_eq!(whole_characters(b"\x80\x80\x80\x80"), 4);
    }
}
