//! Runs operations and waits for them.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nexus_schema::id::OpId;
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::op::{OpProgress, OpState, OpSummary};
use nexus_schema::{ErrorCode, Timestamp, ToolError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{CallContext, caught};
use crate::event::Events;
use crate::progress::Progress;
use crate::store::ops::OpRecord;
use crate::store::{Store, StoreError, now, ops, random_id};

/// The operations of one daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Ops {
    store: Store,
    events: Events,
    active: Arc<Mutex<HashMap<OpId, Active>>>,
    /// Notified when an operation starts to run.
    begun: Arc<Notify>,
    tasks: TaskTracker,
}

#[derive(Debug, Clone)]
struct Active {
    progress: Progress,
    /// Becomes true once its result is known.
    ended: watch::Receiver<bool>,
    /// Its result, if that could not be stored in the row.
    unrecorded: Arc<OnceLock<Ending>>,
}

/// The result of an operation.
#[derive(Debug, Clone)]
struct Ending {
    state: OpState,
    result: Option<Map<String, Value>>,
    error: Option<ToolError>,
    at: Timestamp,
}

/// The longest time between inserting an operation's row and running it.
const BEGIN_MAX: Duration = Duration::from_secs(5);
/// The delay before recording a result is retried.
const RECORD_AGAIN: Duration = Duration::from_secs(2);

/// The row of a new operation; insert it in the same transaction as the rows that it works on.
pub(crate) fn summary(tool: &str, owner: &str, subject: Option<(String, String)>) -> OpSummary {
    let (subject_id, subject_name) = subject.unzip();
    OpSummary {
        op_id: random_id(),
        tool: tool.into(),
        state: OpState::Running,
        progress: OpProgress::default(),
        subject_id,
        subject_name,
        error: None,
        owner: owner.into(),
        started_at: now(),
        ended_at: None,
    }
}

impl Ops {
    pub(crate) fn new(store: Store, events: Events) -> Self {
        Self { store, events, active: Arc::default(), begun: Arc::default(), tasks: TaskTracker::new() }
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Runs `work` as the operation whose row was inserted before. It keeps running even if nobody waits for it.
    pub(crate) fn run<T, F>(&self, op: OpId, work: impl FnOnce(Progress) -> F)
    where
        T: Serialize + Send,
        F: Future<Output = Result<T, ToolError>> + Send + 'static,
    {
        let progress = Progress::new(CancellationToken::new());
        let (ended_tx, ended) = watch::channel(false);
        let unrecorded = Arc::new(OnceLock::new());
        let active = Active { progress: progress.clone(), ended, unrecorded: unrecorded.clone() };
        self.lock().insert(op, active);
        self.begun.notify_waiters();
        let this = self.clone();
        let work = work(progress.clone());
        self.tasks.spawn(async move {
            let (begun, done) = tokio::join!(this.announce(op), caught("the operation", work));
            let ending = Ending::of(done);
            tracing::info!(
                %op,
                state = ending.state.as_str(),
                error = ending.error.as_ref().map(|e| e.code.as_str()),
                "operation ended"
            );
            let mut recorded = this.record_end(op, &progress, &ending).await;
            if let Err(error) = &recorded {
                // Most likely the disk is full. Callers still get the result.
                tracing::error!(%op, %error, "cannot record how the operation ended");
                unrecorded.set(ending.clone()).ok();
                ended_tx.send_replace(true);
            }
            while let Err(error) = &recorded
                && !matches!(error, StoreError::Closed)
            {
                tokio::time::sleep(RECORD_AGAIN).await;
                recorded = this.record_end(op, &progress, &ending).await;
            }
            if let Some(begun) = begun {
                this.events.op(&begun, ending.state, ending.error.as_ref().map(|error| error.code));
            }
            this.lock().remove(&op);
            ended_tx.send_replace(true);
        });
    }

    /// Adds the event of an operation's begin; returns what is known of it.
    async fn announce(&self, op: OpId) -> Option<OpSummary> {
        let record = self.store.read(move |db| ops::get(db, op)).await.ok()??;
        self.events.op(&record.summary, OpState::Running, None);
        Some(record.summary)
    }

    async fn record_end(&self, op: OpId, progress: &Progress, ending: &Ending) -> Result<(), StoreError> {
        let (last, Ending { state, result, error, .. }) = (progress.watch().borrow().clone(), ending.clone());
        self.store.write(move |tx| ops::finish(tx, op, state, &last, result.as_ref(), error.as_ref())).await
    }

    /// Waits up to `wait` for an operation, showing its progress in `ctx`; then returns its outcome so far.
    ///
    /// A failed operation is an error here.
    pub(crate) async fn wait<T: DeserializeOwned>(
        &self,
        ctx: &CallContext,
        op: OpId,
        wait: Duration,
    ) -> Result<OpOutcome<T>, ToolError> {
        let outcome = self.outcome(ctx, op, wait).await?;
        match outcome.error {
            Some(error) => Err(error),
            None => Ok(outcome),
        }
    }

    /// The same, but a failure is part of the outcome.
    pub(crate) async fn outcome<T: DeserializeOwned>(
        &self,
        ctx: &CallContext,
        op: OpId,
        wait: Duration,
    ) -> Result<OpOutcome<T>, ToolError> {
        if let Some(mut active) = self.active(op, wait).await? {
            let follow = async {
                let mut progress = active.progress.watch();
                ctx.progress.send_replace(progress.borrow_and_update().clone());
                loop {
                    tokio::select! {
                        changed = progress.changed() => match changed {
                            Ok(()) => {
                                ctx.progress.send_replace(progress.borrow_and_update().clone());
                            }
                            Err(_) => break,
                        },
                        _ = active.ended.wait_for(|ended| *ended) => break,
                    }
                }
            };
            // After the end or the timeout, the row and the watch have the state.
            tokio::time::timeout(wait, follow).await.ok();
        }
        let record = self.record(op).await?;
        let OpRecord { summary, result, .. } = record;
        let result = match result {
            Some(result) => Some(
                serde_json::from_value(Value::Object(result))
                    .map_err(|error| ToolError::internal(format!("decode the result of {op}: {error}")))?,
            ),
            None => None,
        };
        Ok(OpOutcome {
            done: summary.state != OpState::Running,
            op_id: op,
            state: summary.state,
            progress: summary.progress,
            subject_id: summary.subject_id,
            subject_name: summary.subject_name,
            result,
            error: summary.error,
        })
    }

    /// Waits until an operation that another one needs has ended. Shows its progress as `progress`, and cancels it together
    /// with that one.
    pub(crate) async fn join(&self, op: OpId, progress: &Progress) -> Result<StoredResult, ToolError> {
        if let Some(mut active) = self.active(op, BEGIN_MAX).await? {
            let mut steps = active.progress.watch();
            loop {
                let step = steps.borrow_and_update().clone();
                progress.show(step);
                tokio::select! {
                    changed = steps.changed() => if changed.is_err() { break },
                    () = ended(&mut active.ended) => break,
                    () = progress.cancelled() => break,
                }
            }
            if progress.check().is_err() {
                self.cancel(op).await?;
            }
        }
        let record = self.record(op).await?;
        match (record.result, record.summary.error) {
            (Some(result), _) => Ok(result),
            (None, Some(error)) => Err(error),
            (None, None) => Err(ToolError::internal(format!("operation {op} has no result"))),
        }
    }

    /// The operation if it is running. Its row exists before it runs, so a caller who found the row may have to wait for the start.
    async fn active(&self, op: OpId, wait: Duration) -> Result<Option<Active>, ToolError> {
        let deadline = tokio::time::Instant::now() + wait.min(BEGIN_MAX);
        loop {
            let begun = self.begun.notified();
            tokio::pin!(begun);
            begun.as_mut().enable();
            if let Some(active) = self.lock().get(&op).cloned() {
                return Ok(Some(active));
            }
            let is_over = self.record(op).await?.summary.state != OpState::Running;
            if is_over || tokio::time::timeout_at(deadline, begun).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// The current state of one operation.
    pub(crate) async fn record(&self, op: OpId) -> Result<OpRecord, ToolError> {
        let found = self.store.read(move |db| ops::get(db, op)).await.map_err(store_error)?;
        let mut record = found.ok_or_else(|| no_op(op))?;
        self.overlay(&mut record);
        Ok(record)
    }

    /// A page of operations, newest first.
    pub(crate) async fn list(
        &self,
        state: Option<OpState>,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<OpRecord>, ToolError> {
        let mut records =
            self.store.read(move |db| ops::list(db, state, before, limit)).await.map_err(store_error)?;
        for record in &mut records {
            self.overlay(record);
        }
        Ok(records)
    }

    /// Cancels an operation and waits until it has undone its partial work.
    pub(crate) async fn cancel(&self, op: OpId) -> Result<OpSummary, ToolError> {
        let active = self.lock().get(&op).cloned();
        if let Some(mut active) = active {
            active.progress.token().cancel();
            let ended = active.ended.wait_for(|ended| *ended);
            if tokio::time::timeout(nexus_schema::limits::WAIT_DEFAULT, ended).await.is_err() {
                tracing::warn!(%op, "the operation takes long to end after its cancellation");
            }
        }
        Ok(self.record(op).await?.summary)
    }

    /// Uses the progress in memory for a running operation, which is newer than its row.
    fn overlay(&self, record: &mut OpRecord) {
        if record.summary.state == OpState::Running
            && let Some(active) = self.lock().get(&record.summary.op_id)
        {
            record.summary.progress = active.progress.watch().borrow().clone();
            if let Some(ending) = active.unrecorded.get() {
                record.summary.state = ending.state;
                record.summary.ended_at = Some(ending.at);
                record.summary.error = ending.error.clone();
                record.result = ending.result.clone();
            }
        }
    }

    /// Waits for all operations, after `cancel_all` or until they complete.
    pub(crate) async fn drain(&self, limit: Duration) {
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "operations are still under way");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<OpId, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ending {
    fn of<T: Serialize>(outcome: Result<T, ToolError>) -> Self {
        let outcome = outcome.and_then(|value| match serde_json::to_value(value) {
            Ok(Value::Object(result)) => Ok(result),
            Ok(_) => Err(ToolError::internal("the result of an operation is not an object")),
            Err(error) => Err(ToolError::internal(format!("encode the result: {error}"))),
        });
        let (state, result, error) = match outcome {
            Ok(result) => (OpState::Succeeded, Some(result), None),
            Err(error) if error.code == ErrorCode::Cancelled => (OpState::Cancelled, None, Some(error)),
            Err(error) => (OpState::Failed, None, Some(error.with_advice())),
        };
        Self { state, result, error, at: now() }
    }
}

/// Waits until the operation or the daemon ends.
async fn ended(ended: &mut watch::Receiver<bool>) {
    ended.wait_for(|ended| *ended).await.ok();
}

/// There is no such operation.
pub(crate) fn no_op(op: OpId) -> ToolError {
    ToolError::new(ErrorCode::OpNotFound, format!("there is no operation {op}"))
        .hint("call op_list to see the operations")
}

/// How a failure of the store is reported.
pub(crate) fn store_error(error: StoreError) -> ToolError {
    match error {
        StoreError::NameTaken { kind, name } => {
            ToolError::new(ErrorCode::NameTaken, format!("{kind} {name} already exists"))
                .hint("choose another name, or use the existing one")
        }
        StoreError::Changed { what } => {
            ToolError::new(ErrorCode::Changed, format!("{what} changed while the call ran")).hint("try again")
        }
        StoreError::QuotaExceeded { what } => ToolError::new(ErrorCode::QuotaExceeded, what)
            .hint("delete VMs or drives that are no longer needed, ask for less, or ask for a token with a larger quota"),
        StoreError::NoCid => ToolError::new(ErrorCode::Busy, "all vsock context ids are in use")
            .hint("delete VMs that are not needed any more"),
        StoreError::NoAddress => ToolError::new(
            ErrorCode::Busy,
            "all addresses of the network that VMs in mode nat share are in use",
        )
        .hint("delete VMs that are not needed any more, give this one network proxy, or set network.subnet to a larger one"),
        StoreError::Closed => ToolError::new(ErrorCode::ShuttingDown, "the daemon is shutting down"),
        error if error.is_disk_full() => {
            ToolError::new(ErrorCode::DiskFull, "the disk of the state directory is full")
                .hint("free some room, then try again")
        }
        StoreError::Newer { .. }
        | StoreError::Backup { .. }
        | StoreError::Migrate { .. }
        | StoreError::Private { .. }
        | StoreError::Damaged { .. }
        | StoreError::Unreadable { .. }
        | StoreError::Sqlite { .. } => ToolError::internal(format!("{error}")),
    }
}

/// An operation's result as it is stored.
pub(crate) type StoredResult = Map<String, Value>;
