//! How far a piece of work is, whether it is still wanted, and what it has to say: what every room is given that works long.

mod log;

use nexus_schema::tools::op::OpProgress;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use log::{Log, read as read_log};

/// Where an operation says how far it is and learns that it is no longer wanted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress {
    state: watch::Sender<OpProgress>,
    cancel: CancellationToken,
    log: Option<Log>,
}

/// The operation was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Default for Progress {
    fn default() -> Self {
        Self::new(CancellationToken::new())
    }
}

impl Progress {
    /// A progress that ends early when `cancel` is cancelled.
    pub fn new(cancel: CancellationToken) -> Self {
        Self { state: watch::Sender::new(OpProgress::default()), cancel, log: None }
    }

    /// The same progress, whose steps go to a log too.
    pub(crate) fn logged(&self, log: Log) -> Self {
        Self { log: Some(log), ..self.clone() }
    }

    /// Says something to the log, if there is one.
    pub fn log(&self, line: &str) {
        if let Some(log) = &self.log {
            log.line(line);
        }
    }

    /// Begins a step, such as `downloading kernel`.
    pub fn step(&self, step: impl Into<String>) {
        let step = step.into();
        self.log(&step);
        self.state.send_replace(OpProgress { step, done: None, total: None });
    }

    /// Takes over how far another piece of work is.
    pub(crate) fn show(&self, progress: OpProgress) {
        self.state.send_replace(progress);
    }

    /// Says how far the step is: units done, and in all where that is known.
    pub fn advance(&self, done: u64, total: Option<u64>) {
        self.state.send_modify(|p| {
            p.done = Some(done);
            p.total = total;
        });
    }

    /// Fails once the operation is cancelled; to be asked between pieces of work.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.cancel.is_cancelled() { Err(Cancelled) } else { Ok(()) }
    }

    /// Resolves when the operation is cancelled.
    pub async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// The token that cancels the operation.
    pub fn token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Watches the progress.
    pub fn watch(&self) -> watch::Receiver<OpProgress> {
        self.state.subscribe()
    }
}
