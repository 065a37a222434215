//! JSON lines: reading them with a cap, and rmcp's transport over them.
//!
//! rmcp has a transport of its own, but it drops a line that is too long without an answer, keeps the largest buffer that
//! it ever needed, and does not cap what it sends.

use std::io;
use std::sync::Arc;

use nexus_schema::limits::{GUEST_RESULT_MAX, LINE_MAX};
use rmcp::RoleServer;
use rmcp::model::{
    CallToolRequest, CallToolRequestMethod, CallToolRequestParams, ClientJsonRpcMessage, ClientRequest,
    ErrorCode, ErrorData, JsonObject, JsonRpcMessage, JsonRpcRequest, JsonRpcVersion2_0, RequestId,
    ServerJsonRpcMessage,
};
use rmcp::transport::Transport;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Mutex;

use super::Agent;

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

/// rmcp's transport over JSON lines.
pub(super) struct LineTransport<R, W> {
    agent: Arc<Agent>,
    reader: LineReader<R>,
    writer: Arc<Mutex<W>>,
}

impl<R, W> LineTransport<R, W>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    /// Serves `agent`'s answers over a connection.
    pub(super) fn new(agent: Arc<Agent>, reader: R, writer: W) -> Self {
        Self { agent, reader: LineReader::new(reader, LINE_MAX), writer: Arc::new(Mutex::new(writer)) }
    }
}

/// A call of a tool with nothing special about it. rmcp's own way of reading tries every kind of message in turn, which takes
/// as long as everything else about a short call together.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainCall {
    jsonrpc: JsonRpcVersion2_0,
    id: RequestId,
    method: CallToolRequestMethod,
    params: PlainParams,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainParams {
    name: String,
    arguments: JsonObject,
}

/// The message in a line.
fn decode(line: &[u8]) -> serde_json::Result<ClientJsonRpcMessage> {
    if let Ok(call) = serde_json::from_slice(line) {
        let PlainCall { jsonrpc, id, method, params } = call;
        let mut request =
            CallToolRequest::new(CallToolRequestParams::new(params.name).with_arguments(params.arguments));
        request.method = method;
        let request = ClientRequest::CallToolRequest(request);
        return Ok(JsonRpcMessage::Request(JsonRpcRequest { jsonrpc, id, request }));
    }
    serde_json::from_slice(line)
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

fn encode(message: &ServerJsonRpcMessage) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(512);
    serde_json::to_writer(&mut line, message)?;
    Ok(line)
}

impl<R, W> Transport<RoleServer> for LineTransport<R, W>
where
    R: AsyncRead + Send + Unpin,
    W: AsyncWrite + Send + Unpin + 'static,
{
    type Error = io::Error;

    fn send(
        &mut self,
        message: ServerJsonRpcMessage,
    ) -> impl Future<Output = Result<(), io::Error>> + Send + 'static {
        let encoded = encode(&message).and_then(|line| match message {
            JsonRpcMessage::Response(response) if line.len() > GUEST_RESULT_MAX => {
                let error = ErrorData::internal_error("the result is larger than may be sent", None);
                encode(&JsonRpcMessage::error(error, Some(response.id)))
            }
            _ => Ok(line),
        });
        let writer = self.writer.clone();
        let agent = self.agent.clone();
        async move {
            let mut line = encoded?;
            line.push(b'\n');
            writer.lock().await.write_all(&line).await?;
            agent.answered.notify_waiters();
            Ok(())
        }
    }

    async fn receive(&mut self) -> Option<ClientJsonRpcMessage> {
        loop {
            let complaint = match self.reader.next().await {
                Ok(Line::Whole(line)) => {
                    let line = line.strip_suffix(b"\r").unwrap_or(line);
                    if line.is_empty() {
                        continue;
                    }
                    match decode(line) {
                        Ok(message) => return Some(message),
                        Err(_) => complaint(line),
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
        self.writer.lock().await.shutdown().await
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
    fn a_plain_call_is_read_as_rmcp_reads_it() {
        for line in [
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"file_stat","arguments":{"path":"/"}}}"#,
            r#"{"params":{"arguments":{},"name":"os_info"},"method":"tools/call","id":"x\"y","jsonrpc":"2.0"}"#,
        ] {
            assert!(serde_json::from_str::<PlainCall>(line).is_ok(), "{line}");
            let read: ClientJsonRpcMessage = serde_json::from_str(line).unwrap();
            assert_eq!(format!("{:?}", decode(line.as_bytes()).unwrap()), format!("{read:?}"));
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_rmcp() {
        for line in [
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"a","arguments":{},"_meta":{"progressToken":7}}}"#,
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"a"}}"#,
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/list","params":{}}"#,
            r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}"#,
            r#"{"jsonrpc":"1.0","id":7,"method":"tools/call","params":{"name":"a","arguments":{}}}"#,
        ] {
            assert!(serde_json::from_str::<PlainCall>(line).is_err(), "{line}");
            let read = serde_json::from_str::<ClientJsonRpcMessage>(line).ok();
            assert_eq!(format!("{:?}", decode(line.as_bytes()).ok()), format!("{read:?}"));
        }
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
