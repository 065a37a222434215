//! Plain calls of tools, answered without rmcp: what rmcp does around a short call takes longer than the call.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use nexus_schema::limits::GUEST_RESULT_MAX;
use rmcp::model::{
    CallToolRequestMethod, ErrorData, JsonObject, JsonRpcMessage, JsonRpcVersion2_0, ProgressNotification,
    ProgressNotificationParam, ProgressToken, RequestId, ServerJsonRpcMessage, ServerNotification,
    ServerResult,
};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Agent;
use crate::tools;
use nexus_wire::duplex::Writer;

/// Answers that wait together are written when they are more than so many bytes: whoever gets them works on them meanwhile.
const BATCH: usize = 2 << 10;

/// A call of a tool with nothing special about it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(Debug))]
pub(super) struct PlainCall {
    #[expect(dead_code, reason = "only what has it is a call")]
    jsonrpc: JsonRpcVersion2_0,
    id: RequestId,
    #[expect(dead_code, reason = "only what has it is a call")]
    method: CallToolRequestMethod,
    params: PlainParams,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(Debug))]
struct PlainParams {
    name: String,
    arguments: JsonObject,
    #[serde(default, rename = "_meta")]
    meta: PlainMeta,
}

/// What matters of a call's `_meta`.
#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(Debug))]
struct PlainMeta {
    #[serde(default, rename = "progressToken")]
    progress_token: Option<ProgressToken>,
    #[serde(default, rename = "dev.nexus/client")]
    client: Option<String>,
}

/// Calls that can be cancelled, and whether what they started is to be killed then.
type UnderWay = HashMap<RequestId, (CancellationToken, Arc<AtomicBool>)>;

/// The plain calls of one connection. Dropping it cancels them.
pub(super) struct Calls {
    agent: Arc<Agent>,
    answers: Answers,
    under_way: Arc<Mutex<UnderWay>>,
    closing: CancellationToken,
    _cancel: DropGuard,
}

impl Calls {
    /// Calls of `agent`'s tools.
    pub(super) fn new(agent: Arc<Agent>, answers: Answers) -> Self {
        let closing = CancellationToken::new();
        Self { agent, answers, under_way: Arc::default(), _cancel: closing.clone().drop_guard(), closing }
    }

    /// Does a call: at once what needs not wait, and its answer waits for [`Answers::flush`]; on a task of its own what does.
    pub(super) fn begin(&self, call: PlainCall) {
        let PlainCall { id, params: PlainParams { name, arguments, meta }, .. } = call;
        let (cancel, wants_kill) = (self.closing.child_token(), Arc::<AtomicBool>::default());
        match lock(&self.under_way).entry(id.clone()) {
            Entry::Vacant(place) => drop(place.insert((cancel.clone(), wants_kill.clone()))),
            Entry::Occupied(_) => {
                let error = ErrorData::invalid_request("a call with this id is under way", None);
                return self.answers.put(&JsonRpcMessage::error(error, Some(id)));
            }
        }
        let (agent, answers, under_way) = (self.agent.clone(), self.answers.clone(), self.under_way.clone());
        let mut work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            let settings = agent.settings();
            let tell = meta.progress_token.map(|token| answers.tell(token));
            let call = tools::Call {
                agent,
                settings,
                cancel: cancel.clone(),
                wants_kill,
                client: meta.client,
                tell,
            };
            let outcome = tools::call(&name, call, arguments).await;
            lock(&under_way).remove(&id);
            // Nobody waits for the answer to a cancelled call.
            if cancel.is_cancelled() {
                return;
            }
            answers.put(&match outcome {
                Ok(result) => JsonRpcMessage::response(ServerResult::CallToolResult(result), id),
                Err(error) => JsonRpcMessage::error(error, Some(id)),
            });
        });
        // The task looks at it again, and is woken by what it waits for then.
        if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            let answers = self.answers.clone();
            tokio::spawn(async move {
                work.await;
                answers.flush();
            });
        }
    }

    /// Cancels a call, and has killed what it started if that is wanted; false if it is none of these.
    pub(super) fn cancel(&self, id: &RequestId, kill: bool) -> bool {
        let Some((cancel, wants_kill)) = lock(&self.under_way).get(id).cloned() else { return false };
        wants_kill.store(kill, Ordering::Release);
        cancel.cancel();
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the answers of one connection go. Cheap to clone.
#[derive(Clone)]
pub(super) struct Answers {
    agent: Arc<Agent>,
    /// Lines that wait to be written together.
    waiting: Arc<Mutex<Vec<u8>>>,
    writer: Arc<tokio::sync::Mutex<Writer>>,
}

impl Answers {
    /// Answers of `agent`.
    pub(super) fn new(agent: Arc<Agent>, writer: Writer) -> Self {
        Self { agent, waiting: Arc::default(), writer: Arc::new(tokio::sync::Mutex::new(writer)) }
    }

    /// Tells a caller that waits how far its call is.
    fn tell(&self, token: ProgressToken) -> tools::Tell {
        let (answers, count) = (self.clone(), AtomicU64::new(0));
        Arc::new(move |text: &str| {
            let count = count.fetch_add(1, Ordering::Relaxed) + 1;
            let mut params = ProgressNotificationParam::new(token.clone(), count as f64);
            params.message = Some(text.to_owned());
            let note = ServerNotification::ProgressNotification(ProgressNotification::new(params));
            answers.put(&JsonRpcMessage::notification(note));
            answers.flush();
        })
    }

    /// Puts an answer to those that wait for [`Answers::flush`].
    fn put(&self, answer: &ServerJsonRpcMessage) {
        let Ok(line) = encode(answer) else { return };
        let length = {
            let mut waiting = lock(&self.waiting);
            waiting.extend_from_slice(&line);
            waiting.len()
        };
        if length > BATCH {
            self.flush();
        }
    }

    /// Writes what waits: at once if there is room for it, or else on a task of its own. That a connection is gone shows where it
    /// is read.
    pub(super) fn flush(&self) {
        let line = std::mem::take(&mut *lock(&self.waiting));
        if line.is_empty() {
            return;
        }
        let Ok(mut writer) = self.writer.clone().try_lock_owned() else {
            let this = self.clone();
            tokio::spawn(async move { this.write(&line).await });
            return;
        };
        let written = match writer.peer().try_write(&line) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => return,
        };
        if written == line.len() {
            return self.agent.answered.notify_waiters();
        }
        let agent = self.agent.clone();
        tokio::spawn(async move {
            if writer.write_all(&line[written..]).await.is_ok() {
                agent.answered.notify_waiters();
            }
        });
    }

    /// Writes a line.
    pub(super) async fn write(&self, line: &[u8]) -> io::Result<()> {
        self.writer.lock().await.write_all(line).await?;
        self.agent.answered.notify_waiters();
        Ok(())
    }

    /// Writes nothing more.
    pub(super) async fn shutdown(&self) -> io::Result<()> {
        self.writer.lock().await.shutdown().await
    }
}

/// The line of a message; of an error where a result is larger than may be sent.
pub(super) fn encode(message: &ServerJsonRpcMessage) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(512);
    serde_json::to_writer(&mut line, message)?;
    if let JsonRpcMessage::Response(response) = message
        && line.len() > GUEST_RESULT_MAX
    {
        let error = ErrorData::internal_error("the result is larger than may be sent", None);
        line.clear();
        let refusal: ServerJsonRpcMessage = JsonRpcMessage::error(error, Some(response.id.clone()));
        serde_json::to_writer(&mut line, &refusal)?;
    }
    line.push(b'\n');
    Ok(line)
}
