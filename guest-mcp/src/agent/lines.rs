//! rmcp's transport over JSON lines.
//!
//! rmcp has one of its own, but it drops a line that is too long without an answer, keeps the largest buffer that
//! it ever needed, and does not cap what it sends.

use std::io;
use std::sync::Arc;

use nexus_schema::limits::LINE_MAX;
use nexus_schema::link::CUT_OFF;
use rmcp::RoleServer;
use rmcp::model::{
    ClientJsonRpcMessage, ClientNotification, ErrorCode, ErrorData, JsonRpcMessage, RequestId,
    ServerJsonRpcMessage,
};
use rmcp::transport::Transport;
use serde::Deserialize;

use super::Agent;
use super::calls::{Answers, Calls, PlainCall, encode};
use nexus_wire::duplex::{Reader, Writer};
use nexus_wire::lines::{Line, LineReader};

/// A line longer than this will have no end, in bytes.
const ENDLESS: u64 = 256 << 20;

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
        Self { reader: LineReader::new(reader, LINE_MAX, ENDLESS), answers, calls, is_open: false }
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
            while let Some(line) = self.reader.take() {
                let complaint = match line {
                    Line::Whole([]) | Line::TooLongEnd { .. } => None,
                    Line::Whole(line) => match decode(line, self.is_open) {
                        Said::Call(call) => {
                            self.calls.begin(call);
                            None
                        }
                        Said::Other(message) if self.is_cancelled(&message) => None,
                        Said::Other(message) => return Some(message),
                        Said::Nonsense(complaint) => complaint,
                    },
                    Line::TooLong(_) => {
                        let text = format!("a line holds at most {LINE_MAX} bytes");
                        Some(JsonRpcMessage::error(ErrorData::invalid_request(text, None), None))
                    }
                };
                if let Some(complaint) = complaint {
                    self.send(complaint).await.ok()?;
                }
            }
            self.answers.flush();
            if !self.reader.fill().await.unwrap_or(false) {
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
                let is_cut_off = cancelled.params.reason.as_deref() == Some(CUT_OFF);
                let id = cancelled.params.request_id.as_ref();
                return id.is_some_and(|id| self.calls.cancel(id, !is_cut_off));
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_calls_are_told_from_what_is_left_to_rmcp() {
        for line in [
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"file_stat","arguments":{"path":"/"}}}"#,
            r#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"a","arguments":{},"_meta":{"progressToken":7,"x":1}}}"#,
            r#"{"params":{"arguments":{},"name":"os_info"},"method":"tools/call","id":"x\"y","jsonrpc":"2.0"}"#,
        ] {
            assert!(matches!(decode(line.as_bytes(), true), Said::Call(_)), "{line}");
            assert!(matches!(decode(line.as_bytes(), false), Said::Other(_)), "before the session: {line}");
        }
        for line in [
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
}
