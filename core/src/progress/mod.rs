//! Progress, cancellation and log of a piece of work. Everything that takes long gets one.

mod log;

use nexus_schema::tools::op::OpProgress;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use log::{Log, read as read_log};

/// Reports the progress of an operation and learns of its cancellation. Cheap to clone.
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
    /// A progress that is cancelled by `cancel`.
    pub fn new(cancel: CancellationToken) -> Self {
        Self { state: watch::Sender::new(OpProgress::default()), cancel, log: None }
    }

    /// The same progress, with its steps also written to a log.
    pub(crate) fn logged(&self, log: Log) -> Self {
        Self { log: Some(log), ..self.clone() }
    }

    /// Writes to the log, if there is one.
    pub fn log(&self, line: &str) {
        if let Some(log) = &self.log {
            log.line(line);
        }
    }

    /// Starts a step, such as `downloading kernel`.
    pub fn step(&self, step: impl Into<String>) {
        let step = step.into();
        self.log(&step);
        self.state.send_replace(OpProgress { step, done: None, total: None });
    }

    /// Shows the progress of another piece of work.
    pub(crate) fn show(&self, progress: OpProgress) {
        self.state.send_replace(progress);
    }

    /// Reports the progress of the step: units done, and the total if known.
    pub fn advance(&self, done: u64, total: Option<u64>) {
        self.state.send_modify(|p| {
            p.done = Some(done);
            p.total = total;
        });
    }

    /// Fails once the operation is cancelled; call it between pieces of work.
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
