//! Passes one request of a client to a guest, and what both say to each other until it ends.
//!
//! ```text
//!   client ── request ──> admitted, recorded ──> the guest's link
//!          <── progress, log messages ─────────┤   checked, counted, marked as the guest's
//!          <── question, answer ──> ───────────┤   one at a time
//!          <── result or error ────────────────┘   marked as the guest's
//! ```
//! A guest that says too much is not heard, and a request ends at its deadline whatever the guest does.

use std::time::Duration;

use nexus_core::link::{CallId, CallSink, GuestProgress, Link, LinkError, Offers, Question, Reply, UP_WAIT};
use nexus_core::{Caller, GuestHandle};
use nexus_schema::access::Scope;
use nexus_schema::{Reference, ToolError};
use rmcp::model::{
    ClientResult, CustomNotification, CustomRequest, ErrorCode, JsonObject, ServerNotification, ServerRequest,
};
use rmcp::service::{PeerRequestOptions, RequestContext, RequestHandle, ServiceError};
use rmcp::{ErrorData, RoleServer};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::words::{self, Flaw};
use crate::forward::{Client, Origin, Recorded};
use crate::notes::Notes;

/// How many questions a guest may ask during one request.
const QUESTIONS_MAX: u32 = 16;
/// How many log messages of one request are passed on.
const LOGS_MAX: u32 = 256;
/// How long a client may take for the answer to one question.
const PATIENCE: Duration = Duration::from_secs(240);
/// How long a request waits for a VM that sleeps to wake.
const WAKE_WAIT: Duration = Duration::from_secs(30);
/// Members of a request's `_meta` that are not the client's.
const NOT_OF_CLIENT: [&str; 2] = ["dev.nexus/", "progressToken"];
const VERSION: &str = "io.modelcontextprotocol/protocolVersion";
const CAPABILITIES: &str = "io.modelcontextprotocol/clientCapabilities";
const LOG_LEVEL: &str = "io.modelcontextprotocol/logLevel";

/// A method that is passed on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    pub(super) name: &'static str,
    /// Its name in the records.
    pub(super) record: &'static str,
    /// Whether a guest that offers this has the method.
    pub(super) is_offered: fn(&Offers) -> bool,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// What a guest says during a request.
enum Said {
    Progress(GuestProgress),
    Asks(Question),
    Logs(Box<RawValue>),
}

struct Sink {
    said: mpsc::Sender<Said>,
    done: oneshot::Sender<Result<Box<RawValue>, LinkError>>,
    questions: u32,
    logs: u32,
}

impl CallSink for Sink {
    fn progress(&mut self, progress: GuestProgress) {
        // A slow client misses a step, but not the result.
        let _ = self.said.try_send(Said::Progress(progress));
    }

    fn ask(&mut self, question: Question) {
        self.questions += 1;
        if self.questions > QUESTIONS_MAX {
            return question.reply.refuse(-32600, "too many questions during one request");
        }
        // One that finds no room is refused when it is dropped.
        let _ = self.said.try_send(Said::Asks(question));
    }

    fn log(&mut self, message: &RawValue) {
        self.logs += 1;
        if self.logs <= LOGS_MAX {
            let _ = self.said.try_send(Said::Logs(message.to_owned()));
        }
    }

    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>) {
        // If the client is gone, nobody needs it.
        let _ = self.done.send(outcome.map(ToOwned::to_owned));
    }
}

/// Cancels a request in the guest when nobody waits for it any more. Has no effect on one that has ended.
struct CancelOnDrop {
    link: Link,
    call: CallId,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.link.cancel(self.call);
    }
}

/// A question that the client was asked. Dropping it without an answer withdraws it.
struct Asked {
    handle: Option<RequestHandle<RoleServer>>,
    /// The way back to the guest.
    reply: Option<Reply>,
    until: Instant,
}

impl Asked {
    /// Waits for the answer; `None` if there was one before.
    async fn answer(&mut self) -> Option<Result<ClientResult, ServiceError>> {
        let handle = self.handle.as_mut()?;
        let answer = timeout_at(self.until, &mut handle.rx).await;
        if answer.is_ok() {
            self.handle = None;
        }
        Some(match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ServiceError::TransportClosed),
            Err(_) => Err(ServiceError::Timeout { timeout: PATIENCE }),
        })
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            // The client may be gone.
            tokio::spawn(async move { handle.cancel(Some("no longer needed".into())).await });
        }
    }
}

/// An error of the host: it speaks for itself.
pub(super) fn of_host(error: &ToolError) -> ErrorData {
    ErrorData::internal_error(error.to_string(), Some(json!(error)))
}

/// The guest of the client's VM.
pub(super) fn guest_of(client: &Client) -> Result<GuestHandle, ToolError> {
    let vm = client.view().scope().ok_or_else(|| ToolError::internal("a request without a VM"))?;
    client.host().guests().guest(client.caller(), &Reference::Id(vm))
}

/// Passes a request on; returns the guest's result, marked as such. `least` is the gravity from which on the client wants log messages.
pub(super) async fn pass(
    client: &Client,
    method: Method,
    params: JsonObject,
    least: Option<usize>,
    context: &RequestContext<RoleServer>,
) -> Result<Map<String, Value>, ErrorData> {
    let (host, caller) = (client.host(), client.caller());
    host.counters().guest_calls.add();
    let mut record = Recorded::start(host, &caller.owner, method.record, client.view().scope());
    match caller.authorise(method.name, Scope::Exec) {
        Ok(rule) => record.allow(rule),
        Err((error, rule)) => {
            record.deny(rule, error.code.as_str());
            return Err(of_host(&error));
        }
    }
    let found = async {
        let place = client.place()?;
        if let Some(vm) = client.view().scope() {
            host.nexus().wake(caller, &Reference::Id(vm), method.name, WAKE_WAIT).await?;
        }
        Ok::<_, ToolError>((place, guest_of(client)?))
    };
    let found = found.await;
    let (_place, guest) = found.map_err(|error| {
        record.failed(error.code);
        of_host(&error)
    })?;
    record.guest(guest.vm, guest.boot_id);
    let origin = client.origin(&guest);
    let passing = Passing { method, guest: &guest, origin: &origin, least, context, record: &mut record };
    let ended = caller.ended();
    tokio::select! {
        result = passing.run(params) => result,
        () = context.ct.cancelled() => Err(ErrorData::internal_error("cancelled", None)),
        () = ended.cancelled() => Err(of_host(&Caller::ended_error())),
    }
}

struct Passing<'a> {
    method: Method,
    guest: &'a GuestHandle,
    origin: &'a Origin,
    least: Option<usize>,
    context: &'a RequestContext<RoleServer>,
    record: &'a mut Recorded,
}

impl Passing<'_> {
    async fn run(mut self, params: JsonObject) -> Result<Map<String, Value>, ErrorData> {
        let link = &self.guest.link;
        let outcome = match link.is_up_within(UP_WAIT.min(self.method.limit)).await {
            true if !(self.method.is_offered)(&link.offers()) => {
                self.record.outcome("not offered");
                return Err(ErrorData::new(ErrorCode::METHOD_NOT_FOUND, self.method.name, None));
            }
            true => self.converse(params).await,
            false => Err(LinkError::Down { why: "not connected".into() }),
        };
        match outcome {
            Ok(result) => {
                self.record.gave(result.get().len());
                let result = self.checked(&result).map_err(|flaw| {
                    self.record.outcome("guest_misbehaved");
                    flaw.to_client(self.origin)
                })?;
                self.record.outcome("ok");
                Ok(result)
            }
            Err(error) => {
                let of_tool = error.to_tool_error(self.origin.name());
                self.record.outcome(of_tool.code.as_str());
                Err(match error {
                    LinkError::Refused { code, message, data } => {
                        self.of_guest(code, &message, data.as_deref())
                    }
                    _ => of_host(&of_tool),
                })
            }
        }
    }

    /// The guest's own error, marked as such: its message has the VM's name.
    fn of_guest(&self, code: i64, message: &str, data: Option<&str>) -> ErrorData {
        let code = words::error_code(code);
        let data = words::error_data(data.and_then(|data| serde_json::from_str(data).ok()), self.origin);
        ErrorData::new(code, format!("inside {}: {message}", self.origin.name()), data)
    }

    fn checked(&self, result: &RawValue) -> Result<Map<String, Value>, Flaw> {
        nexus_core::link::scan::check(result)
            .map_err(|_| Flaw::Wrong("it is nested too deeply, or no text"))?;
        let mut result: Map<String, Value> =
            serde_json::from_str(result.get()).map_err(|_| Flaw::Wrong("it is no object"))?;
        words::inputs(&mut result, self.context.client_capabilities().as_ref(), self.origin)?;
        words::mark(&mut result, self.origin);
        Ok(result)
    }

    /// The client's `_meta` for the guest, which learns from it what the client is and can, as in the revision without sessions.
    fn meta(&self) -> Map<String, Value> {
        let mut meta = (**self.context.meta).clone();
        meta.retain(|key, _| !NOT_OF_CLIENT.iter().any(|start| key.starts_with(start)));
        if let Some(version) = self.context.protocol_version() {
            meta.entry(VERSION).or_insert_with(|| json!(version));
        }
        let can = self.context.client_capabilities().unwrap_or_default();
        meta.entry(CAPABILITIES).or_insert_with(|| json!(can));
        if let Some(level) = self.least.and_then(|least| words::LEVELS.get(least)) {
            meta.entry(LOG_LEVEL).or_insert_with(|| json!(level));
        }
        meta
    }

    /// Sends the request, and relays what guest and client say to each other until it ends.
    async fn converse(&mut self, mut params: JsonObject) -> Result<Box<RawValue>, LinkError> {
        let mut notes = Notes::of(self.context);
        let (said, mut heard) = mpsc::channel(16);
        let (done, mut outcome) = oneshot::channel();
        let sink = Box::new(Sink { said, done, questions: 0, logs: 0 });
        params.insert("_meta".into(), self.meta().into());
        let wants_progress = notes.is_some();
        let write = |out: &mut Vec<u8>, id: u64| {
            if wants_progress && let Some(meta) = params.get_mut("_meta") {
                meta["progressToken"] = id.into();
            }
            serde_json::to_writer(out, &params).expect("an object goes into a buffer");
        };
        let link = &self.guest.link;
        let call = link.pass(self.method.name, write, wants_progress, self.method.limit, sink)?;
        link.flush();
        self.record.took(params.iter().map(|(key, value)| key.len() + value.to_string().len()).sum());
        let _guard = CancelOnDrop { link: link.clone(), call };
        let mut asked: Option<Asked> = None;
        let result = loop {
            tokio::select! {
                biased;
                Some(said) = heard.recv(), if asked.is_none() => match said {
                    Said::Asks(question) => asked = self.ask(question).await,
                    said => self.relay(said, notes.as_mut()).await,
                },
                result = &mut outcome => break result.unwrap_or(Err(LinkError::Cancelled)),
                Some(answer) = answer_of(&mut asked) => {
                    if let Some(reply) = asked.take().and_then(|mut asked| asked.reply.take()) {
                        answered(reply, answer);
                    }
                }
                () = beat(&mut notes) => {}
            }
        };
        drop(asked);
        while let Ok(said) = heard.try_recv() {
            self.relay(said, notes.as_mut()).await;
        }
        result
    }

    async fn relay(&self, said: Said, notes: Option<&mut Notes<'_>>) {
        match said {
            Said::Progress(progress) => {
                if let Some(notes) = notes {
                    notes.say(progress.progress, progress.total, progress.message).await;
                }
            }
            Said::Logs(message) => {
                let least = self.least_of_request();
                let params = serde_json::from_str(message.get()).ok();
                if let Some(params) =
                    params.zip(least).and_then(|(params, least)| words::log(params, least, self.origin))
                {
                    let note = CustomNotification::new("notifications/message", Some(params.into()));
                    // A disconnected client is noticed where its reply is written.
                    let _ = self
                        .context
                        .peer
                        .send_notification(ServerNotification::CustomNotification(note))
                        .await;
                }
            }
            // Refused when it is dropped.
            Said::Asks(_) => {}
        }
    }

    /// The level of the request itself, or of its session.
    fn least_of_request(&self) -> Option<usize> {
        let own = self.context.meta.get(LOG_LEVEL).and_then(Value::as_str).and_then(words::gravity);
        own.or(self.least)
    }

    /// Asks the client; `None` if it cannot be asked, which the guest was told.
    async fn ask(&self, question: Question) -> Option<Asked> {
        let Question { method, params, reply } = question;
        let checked = serde_json::from_str::<Map<String, Value>>(params.get())
            .map_err(|_| Flaw::Wrong("the parameters of a question are not an object"))
            .and_then(|mut params| {
                words::question(
                    method,
                    &mut params,
                    self.context.client_capabilities().as_ref(),
                    self.origin,
                )?;
                Ok(params)
            });
        let params = match checked {
            Ok(params) => params,
            Err(Flaw::Undeclared(capability)) => {
                reply.refuse(-32601, &format!("the client does not declare {capability}"));
                return None;
            }
            Err(Flaw::Wrong(what)) => {
                reply.refuse(-32602, what);
                return None;
            }
        };
        let request = ServerRequest::CustomRequest(CustomRequest::new(method, Some(params.into())));
        let sent =
            self.context.peer.send_request_with_option(request, PeerRequestOptions::no_options()).await;
        match sent {
            Ok(handle) => {
                let until = Instant::now() + PATIENCE;
                Some(Asked { handle: Some(handle), reply: Some(reply), until })
            }
            Err(_) => {
                reply.refuse(-32600, "the client cannot be asked during a request of its revision");
                None
            }
        }
    }
}

fn answered(reply: Reply, answer: Result<ClientResult, ServiceError>) {
    match answer.map(|answer| to_raw_value(&answer)) {
        Ok(Ok(answer)) => reply.result(&answer),
        Err(ServiceError::McpError(error)) => reply.refuse(error.code.0, &error.message),
        Err(ServiceError::Timeout { .. }) => reply.refuse(-32000, "the client gave no answer in time"),
        Ok(Err(_)) | Err(_) => reply.refuse(-32603, "the client gave no answer"),
    }
}

/// Waits for the answer to the open question; for ever without one.
async fn answer_of(asked: &mut Option<Asked>) -> Option<Result<ClientResult, ServiceError>> {
    match asked {
        Some(asked) => asked.answer().await,
        None => std::future::pending().await,
    }
}

/// Says now and then that the request is still running. Returns after each look.
async fn beat(notes: &mut Option<Notes<'_>>) {
    let Some(notes) = notes else { return std::future::pending().await };
    notes.check.tick().await;
    notes.beat().await;
}
