//! One multiplexed MCP connection into a guest: JSON lines with the host's own ids. It reconnects automatically.
//!
//! ```text
//!            start                 handshake done
//! Connecting ─────> dial, CONNECT, ───────────────> Up ──┐ connection lost, silent for 30 s, too much garbage
//!      ^            initialize │                         │
//!      └───────────────────────┴── Down { why } <────────┘   every pending call has failed by then, or is asked for again
//!         after 20 ms, 40 ms ... 2 s
//! ```
//! A call that was written is never sent again, since the guest may have executed it in part. But most guests keep calls and their answers for a while
//! when a connection is lost, and are asked for them over the next one (`again`).

mod again;
mod connection;
mod greeting;
mod passing;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use connection::Patience;
pub(crate) use connection::STANDSTILL;
pub(crate) use greeting::Dialled;
pub(super) use greeting::dial;
use nexus_schema::link::{CLIENT_META, CUT_OFF, CommandEnded};
use nexus_schema::{ErrorCode, ToolError, TraceContext, trace};
pub use passing::{Offers, Question, Reply};
use serde_json::value::RawValue;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::lines::Outbox;
use super::wire;
use crate::os::random;

/// Number of bytes waiting to be written to a guest above which further calls are refused.
const BACKLOG_MAX: usize = 32 << 20;
/// Maximum number of calls of one guest that are under way.
const PENDING_MAX: usize = 4096;
/// Time for which a call waits for a link that is connecting: longer than the longest pause between two tries.
pub const UP_WAIT: Duration = Duration::from_secs(5);

/// A link to one guest. Cheap to clone; the connection ends when the last clone is dropped, or at [`Link::close`].
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    _task: Arc<DropGuard>,
}

/// State of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// The link was never up.
    Connecting,
    /// The link is up: calls work.
    Up,
    /// The link is lost, or was closed.
    Down {
        /// The reason.
        why: String,
    },
}

/// Why a call into a guest failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The link is down, or failed during the call.
    #[error("the link to the guest is down: {why}")]
    Down {
        /// The reason.
        why: String,
    },
    /// The deadline passed.
    #[error("no answer after {} s", .after.as_secs_f32())]
    Deadline {
        /// Time waited.
        after: Duration,
    },
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Too many calls are under way.
    #[error("too many calls to this guest are under way")]
    Busy,
    /// The result is too large.
    #[error("the result has more than {} bytes", nexus_schema::limits::GUEST_RESULT_MAX)]
    TooLarge,
    /// The answer violates the protocol.
    #[error("invalid result from the guest: {what}")]
    Misbehaved {
        /// The violation.
        what: &'static str,
    },
    /// The guest answered with a JSON-RPC error.
    #[error("the guest refused: {message}")]
    Refused {
        /// The JSON-RPC error code.
        code: i64,
        /// The guest's words, shortened.
        message: String,
        /// The guest's `data`: JSON of at most 4 KiB, if there is any.
        data: Option<Box<str>>,
    },
}

impl LinkError {
    /// Returns the error as a caller sees it; `vm` is the VM's name.
    pub fn to_tool_error(&self, vm: &str) -> ToolError {
        let message = format!("{vm}: {self}");
        match self {
            Self::Down { .. } => ToolError::new(ErrorCode::GuestUnreachable, message)
                .hint("a command that was started keeps running in the VM: guest_command_list shows it once the link is up; vm_inspect shows the VM"),
            Self::Deadline { .. } => ToolError::new(ErrorCode::Timeout, message)
                .hint("a command keeps running in the VM: guest_command_list shows it; any other call was cancelled"),
            Self::Cancelled => ToolError::new(ErrorCode::Cancelled, message),
            Self::Busy => ToolError::new(ErrorCode::Busy, message).hint("wait for calls to end, then try again"),
            Self::TooLarge => ToolError::new(ErrorCode::TooLarge, message)
                .hint("ask for less at once: a limit, an offset, or output into a file"),
            Self::Misbehaved { .. } => ToolError::new(ErrorCode::GuestMisbehaved, message)
                .hint("try again; if it keeps failing, call vm_restart"),
            Self::Refused { code: -32602, .. } => ToolError::new(ErrorCode::InvalidArgument, message),
            Self::Refused { code: -32601, .. } => ToolError::new(ErrorCode::GuestOutdated, message)
                .hint("the guest does not know this tool: vm_restart gives it the current agent"),
            Self::Refused { .. } => ToolError::new(ErrorCode::GuestMisbehaved, message),
        }
    }
}

/// The id of a call that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId(u64);

/// What the guest gets with a call besides its arguments.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallMeta<'a> {
    /// Whether the caller wants progress notifications.
    pub wants_progress: bool,
    /// Name of the calling client.
    pub client: Option<&'a str>,
    /// The trace that the call belongs to.
    pub trace: Option<&'a TraceContext>,
}

impl CallMeta<'_> {
    /// Appends `_meta`, unless it is empty; `id` is the progress token.
    fn write(&self, out: &mut Vec<u8>, id: u64) {
        let trace = self.trace;
        let texts = [
            (CLIENT_META, self.client),
            (trace::PARENT, trace.map(|trace| trace.parent.as_str())),
            (trace::STATE, trace.and_then(|trace| trace.state.as_deref())),
        ];
        if !self.wants_progress && texts.iter().all(|(_, text)| text.is_none()) {
            return;
        }
        out.extend_from_slice(br#","_meta":{"#);
        let mut is_first = true;
        if self.wants_progress {
            out.extend_from_slice(format!(r#""progressToken":{id}"#).as_bytes());
            is_first = false;
        }
        for (key, text) in texts {
            let Some(text) = text else { continue };
            out.extend_from_slice(if is_first { b"" } else { b"," });
            wire::write_string(out, key);
            out.push(b':');
            wire::write_string(out, text);
            is_first = false;
        }
        out.push(b'}');
    }
}

/// A progress notification of a guest.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestProgress {
    /// Progress so far; always larger than in the notification before.
    pub progress: f64,
    /// Progress at the end, if known.
    pub total: Option<f64>,
    /// What the guest is doing, shortened.
    pub message: Option<String>,
}

/// Receives the outcome of one call. Its methods run on the link's own task: they must not block, and all but `done` must not call
/// the link.
pub trait CallSink: Send {
    /// Receives a progress notification. Only called if the call asked for progress.
    fn progress(&mut self, progress: GuestProgress);
    /// Receives a question of the guest to the client. By default it is refused.
    fn ask(&mut self, question: Question) {
        drop(question);
    }
    /// Receives a log message of the guest: the parameters of `notifications/message`, at most 64 KiB. By default it is dropped.
    fn log(&mut self, _message: &RawValue) {}
    /// Receives the outcome once the call has ended. The result is a JSON object as the guest wrote it; [`super::result::check`] checks it.
    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>);
}

pub(crate) struct Shared {
    state: watch::Sender<LinkState>,
    calls: Mutex<Calls>,
    /// Wakes the connection's task if there is an earlier deadline than the one that it sleeps for.
    rearm: Notify,
    closed: CancellationToken,
    /// Why the link was closed by its owner.
    close_reason: Mutex<String>,
    /// The name of the link, which the guest knows its connections by.
    name: String,
    /// Ends the connection, which is then made anew.
    redial: Notify,
    /// How many eras of its connections have ended.
    eras: AtomicU64,
    /// Hears of commands that ended.
    ended: OnceLock<Box<dyn Fn(CommandEnded) + Send + Sync>>,
}

/// A time in which the guest and its VMM give no connection up without a sign.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Era {
    /// The name of the link.
    link: String,
    /// How many were before it.
    before: u64,
}

#[derive(Default)]
struct Calls {
    last_id: u64,
    /// The queue to write to; `None` while the link is not up.
    outbox: Option<Outbox>,
    pending: HashMap<u64, Pending>,
    /// When the connection's task checks deadlines next.
    armed: Option<Instant>,
    /// Since when the guest is paused, if it is.
    held_since: Option<Instant>,
    /// What the guest said that it offers, when the link was last up.
    offers: Offers,
    /// What came of the calls of a lost connection, until there is another one.
    interrupted: Option<again::Interrupted>,
    /// Whether there was a connection before.
    was_up: bool,
}

struct Pending {
    /// When the call began.
    started: Instant,
    deadline: Instant,
    progress: Option<f64>,
    wants_progress: bool,
    /// Whether its answer may come over a later connection.
    is_kept: bool,
    sink: Box<dyn CallSink>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("state", &*self.shared.state.borrow()).finish_non_exhaustive()
    }
}

impl Link {
    /// Starts a link to the guest whose vsock socket is in `directory`. It connects at once, and reconnects whenever it is lost.
    pub fn start(directory: &Path, port: u32) -> Self {
        Self::start_with(directory, port, Patience::default())
    }

    fn start_with(directory: &Path, port: u32, patience: Patience) -> Self {
        let closed = CancellationToken::new();
        let shared = Arc::new(Shared {
            state: watch::Sender::new(LinkState::Connecting),
            calls: Mutex::default(),
            rearm: Notify::new(),
            closed: closed.clone(),
            close_reason: Mutex::default(),
            name: random::token(),
            redial: Notify::new(),
            eras: AtomicU64::new(0),
            ended: OnceLock::new(),
        });
        tokio::spawn(connection::run(Arc::clone(&shared), directory.to_owned(), port, patience));
        Self { shared, _task: Arc::new(closed.drop_guard()) }
    }

    /// Has `hear` called, on the link's own task, for each command of which the guest says that it ended. It must not block. Only the first
    /// one is called.
    pub(crate) fn on_command_ended(&self, hear: impl Fn(CommandEnded) + Send + Sync + 'static) {
        self.shared.ended.set(Box::new(hear)).ok();
    }

    /// Returns whether both are the same link.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Returns a receiver of the link's state.
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.shared.state.subscribe()
    }

    /// Waits until the link is up. Returns `false` if that takes longer than `limit`, or if the link is closed.
    pub async fn is_up_within(&self, limit: Duration) -> bool {
        let mut state = self.state();
        let up = state.wait_for(|s| *s == LinkState::Up);
        tokio::select! {
            biased;
            () = self.shared.closed.cancelled() => false,
            up = tokio::time::timeout(limit, up) => matches!(up, Ok(Ok(_))),
        }
    }

    /// Closes the link permanently; pending calls fail at once.
    pub fn close(&self, why: &str) {
        *self.shared.close_reason.lock().unwrap_or_else(PoisonError::into_inner) = why.to_owned();
        self.shared.closed.cancel();
        self.shared.lost(why);
    }

    /// Notes that the guest is being paused: until [`Link::release`], its silence does not count, and neither do deadlines.
    pub fn hold(&self) {
        // The pause may cut the connections of before, which shows only after it.
        self.shared.eras.fetch_add(1, Ordering::AcqRel);
        self.shared.calls().held_since.get_or_insert_with(Instant::now);
    }

    /// Notes that the guest runs again. Deadlines of calls that are under way are later by the time of the pause.
    pub fn release(&self) {
        let mut calls = self.shared.calls();
        let Some(since) = calls.held_since.take() else { return };
        let now = Instant::now();
        for pending in calls.pending.values_mut() {
            pending.deadline += now - since.max(pending.started);
        }
        calls.armed = Some(now);
        drop(calls);
        self.shared.rearm.notify_one();
    }

    /// Makes the connection anew, because the guest or its VMM has given the present one up, which does not show. Calls under way go on over the next
    /// one, if the guest keeps them.
    pub(crate) fn redial(&self) {
        self.shared.eras.fetch_add(1, Ordering::AcqRel);
        again::interrupted(&self.shared, "it is dialled anew");
        self.shared.redial.notify_one();
    }

    /// Returns the present era of the guest's connections. Those of an earlier one may be given up, which does not show.
    pub(crate) fn era(&self) -> Era {
        Era { link: self.shared.name.clone(), before: self.shared.eras.load(Ordering::Acquire) }
    }

    /// Starts a tool call without waiting for it. `arguments` appends a JSON object. The call is written at the next
    /// [`Self::flush`], together with others that began before it.
    ///
    /// Returns the sink if the link is not up; nothing was written then.
    pub fn begin(
        &self,
        tool: &str,
        arguments: impl FnOnce(&mut Vec<u8>),
        meta: CallMeta<'_>,
        deadline: Duration,
        sink: Box<dyn CallSink>,
    ) -> Result<CallId, (LinkError, Box<dyn CallSink>)> {
        let CallMeta { wants_progress, .. } = meta;
        self.shared.begin(deadline, wants_progress, sink, |out, id| {
            out.extend_from_slice(br#""method":"tools/call","params":{"name":"#);
            wire::write_string(out, tool);
            meta.write(out, id);
            out.extend_from_slice(br#","arguments":"#);
            arguments(out);
            out.push(b'}');
        })
    }

    /// Writes the calls that were begun with [`Self::begin`].
    pub fn flush(&self) {
        let outbox = self.shared.calls().outbox.clone();
        if let Some(outbox) = outbox {
            outbox.flush();
        }
    }

    /// Detaches from a call whose caller is gone: a command that it started keeps running in the guest. The sink gets
    /// [`LinkError::Cancelled`]. Does nothing if the call has ended.
    pub fn leave(&self, call: CallId) {
        self.shared.give_up(call.0, CUT_OFF, LinkError::Cancelled);
    }

    /// Cancels a call: the guest kills what the call started. The sink gets [`LinkError::Cancelled`]. Does nothing if the call has ended.
    pub fn cancel(&self, call: CallId) {
        self.shared.give_up(call.0, "cancelled by the caller", LinkError::Cancelled);
    }

    /// Sends a request and waits for its result: a JSON object as the guest wrote it.
    pub async fn request(
        &self,
        method: &str,
        params: &RawValue,
        deadline: Duration,
    ) -> Result<Box<RawValue>, LinkError> {
        if !self.is_up_within(UP_WAIT.min(deadline)).await {
            return Err(LinkError::Down { why: self.shared.why_down() });
        }
        let (sender, outcome) = oneshot::channel();
        let begun = self.shared.begin(deadline, false, Box::new(Waiting(sender)), |out, _| {
            out.extend_from_slice(br#""method":"#);
            wire::write_string(out, method);
            out.extend_from_slice(br#","params":"#);
            out.extend_from_slice(params.get().as_bytes());
        });
        let call = begun.map_err(|(error, _)| error)?;
        self.flush();
        let _guard = CancelOnDrop { link: self, call };
        outcome.await.unwrap_or(Err(LinkError::Cancelled))
    }
}

/// Cancels a request when its caller is dropped. Does nothing if the request has ended.
struct CancelOnDrop<'a> {
    link: &'a Link,
    call: CallId,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.link.cancel(self.call);
    }
}

/// The sink for [`Link::request`].
struct Waiting(oneshot::Sender<Result<Box<RawValue>, LinkError>>);

impl CallSink for Waiting {
    fn progress(&mut self, _: GuestProgress) {}

    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>) {
        // If the caller is gone, the result is dropped.
        let _ = self.0.send(outcome.map(ToOwned::to_owned));
    }
}

/// Appends the notification that cancels a call.
fn write_cancelled(out: &mut Vec<u8>, id: u64, reason: &str) {
    let line = format!(
        r#"{{"jsonrpc":"2.0","method":"notifications/cancelled","params":{{"requestId":{id},"reason":"{reason}"}}}}"#
    );
    out.extend_from_slice(line.as_bytes());
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn why_down(&self) -> String {
        match &*self.state.borrow() {
            LinkState::Down { why } => why.clone(),
            LinkState::Connecting => "not connected yet".into(),
            LinkState::Up => "connection lost".into(),
        }
    }

    fn begin(
        &self,
        deadline: Duration,
        wants_progress: bool,
        sink: Box<dyn CallSink>,
        request: impl FnOnce(&mut Vec<u8>, u64),
    ) -> Result<CallId, (LinkError, Box<dyn CallSink>)> {
        let mut guard = self.calls();
        let calls = &mut *guard;
        let Some(outbox) = &calls.outbox else {
            drop(guard);
            return Err((LinkError::Down { why: self.why_down() }, sink));
        };
        if calls.pending.len() >= PENDING_MAX || outbox.len() > BACKLOG_MAX {
            return Err((LinkError::Busy, sink));
        }
        let id = calls.last_id + 1;
        let line = |out: &mut Vec<u8>| {
            out.extend_from_slice(format!(r#"{{"jsonrpc":"2.0","id":{id},"#).as_bytes());
            request(out, id);
            out.push(b'}');
        };
        let written = outbox.put(line);
        if !written {
            drop(guard);
            return Err((LinkError::Down { why: "connection lost".into() }, sink));
        }
        calls.last_id = id;
        let started = Instant::now();
        let deadline = started + deadline;
        let pending = Pending { started, deadline, progress: None, wants_progress, is_kept: true, sink };
        calls.pending.insert(id, pending);
        if calls.armed.is_some_and(|armed| deadline < armed) {
            calls.armed = Some(deadline);
            self.rearm.notify_one();
        }
        Ok(CallId(id))
    }

    /// Ends a pending call with an error, and sends the guest a cancellation.
    fn give_up(&self, id: u64, reason: &str, error: LinkError) {
        let pending = {
            let mut calls = self.calls();
            let Some(pending) = calls.pending.remove(&id) else { return };
            if let Some(outbox) = &calls.outbox {
                outbox.push(|out| write_cancelled(out, id, reason));
            } else if let Some(interrupted) = &mut calls.interrupted {
                interrupted.given_up.push((id, reason.to_owned()));
            }
            pending
        };
        pending.sink.done(Err(error));
    }

    /// Fails all pending calls; no call can begin until the link is up again.
    fn lost(&self, why: &str) {
        let pending = {
            let mut calls = self.calls();
            if let Some(outbox) = calls.outbox.take() {
                outbox.close();
            }
            calls.armed = None;
            calls.interrupted = None;
            std::mem::take(&mut calls.pending)
        };
        self.state.send_replace(LinkState::Down { why: why.to_owned() });
        for pending in pending.into_values() {
            pending.sink.done(Err(LinkError::Down { why: why.to_owned() }));
        }
    }
}

#[cfg(test)]
mod tests;
