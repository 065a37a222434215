//! When a client hears of a call that it waits for.

use std::time::{Duration, Instant};

/// After how long without a word a client that waits is told that its call still runs. Clients are promised 10 s.
const HEARTBEAT: Duration = Duration::from_secs(8);
/// How often that is looked at.
pub(crate) const BEAT_CHECK: Duration = Duration::from_secs(1);
/// How far a call comes by still running.
const STEP: f64 = 1e-6;

/// How far a client believes its call to be: that only grows.
#[derive(Debug)]
pub(crate) struct Pace {
    last: f64,
    said: Instant,
}

impl Pace {
    /// For a call that begins now.
    pub(crate) fn start() -> Self {
        Self { last: 0.0, said: Instant::now() }
    }

    /// The call is so far; whether the client is to hear it.
    pub(crate) fn advance(&mut self, value: f64) -> bool {
        self.advance_at(value, Instant::now())
    }

    /// Nothing is new; what the client is told all the same, if it has heard nothing for long.
    pub(crate) fn beat(&mut self) -> Option<f64> {
        self.beat_at(Instant::now())
    }

    fn advance_at(&mut self, value: f64, now: Instant) -> bool {
        let grows = value > self.last;
        if grows {
            *self = Self { last: value, said: now };
        }
        grows
    }

    fn beat_at(&mut self, now: Instant) -> Option<f64> {
        let value = self.last + STEP;
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
