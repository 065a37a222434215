//! Rate limit of log messages that a guest can cause.

use std::time::{Duration, Instant};

/// Time after a message during which further events are not logged.
const SILENCE: Duration = Duration::from_secs(10);

/// Lets one event through per [`SILENCE`] and counts the others.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// Returns whether to log an event at `now`: if so, the number of events that were suppressed before it.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < SILENCE) {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gives_one_line_and_a_count() {
        let (mut throttle, start) = (Throttle::default(), Instant::now());
        assert_eq!(throttle.admit(start), Some(0));
        for millisecond in 1..1000 {
            assert_eq!(throttle.admit(start + Duration::from_millis(millisecond)), None);
        }
        assert_eq!(throttle.admit(start + SILENCE), Some(999));
        assert_eq!(throttle.admit(start + SILENCE), None);
    }
}
