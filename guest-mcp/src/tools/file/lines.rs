//! `file_read` by lines. The reply counts bytes too, so that a caller can continue by either.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::file::{FileReadOutput, FileReadParams};
use tokio_util::sync::CancellationToken;

use super::failed;
use super::read::open_regular;
use crate::tools::text::{decode, incomplete_end, shown};
use crate::tools::{Block, Reply, cancelled, human_bytes};

/// The size of one read, in bytes.
const BLOCK: usize = 64 << 10;

/// The requested lines.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// The number of the first line, from 1.
    from: u64,
    /// The maximum number of lines.
    lines: u64,
    /// The maximum number of bytes.
    limit: usize,
    numbered: bool,
}

impl Wanted {
    /// Takes the lines that a call requests, within `limit` bytes.
    pub(super) fn of(params: &FileReadParams, limit: usize) -> Result<Self, ToolError> {
        if params.offset.is_some() {
            return Err(ToolError::invalid("give either offset, which counts bytes, or lines"));
        }
        if params.numbered && params.encoding == Some(ContentEncoding::Base64) {
            return Err(ToolError::invalid("numbered needs encoding text"));
        }
        let (from, lines) = (params.from_line.unwrap_or(1), params.lines.unwrap_or(u64::MAX));
        if from == 0 || lines == 0 {
            return Err(ToolError::invalid("from_line and lines must be at least 1"));
        }
        Ok(Self { from, lines, limit, numbered: params.numbered })
    }
}

/// Lines of a file.
pub(super) struct Lines {
    size: u64,
    /// Their offset in the file.
    offset: u64,
    bytes: Vec<u8>,
    /// The number of the first.
    from: u64,
    /// The number of the first requested line.
    wanted: u64,
    /// The number of lines before it; if the file ends before it, the number of all lines.
    before: u64,
    /// The number of lines, including a cut one.
    count: u64,
    /// Whether the last line is incomplete.
    is_cut: bool,
    eof: bool,
    numbered: bool,
}

/// Reads lines.
pub(super) fn lines(path: &Path, wanted: Wanted, cancel: &CancellationToken) -> Result<Lines, ToolError> {
    let file = open_regular("read", path)?;
    let fail = |error: io::Error| failed("read", path, error);
    let size = file.metadata().map_err(fail)?.len();
    let (mut buffer, mut at, mut line) = (vec![0; BLOCK], 0, 1);
    // Whether what was skipped ends within a line.
    let mut is_open = false;
    // Skip the lines before the requested ones.
    while line < wanted.from {
        if cancel.is_cancelled() {
            return Err(cancelled());
        }
        let block = read_some(&file, &mut buffer, at).map_err(fail)?;
        if block.is_empty() {
            break;
        }
        let mut ends = memchr::memchr_iter(b'\n', block);
        let missing = usize::try_from(wanted.from - line - 1).unwrap_or(usize::MAX);
        match ends.nth(missing) {
            Some(end) => (line, at) = (wanted.from, at + end as u64 + 1),
            None => {
                line += memchr::memchr_iter(b'\n', block).count() as u64;
                at += block.len() as u64;
                is_open = !block.ends_with(b"\n");
            }
        }
    }
    let mut part = Lines {
        size,
        offset: at,
        bytes: Vec::new(),
        from: line,
        wanted: wanted.from,
        before: line - 1 + u64::from(line < wanted.from && is_open),
        count: 0,
        is_cut: false,
        eof: false,
        numbered: wanted.numbered,
    };
    if line < wanted.from {
        part.eof = true;
        return Ok(part);
    }
    let (mut ends, mut shown) = (0, 0);
    'reading: loop {
        let block = read_some(&file, &mut buffer, at + part.bytes.len() as u64).map_err(fail)?;
        if block.is_empty() {
            part.eof = true;
            break;
        }
        for piece in block.split_inclusive(|byte| *byte == b'\n') {
            if ends == wanted.lines {
                break 'reading;
            }
            let number = if wanted.numbered { NUMBER } else { 0 };
            let room = wanted.limit.min(most(wanted.numbered).saturating_sub(shown + number));
            if part.bytes.len() + piece.len() > room {
                part.bytes.extend_from_slice(&piece[..room.saturating_sub(part.bytes.len())]);
                part.is_cut = true;
                break 'reading;
            }
            part.bytes.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                ends += 1;
                shown += number;
            }
        }
    }
    part.trim();
    part.count = ends.min(memchr::memchr_iter(b'\n', &part.bytes).count() as u64)
        + u64::from(!part.bytes.is_empty() && !part.bytes.ends_with(b"\n"));
    // Only a read shows whether there is more.
    if !part.eof && !part.is_cut {
        let end = at + part.bytes.len() as u64;
        part.eof = read_some(&file, &mut buffer[..1], end).map_err(fail)?.is_empty();
    }
    Ok(part)
}

/// The width of a line number with the tab after it, in bytes.
const NUMBER: usize = 8;

/// Returns the maximum total size of lines and numbers, in bytes.
const fn most(numbered: bool) -> usize {
    if numbered { OUTPUT_MAX as usize } else { usize::MAX }
}

fn read_some<'a>(file: &File, buffer: &'a mut [u8], at: u64) -> io::Result<&'a [u8]> {
    loop {
        match file.read_at(buffer, at) {
            Ok(count) => return Ok(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A file of /proc without more data at the moment.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(&[]),
            Err(error) => return Err(error),
        }
    }
}

impl Lines {
    /// Cuts a shortened part at the end of a line, or else at the end of a character.
    fn trim(&mut self) {
        if !self.is_cut {
            return;
        }
        if let Some(end) = memchr::memrchr(b'\n', &self.bytes) {
            self.bytes.truncate(end + 1);
            self.is_cut = false;
        } else {
            let cut = incomplete_end(&self.bytes);
            if cut < self.bytes.len() {
                self.bytes.truncate(self.bytes.len() - cut);
            }
        }
    }
}

/// Returns the reply to a call that requested lines.
pub(super) fn reply_lines(path: &str, part: Lines, encoding: ContentEncoding) -> Reply<FileReadOutput> {
    let read = part.bytes.len() as u64;
    let (text, lossy) = match encoding {
        ContentEncoding::Base64 => (data_encoding::BASE64.encode(&part.bytes), false),
        ContentEncoding::Text => decode(&part.bytes),
    };
    let end = part.offset + read;
    let mut header = format!("{} · ", shown(path));
    match part.count {
        0 => {
            let lines = if part.before == 1 { "line" } else { "lines" };
            header.push_str(&format!("no line {}: the file has {} {lines}", part.wanted, part.before));
        }
        1 => header.push_str(&format!("line {}", part.from)),
        count => header.push_str(&format!("lines {} to {}", part.from, part.from + count - 1)),
    }
    header.push_str(&format!(" · {}", human_bytes(read)));
    if part.eof {
        header.push_str(" · to the end");
    } else if part.is_cut {
        header.push_str(&format!(" · the line continues at offset {end}"));
    } else {
        header.push_str(&format!(" · continues at from_line {} (offset {end})", part.from + part.count));
    }
    if lossy {
        header.push_str("\nnot UTF-8, bytes were replaced; encoding base64 gives them exactly");
    }
    let facts = FileReadOutput {
        size_bytes: part.size,
        offset: part.offset,
        read_bytes: read,
        eof: part.eof,
        lossy,
        from_line: Some(part.from),
        lines: Some(part.count),
    };
    let mut reply = Reply::new(header, facts);
    if !text.is_empty() {
        let text = if part.numbered { number(&text, part.from) } else { text };
        reply.blocks.push(Block::stream("content", text));
    }
    reply
}

/// Puts the line numbers before the lines.
fn number(text: &str, from: u64) -> String {
    let lines = text.split_inclusive('\n').zip(from..);
    lines.map(|(line, number)| format!("{number:>6}\t{line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(content: &[u8], from: u64, count: u64, limit: usize) -> Lines {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let wanted = Wanted { from, lines: count, limit, numbered: false };
        lines(file.path(), wanted, &CancellationToken::new()).unwrap()
    }

    #[test]
    fn lines_are_found_and_counted() {
        let text = b"one\ntwo\r\n\nfour";
        for (from, count, limit, offset, bytes, got, eof) in [
            (1, 100, 100, 0, &text[..], 4, true),
            (1, 1, 100, 0, b"one\n", 1, false),
            (2, 2, 100, 4, b"two\r\n\n", 2, false),
            (4, 1, 100, 10, b"four", 1, true),
            (3, 2, 100, 9, b"\nfour", 2, true),
            (1, 100, 6, 0, b"one\n", 1, false),
            (1, 100, 2, 0, b"on", 1, false),
        ] {
            let part = of(text, from, count, limit);
            assert_eq!((part.offset, &part.bytes[..], part.count, part.eof), (offset, bytes, got, eof));
            assert_eq!(part.from, from);
        }
        let none = of(text, 9, 5, 100);
        assert_eq!((none.offset, none.count, none.eof), (14, 0, true));
        let none = of(b"", 1, 5, 100);
        assert_eq!((none.offset, none.count, none.eof), (0, 0, true));
        // Lines longer than one read.
        let long =
            [b"x".repeat(BLOCK - 1), b"\nsecond\n".to_vec(), b"y".repeat(2 * BLOCK), b"\nlast".to_vec()]
                .concat();
        assert_eq!(of(&long, 2, 1, 100).bytes, b"second\n");
        assert_eq!(of(&long, 4, 1, 100).bytes, b"last");
        assert_eq!(of(&long, 3, 1, BLOCK + 5).bytes.len(), BLOCK + 5);
        // Characters are never cut.
        assert_eq!(of("ää".as_bytes(), 1, 1, 3).bytes, "ä".as_bytes());
    }

    #[test]
    fn a_missing_line_is_told_with_the_number_of_lines() {
        for (text, from, said) in [
            ("", 1, "no line 1: the file has 0 lines"),
            ("one", 2, "no line 2: the file has 1 line"),
            ("one\ntwo\n", 3, "no line 3: the file has 2 lines"),
            ("one\ntwo\n", 100, "no line 100: the file has 2 lines"),
            ("one\ntwo", 100, "no line 100: the file has 2 lines"),
            ("one\ntwo\n\n", 100, "no line 100: the file has 3 lines"),
        ] {
            let reply = reply_lines("/x", of(text.as_bytes(), from, 5, 100), ContentEncoding::Text);
            assert_eq!(reply.header, format!("/x · {said} · 0 B · to the end"), "{text:?}");
        }
    }

    #[test]
    fn numbers_stand_before_lines() {
        assert_eq!(number("a\nb", 9), "     9\ta\n    10\tb");
    }
}
