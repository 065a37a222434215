//! The progress of a copy: counted where it is made, shown on a terminal, and cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nexus_schema::tools::op::OpProgress;
use nexus_tree::TreeError;

use crate::ctl::App;
use crate::ctl::steps::Steps;
use crate::ctl::ui::Format;

/// How often it is updated.
const EVERY: Duration = Duration::from_millis(200);

/// The number of copied bytes. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Meter(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicU64,
    is_over: AtomicBool,
}

impl Meter {
    /// Adds bytes.
    pub(super) fn add(&self, bytes: u64) {
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Cancels the copy.
    pub(super) fn cancel(&self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }

    /// The callback for a thread that packs or unpacks.
    pub(super) fn watch(&self) -> impl FnMut(u64, u64) -> Result<(), TreeError> + Send + use<> {
        let this = self.clone();
        move |bytes, _| {
            this.0.bytes.store(bytes, Ordering::Relaxed);
            if this.0.is_over.load(Ordering::Relaxed) { Err(TreeError::Cancelled) } else { Ok(()) }
        }
    }

    /// The same, but only for cancellation.
    pub(super) fn wanted(&self) -> impl FnMut(u64, u64) -> Result<(), TreeError> + Send + use<> {
        let this = self.clone();
        move |_, _| if this.0.is_over.load(Ordering::Relaxed) { Err(TreeError::Cancelled) } else { Ok(()) }
    }
}

/// Whether progress is wanted and there is a terminal to show it on.
pub(super) fn is_shown(app: &App) -> bool {
    app.ui.stderr_is_terminal && app.ui.format != Format::Quiet
}

/// Runs `work` and shows its progress.
pub(super) async fn shown<T>(
    app: &App,
    meter: &Meter,
    step: String,
    total: Option<u64>,
    work: impl Future<Output = T>,
) -> T {
    if !is_shown(app) {
        return work.await;
    }
    let mut steps = Steps::new(&app.ui);
    let mut work = std::pin::pin!(work);
    let mut clock = tokio::time::interval(EVERY);
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            _ = clock.tick() => {
                let done = Some(meter.0.bytes.load(Ordering::Relaxed));
                steps.show(&OpProgress { step: step.clone(), done, total });
            }
        }
    };
    steps.finish();
    done
}
