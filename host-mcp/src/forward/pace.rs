//! Decides when a waiting client gets progress.

use std::time::{Duration, Instant};

/// After this much silence a waiting client is told that its call is still running. Clients are promised 10 s.
const HEARTBEAT: Duration = Duration::from_secs(8);
/// How often the silence is checked.
pub(crate) const BEAT_CHECK: Duration = Duration::from_secs(1);
/// How much the progress advances while a call is just running.
const STEP: f64 = 1e-6;

/// The progress that a client knows of a call; it only grows.
#[derive(Debug)]
pub(crate) struct Pace {
    /// `None` before the first word.
    last: Option<f64>,
    said: Instant,
}

impl Pace {
    /// For a call that starts now.
    pub(crate) fn start() -> Self {
        Self { last: None, said: Instant::now() }
    }

    /// Advances the progress; returns whether the client should be told.
    pub(crate) fn advance(&mut self, value: f64) -> bool {
        self.advance_at(value, Instant::now())
    }

    /// Without news: the progress to report if the client has heard nothing for long.
    pub(crate) fn beat(&mut self) -> Option<f64> {
        self.beat_at(Instant::now())
    }

    fn advance_at(&mut self, value: f64, now: Instant) -> bool {
        let grows = self.last.is_none_or(|last| value > last);
        if grows {
            *self = Self { last: Some(value), said: now };
        }
        grows
    }

    fn beat_at(&mut self, now: Instant) -> Option<f64> {
        let value = self.last.unwrap_or(0.0) + STEP;
        let is_due = now.saturating_duration_since(self.said) >= HEARTBEAT;
        (is_due && self.advance_at(value, now)).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_grows_and_a_silent_call_is_told_of() {
        let mut pace = Pace::start();
        let mut now = pace.said;
        assert!(pace.advance_at(0.0, now) && !pace.advance_at(0.0, now), "many begin with nothing done");
        assert!(pace.advance_at(3.0, now) && !pace.advance_at(3.0, now) && !pace.advance_at(1.0, now));
        assert_eq!(pace.beat_at(now), None);
        now += HEARTBEAT;
        let value = pace.beat_at(now).unwrap();
        assert!(value > 3.0);
        assert_eq!(pace.beat_at(now), None, "once");
        now += HEARTBEAT;
        assert!(!pace.advance_at(2.0, now), "what does not grow is no word");
        assert!(pace.beat_at(now).unwrap() > value);
        assert!(pace.advance_at(f64::MAX, now));
        assert_eq!(pace.beat_at(now + HEARTBEAT), None, "there is nothing larger to say");
    }
}
