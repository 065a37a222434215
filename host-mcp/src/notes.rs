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
/// A megabyte. What is counted in steps are bytes, as soon as there are so many.
const MB: u64 = 1_000_000;
/// Half of a step of which the total is not known, in its units.
const MANY: f64 = 100e6;

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
    let mut way = Way::default();
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
        notes.say(way.reached(&progress), None, Some(describe(&progress))).await;
        tokio::time::sleep(COALESCE).await;
    }
}

/// How far an operation is, as a number that grows: its steps so far, and what is done of the last one.
#[derive(Debug, Default)]
struct Way {
    step: String,
    steps: u32,
}

impl Way {
    fn reached(&mut self, progress: &OpProgress) -> f64 {
        if self.steps == 0 || progress.step != self.step {
            self.steps += 1;
            self.step.clone_from(&progress.step);
        }
        let part = match (progress.done, progress.total) {
            (Some(done), Some(total)) if total > 0 => done.min(total) as f64 / total as f64,
            // Nobody knows how much there is: it grows ever more slowly.
            (Some(done), _) => done as f64 / (done as f64 + MANY),
            (None, _) => 0.0,
        };
        // The next step is more than all of this one.
        f64::from(self.steps) + 0.99 * part
    }
}

/// An operation's progress in words.
pub(crate) fn describe(progress: &OpProgress) -> String {
    let step = if progress.step.is_empty() { "working" } else { &progress.step };
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total >= MB => {
            format!("{step}: {} of {} MB", done.min(total) / MB, total / MB)
        }
        (Some(done), Some(total)) if total > 0 => format!("{step}: {}%", done.saturating_mul(100) / total),
        (Some(done), _) if done >= MB => format!("{step}: {} MB", done / MB),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(step: &str, done: Option<u64>, total: Option<u64>) -> OpProgress {
        OpProgress { step: step.into(), done, total }
    }

    #[test]
    fn progress_says_how_much_of_what_is_done_and_grows() {
        let mut way = Way::default();
        let mut before = 0.0;
        for (step, done, total, says) in [
            ("", None, None, "working"),
            ("downloading kernel", None, None, "downloading kernel"),
            ("downloading kernel", Some(0), Some(87_400_000), "downloading kernel: 0 of 87 MB"),
            ("downloading kernel", Some(41_000_000), Some(87_400_000), "downloading kernel: 41 of 87 MB"),
            ("downloading kernel", Some(90_000_000), Some(87_400_000), "downloading kernel: 87 of 87 MB"),
            ("unpacking", Some(900), None, "unpacking: 900"),
            ("unpacking", Some(7_900_000), None, "unpacking: 7 MB"),
            ("unpacking", Some(9_000_000_000), None, "unpacking: 9000 MB"),
            ("cloning", Some(1), Some(4), "cloning: 25%"),
            ("booting", None, None, "booting"),
        ] {
            let progress = progress(step, done, total);
            assert_eq!(describe(&progress), says);
            let now = way.reached(&progress);
            assert!(now > before || done == Some(0), "{says}: {now} after {before}");
            before = now;
        }
        assert!((before - 5.0).abs() < f64::EPSILON, "five steps: {before}");
        assert!(way.reached(&progress("booting", None, None)) <= before, "what is no news is not said");
    }
}
