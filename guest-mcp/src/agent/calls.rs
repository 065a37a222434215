//! Tool calls. A call that completes without waiting is answered at once; any other call gets a task of its own. What outlives a connection is in
//! [`super::session`].

use std::collections::hash_map::Entry;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use nexus_schema::TraceContext;
use nexus_schema::link::CallsAnswer;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::io::AsyncWriteExt;

use super::Agent;
use super::rpc::{self, Failure, INVALID_REQUEST, Id};
use super::session::Session;
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

/// The calls of one connection. Dropping it detaches from them, unless their link has a name and may go on with them.
pub(super) struct Calls {
    agent: Arc<Agent>,
    answers: Answers,
    session: Mutex<Arc<Session>>,
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.session().leave(&self.agent, &self.answers);
    }
}

impl Calls {
    /// Creates the calls of one connection.
    pub(super) fn new(agent: Arc<Agent>, answers: Answers) -> Self {
        let session = Mutex::new(Session::new(answers.clone()));
        Self { agent, answers, session }
    }

    fn session(&self) -> Arc<Session> {
        lock(&self.session).clone()
    }

    /// Names the host's link, whose calls go on over this connection.
    pub(super) fn join(&self, link: &str) {
        let session = self.agent.links.join(link, self.session(), &self.answers);
        *lock(&self.session) = session;
    }

    /// Goes on with the calls that the host still waits for, and detaches from all others. Returns those that are not known.
    pub(super) fn go_on(&self, ids: &[u64]) -> CallsAnswer {
        self.session().go_on(ids)
    }

    /// Starts a call. If it completes without waiting, its answer is queued until [`Answers::flush`]; otherwise it continues on a task.
    pub(super) fn begin(&self, id: Id, params: CallParams) {
        let CallParams { name, arguments, meta } = params;
        let session = self.session();
        let (cancel, wants_kill) = (session.child_token(), Arc::<AtomicBool>::default());
        match session.under_way().entry(id.get().into()) {
            Entry::Vacant(place) => drop(place.insert((cancel.clone(), wants_kill.clone()))),
            Entry::Occupied(_) => {
                let failure = Failure::new(INVALID_REQUEST, "a call with this id is in progress");
                return self.answers.refuse(&id, &failure);
            }
        }
        let (agent, of_call) = (self.agent.clone(), session.clone());
        let mut work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            let settings = agent.settings();
            let tell = meta.progress_token.map(|token| of_call.tell(token));
            let quiet = agent.clone();
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
            // Nobody waits for the answer to a cancelled call.
            if !cancel.is_cancelled() {
                of_call.put(&id, outcome, quiet.quiet.is_on());
            }
            of_call.under_way().remove(id.get());
        });
        // The new task polls it again, which registers the real waker.
        if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            tokio::spawn(async move {
                work.await;
                session.flush();
            });
        }
    }

    /// Cancels a call if it is in progress, and, if wanted, kills what it started.
    pub(super) fn cancel(&self, id: &RawValue, kill: bool) {
        let Some((cancel, wants_kill)) = self.session().under_way().get(id.get()).cloned() else { return };
        wants_kill.store(kill, Ordering::Release);
        cancel.cancel();
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

    /// Returns whether both are of the same connection.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.writer, &other.writer)
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
        self.add(&line);
    }

    /// Queues a line until [`Answers::flush`].
    pub(super) fn add(&self, line: &[u8]) {
        let length = {
            let mut waiting = lock(&self.waiting);
            waiting.extend_from_slice(line);
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
