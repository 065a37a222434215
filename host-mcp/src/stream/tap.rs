//! Sees each line of a client before rmcp: forwards calls of guest tools, and cancels them.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_core::host::lines::Line;
use nexus_core::host::rpc::Envelope;
use nexus_core::link::wire::{self, write_string};
use nexus_core::link::{GuestProgress, Link, Outbox};
use nexus_schema::ToolError;
use rmcp::model::ClientJsonRpcMessage;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::time::interval;

use crate::forward::{
    self, Answer, Asleep, CallParams, CallResult, Client, Era, ForwardedCall, Handle, Pace, Refusal,
};
use crate::greeting;
use crate::tasks;

/// How much output may be buffered for a client before progress is dropped, in bytes.
const PROGRESS_BACKLOG: usize = 256 << 10;
/// How often to check for a client that has sent its last line.
const GONE_CHECK: Duration = Duration::from_millis(50);

/// Sees each line before rmcp.
pub(super) struct Tap {
    client: Client,
    pub(super) outbox: Outbox,
    /// Whether the client has opened a session.
    pub(super) is_initialized: AtomicBool,
    /// Whether it said then that it can deal with tasks.
    takes_tasks: AtomicBool,
    /// Whether the line that is being skipped was already refused.
    is_refused: AtomicBool,
    /// Running forwarded calls, by the client's id in its original JSON.
    calls: Mutex<HashMap<Arc<str>, Call>>,
    /// Links with calls that are not written yet.
    unwritten: Mutex<Vec<Link>>,
    /// Notifies the reader when all calls are answered.
    pub(super) answered: Notify,
}

struct Call {
    handle: Handle,
    progress: Option<Arc<Reported>>,
}

/// The progress of a call that the client was told.
struct Reported {
    token: Box<str>,
    pace: Mutex<Pace>,
}

impl Reported {
    fn by(token: &str) -> Self {
        Self { token: token.into(), pace: Mutex::new(Pace::start()) }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tap {
    /// For one client whose answers are written to `outbox`.
    pub(super) fn new(client: Client, outbox: Outbox) -> Arc<Self> {
        Arc::new(Self {
            client,
            outbox,
            is_initialized: AtomicBool::new(false),
            takes_tasks: AtomicBool::new(false),
            is_refused: AtomicBool::new(false),
            calls: Mutex::default(),
            unwritten: Mutex::default(),
            answered: Notify::new(),
        })
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<Arc<str>, Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the calls that were started.
    pub(super) fn flush(&self) {
        let links = std::mem::take(&mut *self.unwritten.lock().unwrap_or_else(PoisonError::into_inner));
        for link in links {
            link.flush();
        }
    }

    /// Writes calls to a guest at the next [`Tap::flush`].
    fn flush_later(&self, link: &Link) {
        let mut unwritten = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
        if !unwritten.iter().any(|other| other.is_same(link)) {
            unwritten.push(link.clone());
        }
    }

    pub(super) fn has_calls(&self) -> bool {
        !self.calls().is_empty()
    }

    /// Handles one line; adds messages for rmcp to `decoded`.
    pub(super) fn line(self: &Arc<Self>, line: Line<'_>, decoded: &mut VecDeque<ClientJsonRpcMessage>) {
        match line {
            Line::Whole(line) if line.trim_ascii().is_empty() => {}
            Line::Whole(line) => {
                let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line);
                match Envelope::parse(line) {
                    Some(message) => decoded.extend(self.message(line, &message)),
                    None => self.batch(line, decoded),
                }
            }
            Line::TooLong(head) => {
                let id = wire::id_at_start(head);
                self.is_refused.store(id.is_some(), Ordering::Relaxed);
                if id.is_some() {
                    self.refuse(id, -32600, "the message is longer than 16 MiB");
                }
            }
            Line::TooLongEnd { tail, .. } => {
                if !self.is_refused.load(Ordering::Relaxed) {
                    self.refuse(wire::id_at_end(&tail), -32600, "the message is longer than 16 MiB");
                }
            }
        }
    }

    /// Handles one message, or returns it for rmcp.
    fn message(self: &Arc<Self>, text: &[u8], message: &Envelope<'_>) -> Option<ClientJsonRpcMessage> {
        if self.forward(message) || self.cancel(message) {
            return None;
        }
        if let Some(name) = forward::name_of_client(message) {
            self.client.introduced(&name);
        }
        self.decode(text, message)
    }

    /// Handles a line that is not a single message: an array of several, as in revisions up to 2025-03-26, or an invalid line.
    /// Each message is answered separately.
    fn batch(self: &Arc<Self>, line: &[u8], decoded: &mut VecDeque<ClientJsonRpcMessage>) {
        let Ok(messages) = serde_json::from_slice::<Vec<&RawValue>>(line) else {
            return self.refuse(None, -32700, "not a JSON-RPC message in one line of JSON");
        };
        if messages.is_empty() {
            self.refuse(None, -32600, "a batch without messages");
        }
        for text in messages {
            match Envelope::parse(text.get().as_bytes()) {
                Some(message) => decoded.extend(self.message(text.get().as_bytes(), &message)),
                None => self.refuse(None, -32600, "not a JSON-RPC 2.0 message"),
            }
        }
    }

    fn refuse(&self, id: Option<&str>, code: i32, message: &str) {
        self.outbox.push(|out| {
            out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
            out.extend_from_slice(id.unwrap_or("null").as_bytes());
            out.extend_from_slice(format!(r#","error":{{"code":{code},"message":"#).as_bytes());
            write_string(out, message);
            out.extend_from_slice(b"}}");
        });
    }

    /// Decodes a message for rmcp; a message that cannot be decoded is answered here.
    fn decode(&self, line: &[u8], message: &Envelope<'_>) -> Option<ClientJsonRpcMessage> {
        let completed = greeting::completed(message);
        match serde_json::from_slice(completed.as_deref().unwrap_or(line)) {
            Ok(decoded) => {
                if tasks::are_declared_by(&decoded) {
                    self.takes_tasks.store(true, Ordering::Relaxed);
                }
                Some(decoded)
            }
            Err(_) => {
                if let (Some(id), Some((error, era))) = (message.id, forward::flaw_of_call(message)) {
                    self.fail(id.get(), &error, era);
                    return None;
                }
                match (&message.method, message.id) {
                    (Some(method), Some(id)) if message.is_well_formed() => {
                        let method: String = method.chars().take(64).collect();
                        self.refuse(Some(id.get()), -32602, &format!("invalid parameters for {method}"));
                    }
                    // A notification of another protocol needs no answer.
                    (Some(_), None) => {}
                    (_, id) => self.refuse(id.map(RawValue::get), -32600, "not a JSON-RPC 2.0 message"),
                }
                None
            }
        }
    }

    /// Forwards a call of a guest tool; `false` if the message is anything else, or not a plain call.
    fn forward(self: &Arc<Self>, message: &Envelope<'_>) -> bool {
        if !forward::may_be_call(message) {
            return false;
        }
        let (Some(id), Some(params)) = (message.id, message.params.and_then(CallParams::parse)) else {
            return false;
        };
        let Some(tool) = self.client.guest_tool(&params.name) else {
            return false;
        };
        if tool.becomes_task() && params.declares_tasks(self.takes_tasks.load(Ordering::Relaxed)) {
            return false;
        }
        let Some(era) = params.era(self.is_initialized.load(Ordering::Acquire)) else { return false };
        let id = id.get();
        if self.calls().contains_key(id) {
            self.refuse(Some(id), -32600, "a call with this id is in progress");
            return true;
        }
        let handle = Handle::default();
        let how = (era, params.trace());
        match ForwardedCall::admit(&self.client, tool, params.arguments, how, &handle) {
            Ok((call, arguments)) => {
                let progress = params.progress_token().map(|token| Arc::new(Reported::by(token)));
                let id: Arc<str> = id.into();
                self.calls().insert(Arc::clone(&id), Call { handle, progress: progress.clone() });
                self.flush_later(call.link());
                let wants_progress = progress.is_some();
                call.begin(&arguments, wants_progress, Reply { tap: Arc::clone(self), id, progress });
            }
            Err(Refusal::Failed(error)) => self.fail(id, &error, era),
            Err(Refusal::Asleep(asleep)) => {
                let id: Arc<str> = id.into();
                let progress = params.progress_token().map(|token| Arc::new(Reported::by(token)));
                self.calls().insert(Arc::clone(&id), Call { handle, progress: progress.clone() });
                let raw = params.arguments.map(ToOwned::to_owned);
                tokio::spawn(Arc::clone(self).wake(asleep, raw, id, progress, era));
            }
        }
        true
    }

    /// Forwards a call once its VM was woken.
    async fn wake(
        self: Arc<Self>,
        asleep: Box<Asleep>,
        arguments: Option<Box<RawValue>>,
        id: Arc<str>,
        progress: Option<Arc<Reported>>,
        era: Era,
    ) {
        match asleep.wake(arguments.as_deref()).await {
            Ok((call, arguments)) => {
                let (link, wants_progress) = (call.link().clone(), progress.is_some());
                call.begin(&arguments, wants_progress, Reply { tap: self, id, progress });
                link.flush();
            }
            Err(error) => {
                let ended = self.calls().remove(&id);
                // A cancelled call has no answer.
                if ended.is_some_and(|call| !call.handle.is_cancelled()) {
                    self.fail(&id, &error, era);
                }
                if !self.has_calls() {
                    self.answered.notify_one();
                }
            }
        }
    }

    /// Answers a call with an error from the host.
    fn fail(&self, id: &str, error: &ToolError, era: Era) {
        self.outbox.push(|out| {
            forward::write_response_start(out, id);
            forward::write_error(out, error, era);
            out.push(b'}');
        });
    }

    /// Cancels a forwarded call; `false` if the message is anything else.
    fn cancel(&self, message: &Envelope<'_>) -> bool {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Cancelled<'a> {
            #[serde(borrow)]
            request_id: &'a RawValue,
        }
        if message.method.as_deref() != Some("notifications/cancelled") {
            return false;
        }
        let Some(params) = message.params.and_then(|p| serde_json::from_str::<Cancelled<'_>>(p.get()).ok())
        else {
            return false;
        };
        let handle = self.calls().get(params.request_id.get()).map(|call| call.handle.clone());
        handle.inspect(Handle::cancel).is_some()
    }

    /// Tells a waiting client that its calls are still running.
    pub(super) fn beat(&self) {
        let waiting: Vec<_> = self.calls().values().filter_map(|call| call.progress.clone()).collect();
        for progress in waiting {
            let value = progress.pace().beat();
            if let Some(value) = value {
                self.report(&progress.token, value, None, None);
            }
        }
    }

    fn report(&self, token: &str, progress: f64, total: Option<f64>, message: Option<&str>) {
        if self.outbox.len() > PROGRESS_BACKLOG {
            return;
        }
        self.outbox.push(|out| {
            out.extend_from_slice(
                br#"{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"#,
            );
            out.extend_from_slice(token.as_bytes());
            out.extend_from_slice(format!(r#","progress":{progress}"#).as_bytes());
            if let Some(total) = total {
                out.extend_from_slice(format!(r#","total":{total}"#).as_bytes());
            }
            if let Some(message) = message {
                out.extend_from_slice(br#","message":"#);
                write_string(out, message);
            }
            out.extend_from_slice(b"}}");
        });
    }

    /// The client has sent its last line: lets its calls finish, unless nobody reads their results.
    pub(super) async fn finish(&self, is_gone: impl Fn() -> bool) {
        let mut check = interval(GONE_CHECK);
        while self.has_calls() {
            check.tick().await;
            if is_gone() || self.outbox.is_closed() {
                self.leave_all();
                return;
            }
        }
    }

    /// The client is gone: abandons its calls.
    pub(super) fn leave_all(&self) {
        let handles: Vec<_> = self.calls().values().map(|call| call.handle.clone()).collect();
        handles.iter().for_each(Handle::leave);
    }
}

/// The receiver of a forwarded call's outcome.
struct Reply {
    tap: Arc<Tap>,
    id: Arc<str>,
    progress: Option<Arc<Reported>>,
}

impl Answer for Reply {
    fn progress(&mut self, progress: GuestProgress) {
        let Some(reported) = &self.progress else { return };
        if reported.pace().advance(progress.progress) {
            self.tap.report(&reported.token, progress.progress, progress.total, progress.message.as_deref());
        }
    }

    fn done(self, result: Option<CallResult<'_>>) {
        let Self { tap, id, .. } = self;
        let is_last = {
            let mut calls = tap.calls();
            calls.remove(&id);
            calls.is_empty()
        };
        // A cancelled call has no answer.
        let Some(result) = result else { return };
        let line = |out: &mut Vec<u8>| {
            forward::write_response_start(out, &id);
            result.write(out);
            out.push(b'}');
        };
        if is_last {
            tap.outbox.put(line);
            tap.outbox.flush();
            tap.answered.notify_one();
        } else {
            tap.outbox.push(line);
        }
    }
}
