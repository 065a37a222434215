//! Decides when to retry after a failure. Pure.

use std::time::{Duration, Instant};

/// Pause after the first failure, and the maximum; it doubles with each failure.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Something that is retried until it succeeds.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    next: Option<(Instant, Duration)>,
}

impl Backoff {
    /// Returns when to retry; `None` if there is nothing to retry.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.next.map(|(at, _)| at)
    }

    /// Records an attempt.
    pub(crate) fn tried(&mut self, succeeded: bool, now: Instant) {
        self.next = match (succeeded, self.next) {
            (true, _) => None,
            (false, None) => Some((now + PAUSES.0, PAUSES.0)),
            (false, Some((_, pause))) => {
                let pause = (pause * 2).min(PAUSES.1);
                Some((now + pause, pause))
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_it_succeeds() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        assert_eq!(backoff.due(), None);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            backoff.tried(false, now);
            pauses.push(backoff.due().unwrap() - now);
        }
        assert_eq!(pauses[..3], [100, 200, 400].map(Duration::from_millis));
        assert_eq!(pauses[8], PAUSES.1);
        backoff.tried(true, now);
        assert_eq!(backoff.due(), None);
        backoff.tried(false, now);
        assert_eq!(backoff.due(), Some(now + PAUSES.0), "it begins anew");
    }
}
