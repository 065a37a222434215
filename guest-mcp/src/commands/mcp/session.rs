//! A running MCP server: JSON lines over its standard input and output.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::ToolError;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::task::JoinHandle;

use super::{cut, gone};
use crate::commands::launch::Started;
use crate::commands::streams::End;
use crate::commands::tree::Tree;
use crate::os::reason;
use crate::role::VERSION;

/// The requested revision of MCP.
const REVISION: &str = "2025-06-18";
/// The maximum length of a line from a server, in bytes.
const LINE_MAX: usize = 4 << 20;
/// The maximum length of its name and version, in characters.
const TITLE_MAX: usize = 200;
/// The maximum length of the id of a server's request, in bytes; requests with longer ones are skipped.
const ID_MAX: usize = 256;
/// How much of the end of its standard error an error message contains, in bytes.
const TAIL: usize = 1 << 10;
/// Timeout for the end of its standard error after its output has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A running server. Dropping this kills it.
#[derive(Debug)]
pub(super) struct Session {
    name: String,
    /// The server's own name and version.
    pub(super) title: String,
    /// The time of the last request.
    pub(super) used: Instant,
    child: Child,
    tree: Arc<Tree>,
    input: End,
    output: End,
    read: Vec<u8>,
    errors: Arc<Mutex<VecDeque<u8>>>,
    /// The task that reads its standard error; `None` once it has been waited for.
    reading_errors: Option<JoinHandle<()>>,
    last: u64,
    /// Whether it failed or got only a part of a line, so that it cannot be used any more.
    is_broken: bool,
}

/// A message of a server. What it contains is not parsed yet, because values take many times the memory of their text.
#[derive(Debug, Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(default)]
    method: Option<String>,
    #[serde(borrow, default)]
    result: Option<&'a RawValue>,
    #[serde(default)]
    error: Option<Failure>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    #[serde(default)]
    message: String,
}

/// The server's answer to `initialize`.
#[derive(Debug, Default, Deserialize)]
struct Greeting {
    #[serde(default, rename = "serverInfo")]
    server_info: ServerInfo,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ServerInfo {
    name: String,
    version: String,
}

impl Session {
    pub(super) fn over(name: &str, started: Started) -> Result<Self, ToolError> {
        let Started { child, tree, ends, .. } = started;
        let input = ends.stdin.ok_or_else(|| gone(name, "it has no input"))?;
        let errors: Arc<Mutex<VecDeque<u8>>> = Arc::default();
        let reading_errors = ends.stderr.map(|end| tokio::spawn(keep_tail(end, errors.clone())));
        Ok(Self {
            name: name.to_owned(),
            title: String::new(),
            used: Instant::now(),
            child,
            tree: Arc::new(tree),
            input,
            output: ends.stdout,
            read: Vec::new(),
            errors,
            reading_errors,
            last: 0,
            is_broken: false,
        })
    }

    /// Returns whether it cannot be used any more. Its output may end a moment before its process does.
    pub(super) fn is_over(&mut self) -> bool {
        self.is_broken || !matches!(self.child.try_wait(), Ok(None))
    }

    /// Runs the MCP handshake.
    pub(super) async fn greet(&mut self) -> Result<(), ToolError> {
        let asked = json!({
            "protocolVersion": REVISION, "capabilities": {},
            "clientInfo": { "name": "nexus-guest", "version": VERSION },
        });
        let answer = self.request("initialize", &asked).await?;
        // A server without a valid name is used all the same.
        let Greeting { server_info } = serde_json::from_str(answer.get()).unwrap_or_default();
        let title = format!("{} {}", server_info.name, server_info.version);
        self.title = cut(title.trim(), TITLE_MAX);
        self.write(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).await
    }

    /// Sends a request and waits for its answer. If this is dropped early, the answer is skipped later.
    pub(super) async fn request(&mut self, method: &str, params: &Value) -> Result<Box<RawValue>, ToolError> {
        self.used = Instant::now();
        self.last += 1;
        let id = self.last;
        self.write(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params })).await?;
        loop {
            let line = self.line().await?;
            let message: Message<'_> = match serde_json::from_slice(&line) {
                Ok(message) => message,
                Err(_) if line.iter().all(u8::is_ascii_whitespace) => continue,
                Err(error) => return Err(self.gone(&format!("its output is not valid MCP: {error}"))),
            };
            match (message.method, message.id) {
                (Some(asked), Some(theirs)) if theirs.get().len() <= ID_MAX => {
                    self.answer(&asked, theirs).await?;
                }
                (None, Some(of)) if of.get().parse::<u64>() == Ok(id) => {
                    self.used = Instant::now();
                    return match (message.result, message.error) {
                        (Some(result), None) => Ok(result.to_owned()),
                        (_, Some(error)) => Err(ToolError::invalid(format!(
                            "the MCP server {} refused: {}",
                            self.name,
                            cut(&error.message, 2000)
                        ))),
                        (None, None) => Err(self.gone("its answer has no result")),
                    };
                }
                // A notification, or an answer that is no longer awaited.
                _ => {}
            }
        }
    }

    /// Answers a request of the server to its client.
    async fn answer(&mut self, method: &str, id: &RawValue) -> Result<(), ToolError> {
        let answer = match method {
            "ping" => json!({ "jsonrpc": "2.0", "id": id, "result": {} }),
            _ => {
                json!({ "jsonrpc": "2.0", "id": id, "error": { "code": -32601, "message": "not offered here" } })
            }
        };
        self.write(&answer).await
    }

    async fn write(&mut self, message: &Value) -> Result<(), ToolError> {
        let mut line = serde_json::to_vec(message).map_err(|error| self.gone(&error.to_string()))?;
        line.push(b'\n');
        // Until the line is complete, because this may be dropped before that.
        self.is_broken = true;
        let mut rest = &line[..];
        while !rest.is_empty() {
            match self.input.write(rest).await {
                Ok(written) => rest = &rest[written..],
                Err(error) => {
                    self.hear_last_words().await;
                    return Err(self.gone(&reason(&error)));
                }
            }
        }
        self.is_broken = false;
        Ok(())
    }

    /// Reads the next line. Nothing is lost if this is dropped.
    async fn line(&mut self) -> Result<Vec<u8>, ToolError> {
        let mut scanned = 0;
        loop {
            if let Some(at) = self.read[scanned..].iter().position(|byte| *byte == b'\n') {
                let rest = self.read.split_off(scanned + at + 1);
                return Ok(std::mem::replace(&mut self.read, rest));
            }
            scanned = self.read.len();
            if scanned > LINE_MAX {
                return Err(self.gone(&format!("it wrote a line of more than {} MiB", LINE_MAX >> 20)));
            }
            let read = &mut self.read;
            let length = self.output.read_with(|read_into| {
                let mut chunk = [0; 16 << 10];
                let length = read_into(&mut chunk)?;
                read.extend_from_slice(&chunk[..length]);
                Ok(length)
            });
            match length.await {
                Ok(0) => {
                    self.hear_last_words().await;
                    return Err(self.gone("it ended"));
                }
                Ok(_) => {}
                Err(error) => return Err(self.gone(&reason(&error))),
            }
        }
    }

    /// Waits until its standard error has been read, with a timeout, because a process that it left behind may keep it open.
    async fn hear_last_words(&mut self) {
        if let Some(reading) = self.reading_errors.take() {
            let _ = tokio::time::timeout(LAST_WORDS, reading).await;
        }
    }

    /// Returns the error that it cannot be used, with the end of its standard error.
    fn gone(&mut self, why: &str) -> ToolError {
        self.is_broken = true;
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let tail = String::from_utf8_lossy(errors.make_contiguous()).into_owned();
        let error = gone(&self.name, why);
        match tail.trim() {
            "" => error,
            tail => error.hint(format!("it wrote: {}", cut(tail, TAIL))),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let tree = self.tree.clone();
        // Searching for its processes may take a moment on a busy machine.
        tokio::task::spawn_blocking(move || {
            tree.kill();
            tree.release();
        });
    }
}

/// Reads standard error, so that it never fills up, and keeps its end.
async fn keep_tail(end: End, tail: Arc<Mutex<VecDeque<u8>>>) {
    let read = || {
        end.read_with(|read_into| {
            let mut chunk = [0; 4 << 10];
            let length = read_into(&mut chunk)?;
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            tail.extend(&chunk[..length]);
            let over = tail.len().saturating_sub(TAIL);
            tail.drain(..over);
            Ok(length)
        })
    };
    while let Ok(1..) = read().await {}
}
