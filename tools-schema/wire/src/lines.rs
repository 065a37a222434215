//! Reads JSON lines from a stream with a limit on their length. An oversized line does not break the following ones.

use std::io;
use std::ops::Range;

use tokio::io::{AsyncRead, AsyncReadExt};

/// The size of one read, in bytes.
const CHUNK: usize = 16 << 10;
/// A buffer that has grown beyond this is freed once it is empty, in bytes.
const KEEP: usize = 128 << 10;
/// How much of the start of an oversized line is kept, in bytes.
const HEAD: usize = 4 << 10;
/// How much of the end of an oversized line is kept, in bytes.
const TAIL: usize = 256;

/// Reads lines of at most a given length. Of longer ones it returns the start and the end, and skips the rest.
///
/// In a hot loop, call [`Self::take`] until there is nothing more, then [`Self::fill`]; [`Self::next`] does both.
#[derive(Debug)]
pub struct LineReader<R> {
    read: R,
    buffer: Vec<u8>,
    /// Where the next line starts in `buffer`.
    start: usize,
    /// Up to here, `buffer` is known to contain no newline.
    scanned: usize,
    /// The maximum length of a returned line, in bytes.
    max: usize,
    /// The maximum length of a skipped line, in bytes; a longer one is an error.
    endless: u64,
    skipping: Option<Skipping>,
}

#[derive(Debug)]
struct Skipping {
    tail: Vec<u8>,
    total: u64,
}

/// A line, or the parts of an oversized one.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A complete line, without its end.
    Whole(&'a [u8]),
    /// The first bytes of a line that is too long. The rest is skipped.
    TooLong(&'a [u8]),
    /// The end of a line that was too long.
    TooLongEnd {
        /// Its last bytes.
        tail: Vec<u8>,
        /// Its length, in bytes.
        total: u64,
    },
}

/// The same as [`Line`], by its position in the buffer.
enum Found {
    Whole(Range<usize>),
    TooLong(Range<usize>),
    TooLongEnd(Skipping),
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// Reads lines of at most `max` bytes from `read`; a line longer than `endless` bytes is an error.
    pub fn new(read: R, max: usize, endless: u64) -> Self {
        Self { read, buffer: Vec::new(), start: 0, scanned: 0, max, endless, skipping: None }
    }

    /// Reads lines like [`Self::new`], with bytes that were already read.
    pub fn with_prefix(read: R, prefix: &[u8], max: usize, endless: u64) -> Self {
        let mut reader = Self::new(read, max, endless);
        reader.buffer.extend_from_slice(prefix);
        reader
    }

    /// Returns the underlying stream.
    pub fn get_ref(&self) -> &R {
        &self.read
    }

    /// Returns the underlying stream, for writing to it if it supports both directions.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.read
    }

    /// Reads more bytes; `false` at the end of the stream. Call it once [`Self::take`] has nothing more. Cancel-safe: nothing is lost.
    pub async fn fill(&mut self) -> io::Result<bool> {
        self.make_room()?;
        Ok(self.read.read_buf(&mut self.buffer).await? > 0)
    }

    /// Adds bytes that `read` appends; `None` if it has none.
    pub fn fill_by(
        &mut self,
        read: impl FnOnce(&R, &mut Vec<u8>) -> Option<io::Result<usize>>,
    ) -> Option<io::Result<bool>> {
        if let Err(error) = self.make_room() {
            return Some(Err(error));
        }
        Some(read(&self.read, &mut self.buffer)?.map(|length| length > 0))
    }

    /// Returns the next line; `None` at the end of the stream. Cancel-safe: nothing is lost.
    pub async fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        loop {
            if let Some(found) = self.find() {
                return Ok(Some(self.line(found)));
            }
            if !self.fill().await? {
                return Ok(None);
            }
        }
    }

    /// Makes room for one read.
    fn make_room(&mut self) -> io::Result<()> {
        if self.start == self.buffer.len() {
            self.start = 0;
            self.scanned = 0;
            self.buffer.clear();
            if self.buffer.capacity() > KEEP {
                self.buffer = Vec::new();
            }
        } else if self.start > CHUNK {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        if let Some(skipping) = &self.skipping
            && skipping.total > self.endless
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without an end"));
        }
        self.buffer.reserve(CHUNK);
        Ok(())
    }
}

impl<R> LineReader<R> {
    /// Takes the next line from the bytes that were read.
    pub fn take(&mut self) -> Option<Line<'_>> {
        let found = self.find()?;
        Some(self.line(found))
    }

    /// Returns whether [`Self::take`] has a complete line.
    pub fn has_line(&self) -> bool {
        memchr::memchr(b'\n', &self.buffer[self.scanned..]).is_some()
    }

    /// Takes the rest of the stream after its last newline: a line without an end, or an incomplete one.
    pub fn take_rest(&mut self) -> Option<&[u8]> {
        let start = std::mem::replace(&mut self.start, self.buffer.len());
        self.scanned = self.start;
        let rest = &self.buffer[start..];
        (self.skipping.is_none() && !rest.is_empty()).then(|| without_return(rest))
    }

    fn line(&self, found: Found) -> Line<'_> {
        match found {
            Found::Whole(place) => Line::Whole(without_return(&self.buffer[place])),
            Found::TooLong(place) => Line::TooLong(&self.buffer[place]),
            Found::TooLongEnd(Skipping { tail, total }) => Line::TooLongEnd { tail, total },
        }
    }

    fn find(&mut self) -> Option<Found> {
        let newline = memchr::memchr(b'\n', &self.buffer[self.scanned..]).map(|at| self.scanned + at);
        if let Some(skipping) = &mut self.skipping {
            let end = newline.unwrap_or(self.buffer.len());
            let rest = &self.buffer[self.start..end];
            skipping.total += rest.len() as u64;
            skipping.tail.extend_from_slice(&rest[rest.len().saturating_sub(TAIL)..]);
            let surplus = skipping.tail.len().saturating_sub(TAIL);
            skipping.tail.drain(..surplus);
            self.start = newline.map_or(end, |at| at + 1);
            self.scanned = self.start;
            newline?;
            return Some(Found::TooLongEnd(self.skipping.take()?));
        }
        let end = newline.unwrap_or(self.buffer.len());
        if end - self.start > self.max {
            let from = self.start;
            // If the newline has already arrived, the next call finds it.
            self.start = end;
            self.scanned = end;
            let tail = self.buffer[end - TAIL.min(end - from)..end].to_vec();
            self.skipping = Some(Skipping { tail, total: (end - from) as u64 });
            return Some(Found::TooLong(from..from + HEAD.min(end - from)));
        }
        self.scanned = end;
        let at = newline?;
        let from = std::mem::replace(&mut self.start, at + 1);
        self.scanned = self.start;
        Some(Found::Whole(from..at))
    }
}

fn without_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(input: &[u8], max: usize, chunk: usize) -> Vec<String> {
        let mut reader = LineReader::new(Chunked { input, chunk }, max, 1 << 30);
        let mut found = Vec::new();
        loop {
            while let Some(line) = reader.take() {
                found.push(match line {
                    Line::Whole(text) => format!("={}", String::from_utf8_lossy(text)),
                    Line::TooLong(head) => {
                        format!("<{}", String::from_utf8_lossy(&head[..head.len().min(4)]))
                    }
                    Line::TooLongEnd { tail, total } => {
                        format!(">{}:{total}", String::from_utf8_lossy(&tail[tail.len().saturating_sub(3)..]))
                    }
                });
            }
            if !reader.fill().await.unwrap() {
                return found;
            }
        }
    }

    /// Returns its input in pieces.
    struct Chunked<'a> {
        input: &'a [u8],
        chunk: usize,
    }

    impl AsyncRead for Chunked<'_> {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buf: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            let n = self.chunk.min(self.input.len()).min(buf.remaining());
            buf.put_slice(&self.input[..n]);
            self.input = &self.input[n..];
            std::task::Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn lines_come_whole_whatever_the_pieces() {
        let long = format!("abcd{}xyz", "-".repeat(40_000));
        let input = format!("one\r\n\n{long}\ntwo\n{long}\nlast without end");
        for chunk in [1, 2, 3, 7, 4096, 1 << 20] {
            let found = all(input.as_bytes(), 100, chunk).await;
            assert_eq!(
                found,
                ["=one", "=", "<abcd", ">xyz:40007", "=two", "<abcd", ">xyz:40007"],
                "in pieces of {chunk}"
            );
        }
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_an_error_and_takes_no_memory() {
        let mut reader = LineReader::new(tokio::io::repeat(b'x'), 1000, 1 << 20);
        let error = loop {
            while reader.take().is_some() {}
            match reader.fill().await {
                Ok(_) => assert!(reader.buffer.capacity() < 64 << 10),
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_reader_that_is_asked_for_the_next_line_waits_for_it() {
        let mut reader =
            LineReader::new(Chunked { input: b"one\ntwo\r\n\nfar too long a line\nx", chunk: 2 }, 8, 1 << 30);
        assert_eq!(reader.next().await.unwrap(), Some(Line::Whole(b"one")));
        assert_eq!(reader.next().await.unwrap(), Some(Line::Whole(b"two")));
        assert_eq!(reader.next().await.unwrap(), Some(Line::Whole(b"")));
        assert!(
            matches!(reader.next().await.unwrap(), Some(Line::TooLong(head)) if head.starts_with(b"far too"))
        );
        let end = Line::TooLongEnd { tail: b"far too long a line".to_vec(), total: 19 };
        assert_eq!(reader.next().await.unwrap(), Some(end));
        assert_eq!(reader.next().await.unwrap(), None);
        assert_eq!(reader.take_rest(), Some(&b"x"[..]));
        assert_eq!(reader.take_rest(), None);
    }

    #[tokio::test]
    async fn nothing_is_lost_where_a_wait_is_given_up() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut reader = LineReader::new(near, 100, 1 << 30);
        tokio::io::AsyncWriteExt::write_all(&mut far, b"half a ").await.unwrap();
        assert!(reader.fill().await.unwrap());
        assert!(reader.take().is_none());
        for _ in 0..3 {
            tokio::select! {
                biased;
                _ = reader.next() => panic!("there is no line yet"),
                () = tokio::task::yield_now() => {}
            }
        }
        tokio::io::AsyncWriteExt::write_all(&mut far, b"line\nand one more\n").await.unwrap();
        assert_eq!(reader.next().await.unwrap(), Some(Line::Whole(b"half a line")));
        assert!(reader.has_line());
        assert_eq!(reader.take(), Some(Line::Whole(b"and one more")));
        assert!(!reader.has_line());
    }

    #[tokio::test]
    async fn the_rest_of_a_line_that_was_too_long_is_no_last_line() {
        let mut reader = LineReader::new(&b"far too long a line"[..], 8, 1 << 30);
        assert!(matches!(reader.next().await.unwrap(), Some(Line::TooLong(_))));
        assert_eq!(reader.next().await.unwrap(), None);
        assert_eq!(reader.take_rest(), None);
    }
}
