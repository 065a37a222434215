//! The calls of one link of the host, over one connection or several. A link without a name has one connection, whose end detaches from all calls.
//!
//! ```text
//! connection ── initialize, with the link's name ──> its session ── calls go on, the latest answers are kept
//!    lost ─────────────────────────────────────────>    │     ── for 30 s without a connection
//! the next one ── the same name ── nexus/calls ────>    └── answers that got lost are sent again, the others when they come
//! ```
//! All of this is on the agent's only thread, so nothing happens between two steps without an `await`.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nexus_schema::link::{CALLS_KEPT, CallsAnswer};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use super::Agent;
use super::calls::{Answers, lock};
use super::rpc::{self, Failure, Id};
use crate::tools;

/// Maximum number of named links at once. One host has one; that of an earlier daemon may still be known.
const LINKS_MAX: usize = 8;
/// Maximum length of a link's name, in bytes.
const NAME_MAX: usize = 128;
/// How many bytes of answers are kept, the latest ones.
const KEPT_BYTES: usize = 256 << 10;
/// The same while commands stand still for a checkpoint, which may cut the connection.
const KEPT_QUIET_BYTES: usize = 32 << 20;

/// Calls in progress by id: the token that cancels one, and whether cancelling also kills what the call started.
type UnderWay = HashMap<Box<str>, (CancellationToken, Arc<AtomicBool>)>;

/// The sessions of named links.
#[derive(Debug, Default)]
pub(super) struct Links(Mutex<HashMap<String, Arc<Session>>>);

impl Links {
    /// Returns the session of a link, which uses this connection from now on: one that is known by the name, or `own`.
    pub(super) fn join(&self, name: &str, own: Arc<Session>, answers: &Answers) -> Arc<Session> {
        let mut links = lock(&self.0);
        if name.is_empty() || name.len() > NAME_MAX {
            return own;
        }
        let session = match links.get(name) {
            Some(known) => known.clone(),
            None if links.len() >= LINKS_MAX => return own,
            None => {
                links.insert(name.to_owned(), own.clone());
                own.clone()
            }
        };
        if !Arc::ptr_eq(&session, &own) {
            own.closing.cancel();
        }
        let mut out = session.out();
        out.name = Some(name.to_owned());
        out.answers = Some(answers.clone());
        drop(out);
        session
    }

    /// Gives up the calls of a link that has been without a connection since its `losses`-th one.
    fn forget(&self, name: &str, session: &Arc<Session>, losses: u64) {
        let is_lost = {
            let out = session.out();
            out.answers.is_none() && out.losses == losses
        };
        if is_lost {
            lock(&self.0).remove(name);
            session.closing.cancel();
        }
    }
}

/// The calls of one link.
pub(super) struct Session {
    out: Mutex<Out>,
    under_way: Mutex<UnderWay>,
    closing: CancellationToken,
}

/// The way of answers to the host.
struct Out {
    /// The name of the link, if it has one.
    name: Option<String>,
    /// The present connection, if there is one.
    answers: Option<Answers>,
    /// How many connections were lost.
    losses: u64,
    /// The latest answers to calls, oldest first: the id and the line. Only of named links.
    kept: VecDeque<(Box<str>, Vec<u8>)>,
    kept_bytes: usize,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("name", &self.out().name).finish_non_exhaustive()
    }
}

impl Session {
    /// Creates the session of a connection whose link has no name yet.
    pub(super) fn new(answers: Answers) -> Arc<Self> {
        let out = Out { name: None, answers: Some(answers), losses: 0, kept: VecDeque::new(), kept_bytes: 0 };
        Arc::new(Self {
            out: Mutex::new(out),
            under_way: Mutex::default(),
            closing: CancellationToken::new(),
        })
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        lock(&self.out)
    }

    /// Returns the calls in progress.
    pub(super) fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        lock(&self.under_way)
    }

    /// Returns a token that is cancelled with the session.
    pub(super) fn child_token(&self) -> CancellationToken {
        self.closing.child_token()
    }

    /// Ends a connection. The calls go on for a while if the link has a name; otherwise they are detached from.
    pub(super) fn leave(self: Arc<Self>, agent: &Arc<Agent>, answers: &Answers) {
        let (name, losses) = {
            let mut out = self.out();
            // The link may have another connection by now.
            if !out.answers.as_ref().is_some_and(|present| present.is_same(answers)) {
                return;
            }
            out.answers = None;
            out.losses += 1;
            (out.name.clone(), out.losses)
        };
        // Without a runtime the agent is ending.
        let (Some(name), Ok(runtime)) = (name, tokio::runtime::Handle::try_current()) else {
            return self.closing.cancel();
        };
        let agent = agent.clone();
        runtime.spawn(async move {
            tokio::time::sleep(CALLS_KEPT).await;
            agent.links.forget(&name, &self, losses);
        });
    }

    /// Queues the answer to a call until [`Session::flush`], and keeps it for the case that its connection is lost.
    pub(super) fn put(&self, id: &RawValue, outcome: Result<impl Serialize, Failure>, is_quiet: bool) {
        // Encoding failed, so there is no answer.
        let Ok(line) = rpc::answer(id, outcome) else { return };
        let mut out = self.out();
        if let Some(answers) = &out.answers {
            answers.add(&line);
        }
        if out.name.is_none() {
            return;
        }
        out.kept_bytes += line.len();
        out.kept.push_back((id.get().into(), line));
        let most = if is_quiet { KEPT_QUIET_BYTES } else { KEPT_BYTES };
        while out.kept_bytes > most
            && let Some((_, oldest)) = out.kept.pop_front()
        {
            out.kept_bytes -= oldest.len();
        }
    }

    /// Writes the queued answers.
    pub(super) fn flush(&self) {
        let answers = self.out().answers.clone();
        if let Some(answers) = answers {
            answers.flush();
        }
    }

    /// Sends the answers again that are kept of these calls, and detaches from calls that are not named. Returns those that are not known.
    pub(super) fn go_on(&self, ids: &[u64]) -> CallsAnswer {
        let (under_way, out) = (self.under_way(), self.out());
        for (id, (cancel, _)) in &*under_way {
            if !id.parse().is_ok_and(|id: u64| ids.contains(&id)) {
                cancel.cancel();
            }
        }
        let mut lost = Vec::new();
        for id in ids {
            let text = id.to_string();
            if under_way.contains_key(text.as_str()) {
                continue;
            }
            match (out.kept.iter().find(|(kept, _)| **kept == *text), &out.answers) {
                (Some((_, line)), Some(answers)) => answers.add(line),
                (Some(_), None) | (None, _) => lost.push(*id),
            }
        }
        CallsAnswer { lost }
    }

    /// Returns a function that sends progress notifications to the caller.
    pub(super) fn tell(self: &Arc<Self>, token: Id) -> tools::Tell {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Progress<'a> {
            progress_token: &'a RawValue,
            progress: u64,
            message: &'a str,
        }
        let (session, count) = (self.clone(), AtomicU64::new(0));
        Arc::new(move |message: &str| {
            let progress = count.fetch_add(1, Ordering::Relaxed) + 1;
            let params = Progress { progress_token: &token, progress, message };
            let answers = session.out().answers.clone();
            if let Some(answers) = answers {
                answers.announce("notifications/progress", params);
            }
        })
    }
}
