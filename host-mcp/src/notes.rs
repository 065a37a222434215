//! Progress notifications to clients.

use std::time::Duration;

use nexus_core::link::GuestProgress;
use nexus_schema::tools::op::OpProgress;
use rmcp::RoleServer;
use rmcp::model::{ProgressNotificationParam, ProgressToken};
use rmcp::service::{Peer, RequestContext};
use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::forward::{BEAT_CHECK, Pace};

/// The minimum interval between two progress notifications for a call.
const COALESCE: Duration = Duration::from_millis(200);

/// Progress notifications of one call: strictly increasing, and repeated now and then without news.
pub(crate) struct Notes<'a> {
    peer: &'a Peer<RoleServer>,
    token: ProgressToken,
    pace: Pace,
    /// Ticks when [`Self::beat`] should be called.
    pub(crate) check: Interval,
}

impl<'a> Notes<'a> {
    /// `None` if the client does not want progress.
    pub(crate) fn of(context: &'a RequestContext<RoleServer>) -> Option<Self> {
        let token = context.meta.get_progress_token()?;
        let mut check = interval(BEAT_CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Some(Self { peer: &context.peer, token, pace: Pace::start(), check })
    }

    /// Says how far the call is, unless that is not further than before.
    pub(crate) async fn say(&mut self, progress: f64, total: Option<f64>, message: Option<String>) {
        if self.pace.advance(progress) {
            self.send(progress, total, message).await;
        }
    }

    /// Says that the call is still running, if nothing was said for long.
    pub(crate) async fn beat(&mut self) {
        if let Some(progress) = self.pace.beat() {
            self.send(progress, None, None).await;
        }
    }

    async fn send(&self, progress: f64, total: Option<f64>, message: Option<String>) {
        let mut note = ProgressNotificationParam::new(self.token.clone(), progress);
        note.total = total;
        note.message = message;
        // A disconnected client is noticed where its reply is written.
        let _ = self.peer.notify_progress(note).await;
    }
}

/// Reports the progress of a host call to the client, on changes and now and then. Never ends.
pub(crate) async fn report(mut watching: watch::Receiver<OpProgress>, context: &RequestContext<RoleServer>) {
    let Some(mut notes) = Notes::of(context) else { return std::future::pending().await };
    let mut step = 0.0;
    loop {
        let changed = tokio::select! {
            changed = watching.changed() => changed,
            _ = notes.check.tick() => {
                notes.beat().await;
                continue;
            }
        };
        if changed.is_err() {
            return std::future::pending().await;
        }
        let progress = watching.borrow_and_update().clone();
        step += 1.0;
        notes.say(step, None, Some(describe(&progress))).await;
        tokio::time::sleep(COALESCE).await;
    }
}

/// An operation's progress in words.
pub(crate) fn describe(progress: &OpProgress) -> String {
    let step = if progress.step.is_empty() { "working" } else { &progress.step };
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total > 0 => format!("{step}: {}%", done.saturating_mul(100) / total),
        (Some(done), _) => format!("{step}: {done}"),
        (None, _) => step.to_owned(),
    }
}

/// Passes a guest's progress on, and now and then reports that the call is still running. Never ends.
pub(crate) async fn relay(mut progress: mpsc::Receiver<GuestProgress>, context: &RequestContext<RoleServer>) {
    let Some(mut notes) = Notes::of(context) else { return std::future::pending().await };
    loop {
        tokio::select! {
            Some(p) = progress.recv() => notes.say(p.progress, p.total, p.message).await,
            _ = notes.check.tick() => notes.beat().await,
        }
    }
}
