//! What looks at each line of a client before rmcp does: forwards calls of guest tools, and cancels them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_core::guest::lines::{Line, Outbox};
use nexus_core::guest::wire::{self, Envelope, write_string};
use nexus_core::guest::{CallId, CallSink, GuestProgress, Link, LinkError, UP_WAIT};
use nexus_core::{Caller, GuestHandle};
use rmcp::model::ClientJsonRpcMessage;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::time::{Instant, interval};

use crate::forward::{self, Arguments, CallParams, Era, Origin, Timed};
use crate::host::{Host, View};
use crate::server::HEARTBEAT;

/// How much may wait for a client to read before it misses progress, in bytes.
const PROGRESS_BACKLOG: usize = 256 << 10;
/// How many forwarded calls of one client may be under way.
const CALLS_MAX: usize = 256;
/// How often a client that has sent its last line is looked at.
const GONE_CHECK: Duration = Duration::from_millis(50);

/// What looks at each line before rmcp does.
pub(super) struct Tap {
    host: Host,
    view: View,
    caller: Caller,
    pub(super) outbox: Outbox,
    /// Whether the client has opened a session.
    pub(super) is_initialized: AtomicBool,
    /// Whether the line that is being skipped was refused already.
    is_refused: AtomicBool,
    /// Forwarded calls that are under way, by the client's id as it stands in the line.
    calls: Mutex<HashMap<Arc<str>, Call>>,
    /// Who answered last: mostly who answers next.
    origin: Mutex<Option<Arc<Origin>>>,
    /// Where calls were begun that are not written yet.
    unwritten: Mutex<Vec<Link>>,
    /// Tells the reader that all calls are answered.
    pub(super) answered: Notify,
}

struct Call {
    /// Where it goes; `None` while it is being begun.
    at: Option<(Link, CallId)>,
    is_cancelled: bool,
    progress: Option<Arc<Reported>>,
}

/// What the client was told of a call's progress.
struct Reported {
    token: Box<str>,
    last: Mutex<(f64, Instant)>,
}

impl Tap {
    /// For one client whose answers go into `outbox`.
    pub(super) fn new(host: Host, view: View, caller: Caller, outbox: Outbox) -> Arc<Self> {
        Arc::new(Self {
            host,
            view,
            caller,
            outbox,
            is_initialized: AtomicBool::new(false),
            is_refused: AtomicBool::new(false),
            calls: Mutex::default(),
            origin: Mutex::default(),
            unwritten: Mutex::default(),
            answered: Notify::new(),
        })
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<Arc<str>, Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the calls that were begun.
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

    /// Looks at one line; gives back what rmcp is to handle.
    pub(super) fn line(self: &Arc<Self>, line: Line<'_>) -> Option<ClientJsonRpcMessage> {
        match line {
            Line::Whole(line) if line.trim_ascii().is_empty() => None,
            Line::Whole(line) => {
                let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line);
                let Some(message) = Envelope::parse(line) else {
                    self.refuse(None, -32700, "not a JSON-RPC message in one line of JSON");
                    return None;
                };
                if self.forward(&message) || self.cancel(&message) {
                    return None;
                }
                self.decode(line, &message)
            }
            Line::TooLong(head) => {
                let id = wire::id_at_start(head);
                self.is_refused.store(id.is_some(), Ordering::Relaxed);
                if id.is_some() {
                    self.refuse(id, -32600, "the message is longer than 16 MiB");
                }
                None
            }
            Line::TooLongEnd { tail, .. } => {
                if !self.is_refused.load(Ordering::Relaxed) {
                    self.refuse(wire::id_at_end(&tail), -32600, "the message is longer than 16 MiB");
                }
                None
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

    /// Decodes what rmcp handles; what it cannot understand is answered here.
    fn decode(&self, line: &[u8], message: &Envelope<'_>) -> Option<ClientJsonRpcMessage> {
        match serde_json::from_slice(line) {
            Ok(decoded) => Some(decoded),
            Err(_) => {
                match (&message.method, message.id) {
                    (Some(_), Some(id)) if message.is_well_formed() => {
                        self.refuse(Some(id.get()), -32602, "the parameters are not what this method takes");
                    }
                    // A notification of another protocol: nobody waits for an answer.
                    (Some(_), None) => {}
                    (_, id) => self.refuse(id.map(RawValue::get), -32600, "not a JSON-RPC 2.0 message"),
                }
                None
            }
        }
    }

    /// Forwards the call of a guest tool; `false` if the message is anything else, or not plainly one.
    fn forward(self: &Arc<Self>, message: &Envelope<'_>) -> bool {
        if !forward::may_be_call(message) {
            return false;
        }
        let (Some(id), Some(params)) = (message.id, message.params.and_then(CallParams::parse)) else {
            return false;
        };
        let Some(tool) = self.host.registry().guest_tool(self.view, &params.name) else { return false };
        let Some(era) = params.era(self.is_initialized.load(Ordering::Acquire)) else { return false };
        self.host.counters().guest_calls.add();
        let timed = Timed::start(&self.host);
        let arguments = Arguments::parse(params.arguments, self.view);
        let found = arguments.and_then(|arguments| {
            Ok((forward::find(&self.host, &self.caller, self.view, &arguments)?, arguments))
        });
        match found {
            Ok((guest, arguments)) => self.begin(id.get(), tool, &guest, &arguments, &params, era, timed),
            Err(error) => {
                timed.record(&self.host, &self.caller.owner, tool, self.view.scope(), error.code.as_str());
                self.outbox.push(|out| {
                    forward::write_response_start(out, id.get());
                    forward::write_error(out, &error, None, era);
                    out.push(b'}');
                });
            }
        }
        true
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one call, taken apart once")]
    fn begin(
        self: &Arc<Self>,
        id: &str,
        tool: &'static str,
        guest: &GuestHandle,
        arguments: &Arguments<'_>,
        params: &CallParams<'_>,
        era: Era,
        timed: Timed,
    ) {
        let progress = params
            .progress_token()
            .map(|token| Arc::new(Reported { token: token.into(), last: Mutex::new((0.0, Instant::now())) }));
        let key: Arc<str> = id.into();
        {
            let mut calls = self.calls();
            if calls.contains_key(id) {
                drop(calls);
                return self.refuse(Some(id), -32600, "a call with this id is under way");
            }
            if calls.len() >= CALLS_MAX {
                drop(calls);
                return self.refuse(Some(id), -32000, "too many calls of this client are under way");
            }
            calls
                .insert(Arc::clone(&key), Call { at: None, is_cancelled: false, progress: progress.clone() });
        }
        let sink = Box::new(Sink {
            tap: Arc::clone(self),
            id: key,
            tool,
            origin: self.origin(guest),
            era,
            progress: progress.clone(),
            timed,
        });
        let deadline = arguments.deadline(tool);
        let wants_progress = progress.is_some();
        match guest.link.begin(tool, |out| arguments.write(out), wants_progress, deadline, sink) {
            Ok(call) => {
                self.flush_later(&guest.link);
                self.begun(id, &guest.link, call);
            }
            Err((LinkError::Down { why }, sink)) => {
                // It may be dialled again just now, as after the agent was restarted.
                let mut text = Vec::new();
                arguments.write(&mut text);
                let (tap, link, id) = (Arc::clone(self), guest.link.clone(), Box::<str>::from(id));
                tokio::spawn(async move {
                    if !link.is_up_within(UP_WAIT).await {
                        return sink.done(Err(LinkError::Down { why }));
                    }
                    match link.begin(tool, |out| out.extend_from_slice(&text), wants_progress, deadline, sink)
                    {
                        Ok(call) => {
                            link.flush();
                            tap.begun(&id, &link, call);
                        }
                        Err((error, sink)) => sink.done(Err(error)),
                    }
                });
            }
            Err((error, sink)) => sink.done(Err(error)),
        }
    }

    fn origin(&self, guest: &GuestHandle) -> Arc<Origin> {
        let mut last = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(origin) if origin.is_of(guest) => Arc::clone(origin),
            _ => Arc::clone(last.insert(Arc::new(Origin::of(guest)))),
        }
    }

    /// Remembers where a call goes, so that it can be cancelled; it may have ended already.
    fn begun(&self, id: &str, link: &Link, call: CallId) {
        let cancel = match self.calls().get_mut(id) {
            Some(entry) => {
                entry.at = Some((link.clone(), call));
                entry.is_cancelled
            }
            None => false,
        };
        if cancel {
            link.cancel(call);
        }
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
        let at = match self.calls().get_mut(params.request_id.get()) {
            Some(call) => {
                call.is_cancelled = true;
                call.at.clone()
            }
            None => return false,
        };
        if let Some((link, call)) = at {
            link.cancel(call);
        }
        true
    }

    /// Tells a client that waits that its calls still run.
    pub(super) fn beat(&self) {
        let waiting: Vec<_> = self.calls().values().filter_map(|call| call.progress.clone()).collect();
        for progress in waiting {
            let value = {
                let mut last = progress.last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.1.elapsed() < HEARTBEAT / 2 {
                    continue;
                }
                *last = (last.0 + 1e-6, Instant::now());
                last.0
            };
            self.report(&progress.token, value, None, None);
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

    /// The client has sent its last line: lets its calls end, unless nobody would read their results.
    pub(super) async fn finish(&self, is_gone: impl Fn() -> bool) {
        let mut check = interval(GONE_CHECK);
        while self.has_calls() {
            check.tick().await;
            if is_gone() || self.outbox.is_closed() {
                self.cancel_all();
                return;
            }
        }
    }

    pub(super) fn cancel_all(&self) {
        let at: Vec<_> = self
            .calls()
            .values_mut()
            .filter_map(|call| {
                call.is_cancelled = true;
                call.at.take()
            })
            .collect();
        for (link, call) in at {
            link.cancel(call);
        }
    }
}

/// Where the outcome of one forwarded call goes.
struct Sink {
    tap: Arc<Tap>,
    id: Arc<str>,
    tool: &'static str,
    origin: Arc<Origin>,
    era: Era,
    progress: Option<Arc<Reported>>,
    timed: Timed,
}

impl CallSink for Sink {
    fn progress(&mut self, progress: GuestProgress) {
        let Some(reported) = &self.progress else { return };
        {
            let mut last = reported.last.lock().unwrap_or_else(PoisonError::into_inner);
            if progress.progress <= last.0 {
                return;
            }
            *last = (progress.progress, Instant::now());
        }
        self.tap.report(&reported.token, progress.progress, progress.total, progress.message.as_deref());
    }

    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>) {
        let (call, is_last) = {
            let mut calls = self.tap.calls();
            let call = calls.remove(&self.id);
            (call, calls.is_empty())
        };
        // A cancelled call has no answer.
        let outcome = match (outcome, call) {
            (Err(LinkError::Cancelled), _) | (_, Some(Call { is_cancelled: true, .. })) => "cancelled",
            (outcome, _) => {
                let mut code = "ok";
                let line = |out: &mut Vec<u8>| {
                    forward::write_response_start(out, &self.id);
                    code = forward::write_outcome(out, outcome, &self.origin, self.era);
                    out.push(b'}');
                };
                if is_last {
                    self.tap.outbox.put(line);
                    self.tap.outbox.flush();
                    self.tap.answered.notify_one();
                } else {
                    self.tap.outbox.push(line);
                }
                code
            }
        };
        let Self { tap, tool, origin, timed, .. } = *self;
        timed.record(&tap.host, &tap.caller.owner, tool, Some(origin.vm), outcome);
    }
}
