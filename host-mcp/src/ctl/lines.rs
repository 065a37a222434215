//! JSON-RPC messages, one a line: read with a cap, and looked at without a full decode.

use std::borrow::Cow;
use std::io;

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// What a line turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line without its newline is in the buffer.
    Complete,
    /// The line was longer than the cap; it was read to its end and dropped.
    TooLong,
    /// The stream ended.
    End,
}

/// Reads one line into `buffer`, without its newline. An incomplete last line is dropped.
///
/// Not safe to cancel in the middle of a line unless `buffer` is kept and given again: then reading goes on.
pub(crate) async fn read<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    buffer: &mut Vec<u8>,
    skipping: &mut bool,
    max: usize,
) -> io::Result<Line> {
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return Ok(Line::End);
        }
        let newline = available.iter().position(|b| *b == b'\n');
        let taken = newline.unwrap_or(available.len());
        if buffer.len() + taken > max {
            *skipping = true;
            buffer.clear();
        }
        if !*skipping {
            buffer.extend_from_slice(&available[..taken]);
        }
        reader.consume(newline.map_or(taken, |at| at + 1));
        if newline.is_some() {
            if std::mem::take(skipping) {
                return Ok(Line::TooLong);
            }
            if buffer.last() == Some(&b'\r') {
                buffer.pop();
            }
            return Ok(Line::Complete);
        }
    }
}

/// The outside of a JSON-RPC message.
#[derive(Debug, Deserialize)]
pub(crate) struct Envelope<'a> {
    /// The id of a request or of what it answers.
    #[serde(borrow, default)]
    pub(crate) id: Option<&'a RawValue>,
    /// The method of a request or notification; absent in an answer.
    #[serde(borrow, default)]
    pub(crate) method: Option<Cow<'a, str>>,
    /// The parameters.
    #[serde(borrow, default)]
    pub(crate) params: Option<&'a RawValue>,
    /// The result.
    #[serde(borrow, default)]
    pub(crate) result: Option<&'a RawValue>,
    /// The error.
    #[serde(borrow, default)]
    pub(crate) error: Option<&'a RawValue>,
}

impl<'a> Envelope<'a> {
    /// Looks at a line; `None` if it is no JSON object.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        // A derived struct would take an array too.
        let is_object = line.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
        is_object.then(|| serde_json::from_slice(line).ok()).flatten()
    }

    /// The id, unless it is null.
    pub(crate) fn id(&self) -> Option<&'a str> {
        self.id.map(RawValue::get).filter(|id| *id != "null")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(input: &[u8], max: usize) -> Vec<Result<String, Line>> {
        let mut reader = tokio::io::BufReader::with_capacity(3, input);
        let (mut lines, mut buffer, mut skipping) = (Vec::new(), Vec::new(), false);
        loop {
            match read(&mut reader, &mut buffer, &mut skipping, max).await.unwrap() {
                Line::Complete => lines.push(Ok(String::from_utf8(std::mem::take(&mut buffer)).unwrap())),
                Line::TooLong => lines.push(Err(Line::TooLong)),
                Line::End => return lines,
            }
        }
    }

    #[tokio::test]
    async fn lines_are_capped_and_the_next_one_is_whole() {
        let lines = all(b"abc\r\n\n123456789\nxyz\nrest", 8).await;
        assert_eq!(lines, [Ok("abc".into()), Ok(String::new()), Err(Line::TooLong), Ok("xyz".into())]);
    }

    #[test]
    fn envelopes_are_read() {
        let line = br#"{"jsonrpc":"2.0","id":"a b","method":"tools\/call","params":{"x":[1]}}"#;
        let envelope = Envelope::parse(line).unwrap();
        assert_eq!(envelope.id(), Some(r#""a b""#));
        assert_eq!(envelope.method.as_deref(), Some("tools/call"));
        assert_eq!(envelope.params.unwrap().get(), r#"{"x":[1]}"#);
        assert!(Envelope::parse(b"[1]").is_none());
        assert_eq!(Envelope::parse(br#"{"id":null}"#).unwrap().id(), None);
    }
}
