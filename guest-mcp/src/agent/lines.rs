//! JSON lines: reading them with a cap, and rmcp's transport over them.
//!
//! rmcp has a transport of its own, but it drops a line that is too long without an answer, keeps the largest buffer that
//! it ever needed, and does not cap what it sends.

use std::io;
use std::sync::Arc;

use nexus_schema::limits::LINE_MAX;
use rmcp::RoleServer;
use rmcp::model::{
    ClientJsonRpcMessage, ClientNotification, ErrorCode, ErrorData, JsonRpcMessage, RequestId,
    ServerJsonRpcMessage,
};
use rmcp::transport::Transport;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::Agent;
use super::calls::{Answers, Calls, PlainCall, encode};
use nexus_wire::duplex::{Reader, Writer};

/// How much is read at once.
const CHUNK: usize = 16 << 10;
/// A buffer that grew beyond this is given back once it is empty.
const KEEP: usize = 256 << 10;

/// Reads lines of at most `max` bytes.
pub(super) struct LineReader<R> {
    reader: R,
    max: usize,
    buffer: Vec<u8>,
    /// Bytes at the start of `buffer` that were given out.
    consumed: usize,
    /// Bytes of `buffer` that were searched for a newline.
    scanned: usize,
    /// Whether the rest of a line that was too long is being skipped.
    skipping: bool,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// A line, without its newline.
    Whole(&'a [u8]),
    /// A line that is too long; it is skipped.
    TooLong,
    /// The peer is gone.
    End,
}

enum Found {
    Whole { start: usize, end: usize },
    TooLong,
    End,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// Reads lines from `reader`.
    pub(super) fn new(reader: R, max: usize) -> Self {
        Self { reader, max, buffer: Vec::new(), consumed: 0, scanned: 0, skipping: false }
    }

    /// What it reads from.
    pub(super) fn get_mut(&mut self) -> &mut R {
        &mut self.reader
    }

    /// Whether a line is here already.
    pub(super) fn has_line(&self) -> bool {
        self.buffer[self.scanned..].contains(&b'\n')
    }

    /// The next line. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> io::Result<Line<'_>> {
        Ok(match self.find().await? {
            Found::Whole { start, end } => Line::Whole(&self.buffer[start..end]),
            Found::TooLong => Line::TooLong,
            Found::End => Line::End,
        })
    }

    async fn find(&mut self) -> io::Result<Found> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let (start, end) = (self.consumed, self.scanned + at);
                self.consumed = end + 1;
                self.scanned = self.consumed;
                if std::mem::take(&mut self.skipping) {
                    continue;
                }
                if end - start > self.max {
                    return Ok(Found::TooLong);
                }
                return Ok(Found::Whole { start, end });
            }
            self.scanned = self.buffer.len();
            if self.skipping {
                self.consumed = self.scanned;
            }
            self.compact();
            if self.buffer.len() > self.max {
                self.skipping = true;
                return Ok(Found::TooLong);
            }
            if self.buffer.capacity() - self.buffer.len() < CHUNK / 4 {
                self.buffer.reserve(CHUNK);
            }
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(Found::End);
            }
        }
    }

    /// Forgets what was given out.
    fn compact(&mut self) {
        self.buffer.drain(..self.consumed);
        self.scanned -= self.consumed;
        self.consumed = 0;
        if self.buffer.is_empty() && self.buffer.capacity() > KEEP {
            self.buffer = Vec::new();
        }
    }
}

/// rmcp's transport over JSON lines. Plain calls of tools pass rmcp by.
pub(super) struct LineTransport {
    reader: LineReader<Reader>,
    answers: Answers,
    calls: Calls,
    /// Whether the host has opened its session.
    is_open: bool,
}

impl LineTransport {
    /// Serves `agent`'s answers over a connection.
    pub(super) fn new(agent: Arc<Agent>, reader: Reader, writer: Writer) -> Self {
        let answers = Answers::new(agent.clone(), writer);
        let calls = Calls::new(agent, answers.clone());
        Self { reader: LineReader::new(reader, LINE_MAX), answers, calls, is_open: false }
    }
}

/// What a line is.
enum Said {
    Call(PlainCall),
    Other(ClientJsonRpcMessage),
    /// Not a message; who is told.
    Nonsense(Option<ServerJsonRpcMessage>),
}

fn decode(line: &[u8], is_open: bool) -> Said {
    // First: to try every kind of message in turn, as rmcp does, takes as long as everything else about a short call together.
    if is_open && let Ok(call) = serde_json::from_slice(line) {
        return Said::Call(call);
    }
    match serde_json::from_slice(line) {
        Ok(message) => Said::Other(message),
        Err(_) => Said::Nonsense(complaint(line)),
    }
}

/// What is left of a message that is not one: whom to answer.
#[derive(Deserialize)]
struct Stub {
    #[serde(default)]
    id: Option<RequestId>,
    #[serde(default)]
    method: Option<String>,
}

/// The answer to a line that is not a message, if it gets one.
fn complaint(line: &[u8]) -> Option<ServerJsonRpcMessage> {
    match serde_json::from_slice::<Stub>(line) {
        Ok(Stub { id: Some(id), method: Some(_) }) => {
            Some(JsonRpcMessage::error(ErrorData::invalid_request("malformed request", None), Some(id)))
        }
        // Notifications and answers are never answered.
        Ok(Stub { .. }) => None,
        Err(_) => Some(JsonRpcMessage::error(
            ErrorData::new(ErrorCode::PARSE_ERROR, "not a JSON object", None),
            None,
        )),
    }
}

impl Transport<RoleServer> for LineTransport {
    type Error = io::Error;

    fn send(
        &mut self,
        message: ServerJsonRpcMessage,
    ) -> impl Future<Output = Result<(), io::Error>> + Send + 'static {
        let line = encode(&message);
        let answers = self.answers.clone();
        async move { answers.write(&line?).await }
    }

    async fn receive(&mut self) -> Option<ClientJsonRpcMessage> {
        loop {
            if !self.reader.has_line() {
                self.answers.flush();
            }
            let complaint = match self.reader.next().await {
                Ok(Line::Whole(line)) => {
                    let line = line.strip_suffix(b"\r").unwrap_or(line);
                    if line.is_empty() {
                        continue;
                    }
                    match decode(line, self.is_open) {
                        Said::Call(call) => {
                            self.calls.begin(call);
                            continue;
                        }
                        Said::Other(message) if self.is_cancelled(&message) => continue,
                        Said::Other(message) => return Some(message),
                        Said::Nonsense(complaint) => complaint,
                    }
                }
                Ok(Line::TooLong) => {
                    let text = format!("a line holds at most {LINE_MAX} bytes");
                    Some(JsonRpcMessage::error(ErrorData::invalid_request(text, None), None))
                }
                Ok(Line::End) | Err(_) => return None,
            };
            if let Some(complaint) = complaint
                && self.send(complaint).await.is_err()
            {
                return None;
            }
        }
    }

    async fn close(&mut self) -> Result<(), io::Error> {
        self.answers.shutdown().await
    }
}

impl LineTransport {
    /// Looks at notifications on their way to rmcp: whether this one cancels a call that rmcp does not know of.
    fn is_cancelled(&mut self, message: &ClientJsonRpcMessage) -> bool {
        let JsonRpcMessage::Notification(notification) = message else { return false };
        match &notification.notification {
            ClientNotification::InitializedNotification(_) => self.is_open = true,
            ClientNotification::CancelledNotification(cancelled) => {
                return cancelled.params.request_id.as_ref().is_some_and(|id| self.calls.cancel(id));
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_found_across_reads_and_long_ones_are_skipped() {
        let input = tokio_test_reader(&[b"on", b"e\ntwo\n\n", b"far too ", b"long a line\nthree\nrest"]);
        let mut lines = LineReader::new(input, 8);
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b"one"));
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b"two"));
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b""));
        assert_eq!(lines.next().await.unwrap(), Line::TooLong);
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b"three"));
        assert_eq!(lines.next().await.unwrap(), Line::End);
    }

    #[test]
    fn plain_calls_are_told_from_what_is_left_to_rmcp() {
        for line in [
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"file_stat","arguments":{"path":"/"}}}"#,
            r#"{"params":{"arguments":{},"name":"os_info"},"method":"tools/call","id":"x\"y","jsonrpc":"2.0"}"#,
        ] {
            assert!(matches!(decode(line.as_bytes(), true), Said::Call(_)), "{line}");
            assert!(matches!(decode(line.as_bytes(), false), Said::Other(_)), "before the session: {line}");
        }
        for line in [
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"a","arguments":{},"_meta":{"progressToken":7}}}"#,
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"a"}}"#,
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/list","params":{}}"#,
            r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}"#,
        ] {
            assert!(matches!(decode(line.as_bytes(), true), Said::Other(_)), "{line}");
        }
        let wrong = r#"{"jsonrpc":"1.0","id":7,"method":"tools/call","params":{"name":"a","arguments":{}}}"#;
        assert!(matches!(decode(wrong.as_bytes(), true), Said::Nonsense(Some(_))));
        assert!(matches!(decode(b"{}", true), Said::Nonsense(None)));
    }

    /// A reader that gives one piece per read.
    fn tokio_test_reader(pieces: &[&'static [u8]]) -> impl AsyncRead + Unpin + use<> {
        struct Pieces(std::collections::VecDeque<&'static [u8]>);
        impl AsyncRead for Pieces {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                buffer: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                if let Some(piece) = self.0.pop_front() {
                    buffer.put_slice(piece);
                }
                std::task::Poll::Ready(Ok(()))
            }
        }
        Pieces(pieces.iter().copied().collect())
    }
}
