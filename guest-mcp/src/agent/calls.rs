//! Tool calls. A call that completes without waiting is answered at once; any other call gets a task of its own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use nexus_schema::TraceContext;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Agent;
use super::rpc::{self, Failure, INVALID_REQUEST, Id};
use crate::tools;
use nexus_wire::duplex::Writer;

/// Once more than this many bytes of answers are waiting, they are written, so that the receiver can start on them.
const BATCH: usize = 2 << 10;

/// The parameters of `tools/call`.
#[derive(Deserialize)]
pub(super) struct CallParams {
    name: String,
    #[serde(default)]
    arguments: Option<Map<String, Value>>,
    #[serde(default, rename = "_meta")]
    meta: CallMeta,
}

/// The fields of a call's `_meta` that this agent uses.
#[derive(Default, Deserialize)]
struct CallMeta {
    #[serde(default, rename = "progressToken")]
    progress_token: Option<Id>,
    #[serde(default, rename = "dev.nexus/client")]
    client: Option<String>,
    /// The trace that the call belongs to.
    #[serde(default)]
    traceparent: Option<String>,
    #[serde(default)]
    tracestate: Option<String>,
}

/// Calls in progress by id: the token that cancels one, and whether cancelling also kills what the call started.
type UnderWay = HashMap<Box<str>, (CancellationToken, Arc<AtomicBool>)>;

/// The calls of one connection. Dropping it cancels them.
pub(super) struct Calls {
    agent: Arc<Agent>,
    answers: Answers,
    under_way: Arc<Mutex<UnderWay>>,
    closing: CancellationToken,
    _cancel: DropGuard,
}

impl Calls {
    /// Creates the calls of one connection.
    pub(super) fn new(agent: Arc<Agent>, answers: Answers) -> Self {
        let closing = CancellationToken::new();
        Self { agent, answers, under_way: Arc::default(), _cancel: closing.clone().drop_guard(), closing }
    }

    /// Starts a call. If it completes without waiting, its answer is queued until [`Answers::flush`]; otherwise it continues on a task.
    pub(super) fn begin(&self, id: Id, params: CallParams) {
        let CallParams { name, arguments, meta } = params;
        let (cancel, wants_kill) = (self.closing.child_token(), Arc::<AtomicBool>::default());
        match lock(&self.under_way).entry(id.get().into()) {
            Entry::Vacant(place) => drop(place.insert((cancel.clone(), wants_kill.clone()))),
            Entry::Occupied(_) => {
                let failure = Failure::new(INVALID_REQUEST, "a call with this id is in progress");
                return self.answers.refuse(&id, &failure);
            }
        }
        let (agent, answers, under_way) = (self.agent.clone(), self.answers.clone(), self.under_way.clone());
        let mut work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            let settings = agent.settings();
            let tell = meta.progress_token.map(|token| answers.tell(token));
            let parent = meta.traceparent.as_deref();
            let trace = parent.and_then(|parent| TraceContext::checked(parent, meta.tracestate.as_deref()));
            let call = tools::Call {
                agent,
                settings,
                cancel: cancel.clone(),
                wants_kill,
                client: meta.client,
                trace,
                tell,
            };
            let outcome = tools::call(&name, call, arguments.unwrap_or_default()).await;
            lock(&under_way).remove(id.get());
            // Nobody waits for the answer to a cancelled call.
            if cancel.is_cancelled() {
                return;
            }
            answers.put(&id, outcome);
        });
        // The new task polls it again, which registers the real waker.
        if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            let answers = self.answers.clone();
            tokio::spawn(async move {
                work.await;
                answers.flush();
            });
        }
    }

    /// Cancels a call if it is in progress, and, if wanted, kills what it started.
    pub(super) fn cancel(&self, id: &RawValue, kill: bool) {
        let Some((cancel, wants_kill)) = lock(&self.under_way).get(id.get()).cloned() else { return };
        wants_kill.store(kill, Ordering::Release);
        cancel.cancel();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The answers to one connection. Cheap to clone.
#[derive(Clone)]
pub(super) struct Answers {
    agent: Arc<Agent>,
    /// Lines that are waiting to be written together.
    waiting: Arc<Mutex<Vec<u8>>>,
    writer: Arc<tokio::sync::Mutex<Writer>>,
}

impl Answers {
    /// Creates the answers of one connection.
    pub(super) fn new(agent: Arc<Agent>, writer: Writer) -> Self {
        Self { agent, waiting: Arc::default(), writer: Arc::new(tokio::sync::Mutex::new(writer)) }
    }

    /// Returns a function that sends progress notifications to the caller.
    fn tell(&self, token: Id) -> tools::Tell {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Progress<'a> {
            progress_token: &'a RawValue,
            progress: u64,
            message: &'a str,
        }
        let (answers, count) = (self.clone(), AtomicU64::new(0));
        Arc::new(move |message: &str| {
            let progress = count.fetch_add(1, Ordering::Relaxed) + 1;
            let params = Progress { progress_token: &token, progress, message };
            answers.line(rpc::notification("notifications/progress", params));
            answers.flush();
        })
    }

    /// Sends a notification.
    pub(super) fn announce(&self, method: &'static str, params: impl Serialize) {
        self.line(rpc::notification(method, params));
        self.flush();
    }

    /// Queues an answer until [`Answers::flush`].
    pub(super) fn put(&self, id: &RawValue, outcome: Result<impl Serialize, Failure>) {
        self.line(rpc::answer(id, outcome));
    }

    /// Queues a protocol error until [`Answers::flush`].
    pub(super) fn refuse(&self, id: &RawValue, failure: &Failure) {
        self.line(rpc::failure(id, failure));
    }

    fn line(&self, line: io::Result<Vec<u8>>) {
        // Encoding failed, so there is no line.
        let Ok(line) = line else { return };
        let length = {
            let mut waiting = lock(&self.waiting);
            waiting.extend_from_slice(&line);
            waiting.len()
        };
        if length > BATCH {
            self.flush();
        }
    }

    /// Writes the queued lines: at once if there is room, otherwise on a task of its own. Ignores a closed connection, because its reader notices
    /// that.
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

    /// Writes lines and signals that they were written.
    async fn write(&self, line: &[u8]) -> io::Result<()> {
        self.writer.lock().await.write_all(line).await?;
        self.agent.answered.notify_waiters();
        Ok(())
    }

    /// Shuts down the sending direction.
    pub(super) async fn shutdown(&self) -> io::Result<()> {
        self.writer.lock().await.shutdown().await
    }
}
