//! HTTP sessions: rmcp's, but with a limit on their total number.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::Stream;
use rmcp::model::{ClientJsonRpcMessage, ServerJsonRpcMessage};
use rmcp::transport::common::server_side_http::ServerSseMessage;
use rmcp::transport::streamable_http_server::SessionId;
use rmcp::transport::streamable_http_server::session::SessionManager;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;

/// The maximum number of sessions, for all callers and views together.
const SESSIONS_MAX: usize = 256;
/// A session without requests is closed after this time.
const KEEP_ALIVE: Duration = Duration::from_secs(3600);
/// How often a session's own worker must see a request; otherwise it would assume that its client is gone.
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
    home: Weak<LocalSessionManager>,
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

    /// Adds a session; returns those that must be closed for it, the longest unused first.
    fn admit(
        &self,
        id: SessionId,
        home: &Arc<LocalSessionManager>,
    ) -> Vec<(SessionId, Weak<LocalSessionManager>)> {
        let mut entries = self.entries();
        let mut leaving = Vec::new();
        while entries.len() >= SESSIONS_MAX {
            let oldest = entries.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone());
            let Some(oldest) = oldest else { break };
            if let Some(entry) = entries.remove(&oldest) {
                leaving.push((oldest, entry.home));
            }
        }
        let now = Instant::now();
        entries.insert(id, Entry { used: now, shown: now, home: Arc::downgrade(home) });
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

/// The sessions of one caller and view.
#[derive(Debug)]
pub(super) struct Sessions {
    inner: Arc<LocalSessionManager>,
    ledger: Arc<Ledger>,
}

impl Sessions {
    pub(super) fn new(ledger: Arc<Ledger>) -> Self {
        let mut inner = LocalSessionManager::default();
        inner.session_config.keep_alive = Some(KEEP_ALIVE);
        Self { inner: Arc::new(inner), ledger }
    }

    /// Closes all of them.
    pub(super) async fn close_all(&self) {
        let ids: Vec<SessionId> = {
            let mut entries = self.ledger.entries();
            let is_here = |entry: &Entry| std::ptr::eq(entry.home.as_ptr(), Arc::as_ptr(&self.inner));
            let ids: Vec<_> =
                entries.iter().filter(|(_, entry)| is_here(entry)).map(|(id, _)| id.clone()).collect();
            ids.iter().for_each(|id| drop(entries.remove(id)));
            ids
        };
        for id in ids {
            // Its worker may have ended already.
            let _ = self.inner.close_session(&id).await;
        }
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

type Failure = <LocalSessionManager as SessionManager>::Error;

impl SessionManager for Sessions {
    type Error = Failure;
    type Transport = <LocalSessionManager as SessionManager>::Transport;

    async fn create_session(&self) -> Result<(SessionId, Self::Transport), Failure> {
        let (id, transport) = self.inner.create_session().await?;
        for (oldest, home) in self.ledger.admit(id.clone(), &self.inner) {
            tracing::info!(session = %oldest, "closing the session that was unused longest");
            if let Some(home) = home.upgrade() {
                // It is already removed from the ledger; its worker may have ended, too.
                let _ = home.close_session(&oldest).await;
            }
        }
        Ok((id, transport))
    }

    async fn initialize_session(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<ServerJsonRpcMessage, Failure> {
        self.inner.initialize_session(id, message).await
    }

    async fn has_session(&self, id: &SessionId) -> Result<bool, Failure> {
        self.ledger.shown(id);
        self.inner.has_session(id).await
    }

    async fn close_session(&self, id: &SessionId) -> Result<(), Failure> {
        let is_here = self.inner.has_session(id).await?;
        self.inner.close_session(id).await?;
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
        self.inner.create_stream(id, message).await
    }

    async fn accept_message(&self, id: &SessionId, message: ClientJsonRpcMessage) -> Result<(), Failure> {
        self.inner.accept_message(id, message).await
    }

    async fn create_standalone_stream(
        &self,
        id: &SessionId,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Failure> {
        self.inner.create_standalone_stream(id).await
    }

    async fn resume(
        &self,
        id: &SessionId,
        last_event_id: String,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Failure> {
        self.inner.resume(id, last_event_id).await
    }
}
