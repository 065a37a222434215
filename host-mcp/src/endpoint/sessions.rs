//! HTTP sessions, with a limit on their total number and on those of one token, so that no token takes the sessions of others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::Stream;
use nexus_core::Caller;
use rmcp::model::{ClientJsonRpcMessage, ServerJsonRpcMessage};
use rmcp::transport::common::server_side_http::{ServerSseMessage, session_id};
use rmcp::transport::streamable_http_server::SessionId;
use rmcp::transport::streamable_http_server::session::SessionManager;

use super::conversation::{Conversation, Failure, Line};
use crate::offers::Hearing;

/// The maximum number of sessions, for all callers and views together.
const SESSIONS_MAX: usize = 256;
/// The maximum number of sessions of one token and those that were made with it.
const OF_TOKEN_MAX: usize = 64;
/// A session without messages is closed after this time.
const KEEP_ALIVE: Duration = Duration::from_secs(3600);
/// How often a session itself must see a request; otherwise it would assume that its client is gone.
const SHOWN_AT_LEAST: Duration = Duration::from_secs(600);

/// All sessions of all callers and views.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<HashMap<SessionId, Entry>>);

#[derive(Debug)]
struct Entry {
    /// When the last request came.
    used: Instant,
    /// When rmcp last saw a request.
    shown: Instant,
    home: Weak<Home>,
    whose: Share,
}

/// Whose share of the sessions one counts for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Share {
    /// The owner; of tokens the first one of the chain.
    owner: Arc<str>,
    is_token: bool,
}

impl Share {
    pub(super) fn of(caller: &Caller) -> Self {
        Self { owner: Arc::clone(caller.root_owner()), is_token: caller.grant().is_some() }
    }
}

/// The longest unused session of one owner.
fn oldest(entries: &HashMap<SessionId, Entry>, whose: &Share) -> Option<SessionId> {
    let own = entries.iter().filter(|(_, entry)| entry.whose == *whose);
    own.min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone())
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether `sessions` holds any session.
    pub(super) fn holds_any(&self, sessions: &Sessions) -> bool {
        self.entries().values().any(|entry| std::ptr::eq(entry.home.as_ptr(), Arc::as_ptr(&sessions.inner)))
    }

    /// Adds a session; returns those that must be closed for it. A token that has its share gives up its own longest unused one. If there are
    /// too many in all, whoever has the most does.
    fn admit(&self, id: SessionId, home: &Arc<Home>, whose: &Share) -> Vec<(SessionId, Weak<Home>)> {
        let mut entries = self.entries();
        let mut leaving = Vec::new();
        loop {
            let mut counts = HashMap::from([(whose.clone(), 1_usize)]);
            for entry in entries.values() {
                *counts.entry(entry.whose.clone()).or_default() += 1;
            }
            let own = counts.get(whose).copied().unwrap_or_default();
            let gives_up = if whose.is_token && own > OF_TOKEN_MAX {
                Some(whose)
            } else if entries.len() >= SESSIONS_MAX {
                // Among equals it is the new one's owner.
                counts.iter().max_by_key(|(of, count)| (**count, **of == *whose)).map(|(of, _)| of)
            } else {
                None
            };
            let Some(oldest) = gives_up.and_then(|of| oldest(&entries, of)) else { break };
            if let Some(entry) = entries.remove(&oldest) {
                leaving.push((oldest, entry.home));
            }
        }
        let now = Instant::now();
        let (home, whose) = (Arc::downgrade(home), whose.clone());
        entries.insert(id, Entry { used: now, shown: now, home, whose });
        leaving
    }

    fn shown(&self, id: &SessionId) {
        if let Some(entry) = self.entries().get_mut(id) {
            entry.used = Instant::now();
            entry.shown = entry.used;
        }
    }

    fn remove(&self, id: &SessionId) {
        self.entries().remove(id);
    }
}

/// The sessions of one caller and view, by their ids.
#[derive(Debug, Default)]
struct Home(Mutex<HashMap<SessionId, Arc<Conversation>>>);

impl Home {
    fn all(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Conversation>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &SessionId) -> Result<Arc<Conversation>, Failure> {
        self.all().get(id).cloned().ok_or(Failure::Unknown)
    }

    /// Closes a session, if there is one.
    fn close(&self, id: &SessionId) {
        let conversation = self.all().remove(id);
        if let Some(conversation) = conversation {
            conversation.end();
        }
    }
}

/// The sessions of one caller and view, within the limits for all.
#[derive(Debug)]
pub(super) struct Sessions {
    inner: Arc<Home>,
    ledger: Arc<Ledger>,
    whose: Share,
}

impl Sessions {
    pub(super) fn new(ledger: Arc<Ledger>, whose: Share) -> Self {
        Self { inner: Arc::default(), ledger, whose }
    }

    /// Closes all of them.
    pub(super) fn close_all(&self) {
        let ids: Vec<SessionId> = {
            let mut entries = self.ledger.entries();
            let is_here = |entry: &Entry| std::ptr::eq(entry.home.as_ptr(), Arc::as_ptr(&self.inner));
            let ids: Vec<_> =
                entries.iter().filter(|(_, entry)| is_here(entry)).map(|(id, _)| id.clone()).collect();
            ids.iter().for_each(|id| drop(entries.remove(id)));
            ids
        };
        ids.iter().for_each(|id| self.inner.close(id));
    }

    /// Who reads in a session, if it exists.
    pub(super) fn hearing(&self, id: &str) -> Option<Hearing> {
        self.inner.all().get(id).map(|conversation| conversation.hearing().clone())
    }

    /// Whether the client of a session can deal with tasks.
    pub(super) fn take_tasks(&self, id: &str) -> bool {
        self.inner.all().get(id).is_some_and(|conversation| conversation.takes_tasks())
    }

    /// Whether a call of this session may bypass rmcp: the session exists, and rmcp has recently seen it.
    pub(super) fn may_pass_by(&self, id: &str) -> bool {
        match self.ledger.entries().get_mut(id) {
            Some(entry) if std::ptr::eq(entry.home.as_ptr(), Arc::as_ptr(&self.inner)) => {
                entry.used = Instant::now();
                entry.shown.elapsed() < SHOWN_AT_LEAST
            }
            Some(_) | None => false,
        }
    }
}

impl SessionManager for Sessions {
    type Error = Failure;
    type Transport = Line;

    async fn create_session(&self) -> Result<(SessionId, Self::Transport), Failure> {
        let id = session_id();
        let conversation = Conversation::new(KEEP_ALIVE);
        self.inner.all().insert(Arc::clone(&id), Arc::clone(&conversation));
        for (oldest, home) in self.ledger.admit(Arc::clone(&id), &self.inner, &self.whose) {
            tracing::info!(session = %oldest, "closing the session that was unused longest");
            if let Some(home) = home.upgrade() {
                home.close(&oldest);
            }
        }
        Ok((id, Line(conversation)))
    }

    async fn initialize_session(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<ServerJsonRpcMessage, Failure> {
        self.inner.find(id)?.greet(message).await
    }

    async fn has_session(&self, id: &SessionId) -> Result<bool, Failure> {
        self.ledger.shown(id);
        Ok(self.inner.all().contains_key(id))
    }

    async fn close_session(&self, id: &SessionId) -> Result<(), Failure> {
        let is_here = self.inner.all().contains_key(id);
        self.inner.close(id);
        if is_here {
            self.ledger.remove(id);
        }
        Ok(())
    }

    async fn create_stream(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Failure> {
        self.inner.find(id)?.ask(message).await
    }

    async fn accept_message(&self, id: &SessionId, message: ClientJsonRpcMessage) -> Result<(), Failure> {
        self.inner.find(id)?.accept(message).await
    }

    async fn create_standalone_stream(
        &self,
        id: &SessionId,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Failure> {
        self.inner.find(id)?.listen()
    }

    async fn resume(
        &self,
        id: &SessionId,
        last_event_id: String,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Failure> {
        self.inner.find(id)?.resume(&last_event_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Admits a session; returns those that are closed for it.
    fn admit(ledger: &Ledger, id: &str, owner: &str) -> Vec<String> {
        let home = Arc::new(Home::default());
        let whose = Share { owner: owner.into(), is_token: owner.starts_with("token:") };
        ledger.admit(id.into(), &home, &whose).into_iter().map(|(id, _)| id.to_string()).collect()
    }

    #[test]
    fn a_token_takes_no_session_of_others() {
        let ledger = Ledger::default();
        assert_eq!(admit(&ledger, "user-0", "uid:0"), [""; 0]);
        assert_eq!(admit(&ledger, "other-0", "token:other"), [""; 0]);
        for at in 0..OF_TOKEN_MAX {
            assert_eq!(admit(&ledger, &format!("greedy-{at}"), "token:greedy"), [""; 0]);
        }
        for at in 0..1000 {
            let closed = admit(&ledger, &format!("greedy-{}", OF_TOKEN_MAX + at), "token:greedy");
            assert_eq!(closed, [format!("greedy-{at}")]);
        }
        assert_eq!(ledger.len(), OF_TOKEN_MAX + 2);
    }

    #[test]
    fn who_has_the_most_sessions_gives_one_up() {
        let ledger = Ledger::default();
        for at in 0..SESSIONS_MAX - 10 {
            assert_eq!(admit(&ledger, &format!("user-{at}"), "uid:0"), [""; 0]);
        }
        for at in 0..10 {
            assert_eq!(admit(&ledger, &format!("agent-{at}"), "token:agent"), [""; 0]);
        }
        assert_eq!(admit(&ledger, "agent-10", "token:agent"), ["user-0"]);
        assert_eq!(admit(&ledger, "user-new", "uid:0"), ["user-1"]);
        assert_eq!(ledger.len(), SESSIONS_MAX);
    }
}
