//! A small MCP client over the daemon's stream: one call at a time, with progress, a deadline and ctrl-c.

use std::path::Path;
use std::time::Duration;

use nexus_schema::ErrorCode;
use nexus_schema::error::{ERROR_META, FROM_META, GUEST, RESULT_META, STREAM_META};
use nexus_schema::limits::LINE_MAX;
use nexus_schema::tool::{GUEST_PREFIX, VM_ARGUMENT};
use nexus_schema::{ResultShape, Tool, ToolError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

use super::connect::{self, Seen};
use super::error::{Error, Refusal};
use super::hint::About;
use crate::lines::{Line, LineReader};
use crate::rpc::Envelope;

/// The protocol that the CLI speaks.
const PROTOCOL_VERSION: &str = "2025-11-25";
/// How long a call may take in addition to its requested wait.
const CALL_DEADLINE: Duration = Duration::from_secs(120);
/// How long the daemon may take to answer `initialize`.
const INITIALIZE_DEADLINE: Duration = Duration::from_secs(15);

/// A connection to the daemon.
#[derive(Debug)]
pub(crate) struct Client {
    reader: LineReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    next_id: u64,
}

/// A successful tool result.
#[derive(Debug)]
pub(crate) struct Reply {
    /// The whole result object, unchanged.
    pub(crate) raw: Box<RawValue>,
    /// `structuredContent`, unchanged.
    pub(crate) structured: Option<Box<RawValue>>,
    /// The content blocks.
    pub(crate) content: Vec<Content>,
    /// `_meta`.
    pub(crate) meta: Map<String, Value>,
}

/// A content block.
#[derive(Debug, Deserialize)]
pub(crate) struct Content {
    /// Its type, such as `text`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The text of a text block.
    #[serde(default)]
    pub(crate) text: String,
    #[serde(default, rename = "_meta")]
    meta: Map<String, Value>,
}

#[derive(Deserialize)]
struct CallResult {
    #[serde(default)]
    content: Vec<Content>,
    #[serde(default, rename = "structuredContent")]
    structured: Option<Box<RawValue>>,
    #[serde(default, rename = "isError")]
    is_error: bool,
    #[serde(default, rename = "_meta")]
    meta: Map<String, Value>,
}

/// The progress of a call, as the daemon reports it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Progress {
    /// The count.
    pub(crate) progress: f64,
    /// The total, if known.
    #[serde(default)]
    pub(crate) total: Option<f64>,
    /// The current step.
    #[serde(default)]
    pub(crate) message: Option<String>,
}

/// The options of a call, other than its arguments.
pub(crate) struct Options<'a> {
    /// The timeout for the answer.
    pub(crate) deadline: Duration,
    /// Receives progress.
    pub(crate) progress: Option<&'a mut dyn FnMut(Progress)>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { deadline: CALL_DEADLINE, progress: None }
    }
}

impl Options<'_> {
    /// For a call that may wait this long before it answers.
    pub(crate) fn waiting(wait: Duration) -> Self {
        Self { deadline: CALL_DEADLINE + wait, progress: None }
    }
}

impl Reply {
    /// The structured result: `structuredContent`, or for text-first tools the object under `_meta`.
    pub(crate) fn facts<T: DeserializeOwned>(&self, tool: &str, shape: ResultShape) -> Result<T, Error> {
        let garbled = |source| Error::Garbled { during: tool.into(), source };
        match (shape, &self.structured, self.meta.get(RESULT_META)) {
            (ResultShape::Structured, Some(raw), _) => serde_json::from_str(raw.get()).map_err(garbled),
            (ResultShape::Text, _, Some(value)) => T::deserialize(value).map_err(garbled),
            (ResultShape::Structured, None, _) | (ResultShape::Text, _, None) => {
                Err(Error::Unexpected { what: format!("the answer to {tool} has no structured result") })
            }
        }
    }

    /// The text of the block of a stream (`stdout`, `stderr`, `content`).
    pub(crate) fn stream(&self, name: &str) -> Option<&str> {
        let is_it = |c: &&Content| c.meta.get(STREAM_META).and_then(Value::as_str) == Some(name);
        self.content.iter().find(is_it).map(|c| c.text.as_str())
    }

    /// All text blocks.
    pub(crate) fn text(&self) -> String {
        let texts: Vec<_> =
            self.content.iter().filter(|c| c.kind == "text").map(|c| c.text.as_str()).collect();
        texts.join("\n")
    }
}

impl Client {
    /// Connects to the daemon and initializes the session.
    pub(crate) async fn connect(socket: &Path, token: Option<&str>) -> Result<Self, Error> {
        let stream = match connect::open(socket, token, connect::ALL).await {
            // A token that is limited to some tools is offered those, and no others.
            Err(Error::Tool(refusal)) if refusal.error.code == ErrorCode::Forbidden => {
                connect::open(socket, token, Seen::Daemon(None)).await?
            }
            other => other?,
        };
        let (read, writer) = stream.socket.into_split();
        let reader = LineReader::with_prefix(read, &stream.head, LINE_MAX, u64::MAX);
        let mut client = Self { reader, writer, next_id: 0 };
        let params = json!({
            "protocolVersion": PROTOCOL_VERSION,
            "capabilities": {},
            "clientInfo": { "name": "nexusctl", "version": env!("CARGO_PKG_VERSION") },
        });
        let options = Options { deadline: INITIALIZE_DEADLINE, progress: None };
        client.request("initialize", &params, "initialize", options).await?;
        client
            .send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }), "initialize")
            .await?;
        Ok(client)
    }

    /// Calls one of the host's own tools.
    pub(crate) async fn call<T: Tool>(&mut self, params: &T::Params) -> Result<T::Output, Error> {
        self.call_with::<T>(params, Options::default()).await?.facts(T::NAME, T::SHAPE)
    }

    /// The same with options, returning the unchanged reply.
    pub(crate) async fn call_with<T: Tool>(
        &mut self,
        params: &T::Params,
        options: Options<'_>,
    ) -> Result<Reply, Error> {
        self.call_raw(T::NAME, &arguments(T::NAME, params)?, options).await
    }

    /// Calls a guest's tool in a VM.
    pub(crate) async fn call_guest<T: Tool>(
        &mut self,
        vm: &str,
        params: &T::Params,
        options: Options<'_>,
    ) -> Result<Reply, Error> {
        let name = format!("{GUEST_PREFIX}{}", T::NAME);
        let mut arguments = arguments(&name, params)?;
        arguments.insert(VM_ARGUMENT.into(), vm.into());
        self.call_raw(&name, &arguments, options).await
    }

    /// Calls any tool.
    pub(crate) async fn call_raw(
        &mut self,
        tool: &str,
        arguments: &Map<String, Value>,
        options: Options<'_>,
    ) -> Result<Reply, Error> {
        let mut params = json!({ "name": tool, "arguments": arguments });
        if options.progress.is_some() {
            params["_meta"] = json!({ "progressToken": self.next_id + 1 });
        }
        let raw = self.request("tools/call", &params, tool, options).await?;
        let garbled = |source| Error::Garbled { during: tool.into(), source };
        let result: CallResult = serde_json::from_str(raw.get()).map_err(garbled)?;
        if !result.is_error {
            let CallResult { content, structured, meta, .. } = result;
            return Ok(Reply { raw, structured, content, meta });
        }
        let described = result.meta.get(ERROR_META).and_then(|e| ToolError::deserialize(e).ok());
        let text = || result.content.first().map(|c| c.text.clone()).unwrap_or_default();
        let error = described.unwrap_or_else(|| ToolError::internal(text()));
        let is_of_guest = result.meta.get(FROM_META).is_some_and(|from| from == GUEST);
        let about = About::of(arguments).where_failed(&error, arguments);
        let refusal = Refusal { error, about };
        Err(if is_of_guest { Error::Guest(refusal) } else { Error::Tool(refusal) })
    }

    /// Sends a request and waits for its answer. Ctrl-c cancels it.
    async fn request(
        &mut self,
        method: &str,
        params: &Value,
        during: &str,
        mut options: Options<'_>,
    ) -> Result<Box<RawValue>, Error> {
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        let deadline = Instant::now() + options.deadline;
        self.send(&request, during).await?;
        let outcome = tokio::select! {
            answer = self.answer(id, during, &mut options) => return answer,
            _ = tokio::signal::ctrl_c() => Error::Interrupted,
            () = tokio::time::sleep_until(deadline) => {
                Error::Timeout { during: during.into(), seconds: options.deadline.as_secs() }
            }
        };
        if method != "initialize" {
            let params = json!({ "requestId": id, "reason": outcome.to_string() });
            self.send(
                &json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": params }),
                during,
            )
            .await?;
        }
        Err(outcome)
    }

    /// Reads until the answer to request `id` comes.
    async fn answer(
        &mut self,
        id: u64,
        during: &str,
        options: &mut Options<'_>,
    ) -> Result<Box<RawValue>, Error> {
        let id_text = id.to_string();
        loop {
            let line = self.reader.next().await;
            let line = match line.map_err(|e| Error::Lost { during: during.into(), source: Some(e) })? {
                Some(Line::Whole(line)) => line,
                Some(Line::TooLong(_)) => return Err(Error::LineTooLong { max: LINE_MAX }),
                // The caller was already told.
                Some(Line::TooLongEnd { .. }) => continue,
                None => return Err(Error::Lost { during: during.into(), source: None }),
            };
            let Some(envelope) = Envelope::parse(line) else { continue };
            match (envelope.method.as_deref(), envelope.id()) {
                (Some("notifications/progress"), None) => {
                    if let (Some(report), Some(params)) = (options.progress.as_mut(), envelope.params) {
                        show_progress(params, id, report);
                    }
                }
                (Some(method), Some(request)) => {
                    let answer = answer_to(method, request);
                    self.send_line(answer, during).await?;
                }
                (Some(_), None) | (None, None) => {}
                (None, Some(answered)) if answered == id_text => {
                    return match (envelope.result, envelope.error) {
                        (Some(result), _) => Ok(result.to_owned()),
                        (None, error) => Err(protocol_error(error)),
                    };
                }
                // The late answer of an abandoned call.
                (None, Some(_)) => {}
            }
        }
    }

    async fn send(&mut self, message: &Value, during: &str) -> Result<(), Error> {
        self.send_line(message.to_string(), during).await
    }

    async fn send_line(&mut self, mut line: String, during: &str) -> Result<(), Error> {
        line.push('\n');
        let lost = |source| Error::Lost { during: during.into(), source: Some(source) };
        self.writer.write_all(line.as_bytes()).await.map_err(lost)
    }
}

fn arguments(tool: &str, params: &impl Serialize) -> Result<Map<String, Value>, Error> {
    match serde_json::to_value(params) {
        Ok(Value::Object(arguments)) => Ok(arguments),
        Ok(_) => Err(Error::Unexpected { what: format!("the arguments of {tool} are not a JSON object") }),
        Err(source) => Err(Error::Garbled { during: tool.into(), source }),
    }
}

fn show_progress(params: &RawValue, id: u64, report: &mut &mut dyn FnMut(Progress)) {
    #[derive(Deserialize)]
    struct Params {
        #[serde(rename = "progressToken")]
        token: Value,
        #[serde(flatten)]
        progress: Progress,
    }
    if let Ok(params) = serde_json::from_str::<Params>(params.get())
        && params.token == json!(id)
    {
        report(params.progress);
    }
}

/// The answer to a request of the daemon; only `ping` is supported.
fn answer_to(method: &str, id: &str) -> String {
    let id: Option<Box<RawValue>> = RawValue::from_string(id.into()).ok();
    let answer = if method == "ping" {
        json!({ "jsonrpc": "2.0", "id": id, "result": {} })
    } else {
        json!({ "jsonrpc": "2.0", "id": id, "error": { "code": -32601, "message": format!("nexusctl does not support {method}") } })
    };
    answer.to_string()
}

fn protocol_error(error: Option<&RawValue>) -> Error {
    #[derive(Deserialize)]
    struct RpcError {
        code: i64,
        message: String,
        #[serde(default)]
        data: Option<Value>,
    }
    match error.map(|e| serde_json::from_str::<RpcError>(e.get())) {
        Some(Ok(error)) => match error.data.and_then(|data| ToolError::deserialize(data).ok()) {
            Some(described) => described.into(),
            None => Error::Protocol { code: error.code, message: error.message },
        },
        Some(Err(_)) | None => Error::Protocol {
            code: -32603,
            message: "the daemon answered with neither result nor error".into(),
        },
    }
}

/// A value as it is on the wire.
pub(crate) fn raw(value: &impl Serialize) -> Result<Box<RawValue>, Error> {
    to_raw_value(value).map_err(|source| Error::Garbled { during: "output".into(), source })
}
