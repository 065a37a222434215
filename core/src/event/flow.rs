//! How many events a source may have in a time: a token bucket.

use std::time::Instant;

/// A limit: so many at once, and so many per second after that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) burst: f64,
    pub(super) per_second: f64,
}

/// What a limit still allows.
#[derive(Debug)]
pub(super) struct Flow {
    limit: Limit,
    left: f64,
    at: Instant,
}

impl Flow {
    pub(super) fn new(limit: Limit, now: Instant) -> Self {
        Self { limit, left: limit.burst, at: now }
    }

    /// Whether one more may pass now.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + since * self.limit.per_second).min(self.limit.burst);
        self.at = now;
        let passes = self.left >= 1.0;
        if passes {
            self.left -= 1.0;
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_what_time_allows() {
        let now = Instant::now();
        let mut flow = Flow::new(Limit { burst: 3.0, per_second: 2.0 }, now);
        assert_eq!((0..9).filter(|_| flow.take(now)).count(), 3);
        let later = now + Duration::from_secs(1);
        assert_eq!((0..9).filter(|_| flow.take(later)).count(), 2);
        let much_later = now + Duration::from_secs(1000);
        assert_eq!((0..9).filter(|_| flow.take(much_later)).count(), 3);
    }
}
