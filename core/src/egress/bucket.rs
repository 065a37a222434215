//! Limits the rate of bytes: a token bucket that all connections of a VM share.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::ByteSize;

/// Minimum size of a burst, in bytes.
const BURST_MIN: f64 = 65_536.0;
/// Duration of a burst at the limit, in seconds.
const BURST: f64 = 0.1;
/// Maximum pause before the limit is checked again: it may have changed.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// The bucket of one direction of a VM.
#[derive(Debug)]
pub(super) struct Bucket(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Bytes per second; `None`: no limit.
    rate: Option<f64>,
    /// Bytes that may pass now; negative if too many passed.
    left: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State { rate: None, left: 0.0, at: Instant::now() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the limit, in bytes per second.
    pub(super) fn set(&self, rate: Option<ByteSize>) {
        let mut state = self.state();
        let rate = rate.map(|rate| rate.as_bytes() as f64);
        if state.rate != rate {
            *state = State { rate, left: rate.map_or(0.0, burst), at: Instant::now() };
        }
    }

    /// Returns how long to wait before more bytes may pass.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        let mut state = self.state();
        let rate = state.rate?;
        let since = now.saturating_duration_since(state.at).as_secs_f64();
        state.left = (state.left + since * rate).min(burst(rate));
        state.at = now;
        (state.left < 0.0).then(|| Duration::from_secs_f64(-state.left / rate).min(PAUSE_MAX))
    }

    /// Counts bytes that have passed.
    pub(super) fn take(&self, bytes: usize) {
        let mut state = self.state();
        if state.rate.is_some() {
            state.left -= bytes as f64;
        }
    }
}

fn burst(rate: f64) -> f64 {
    (rate * BURST).max(BURST_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_in_a_while_is_the_rate_and_one_burst() {
        let bucket = Bucket::new();
        assert_eq!(bucket.pause(Instant::now()), None, "no limit");
        bucket.set(Some(ByteSize::mib(1)));
        let mut now = Instant::now();
        let (end, mut passed) = (now + Duration::from_secs(10), 0);
        while now < end {
            match bucket.pause(now) {
                Some(pause) => now += pause.max(Duration::from_micros(1)),
                None => {
                    bucket.take(16 << 10);
                    passed += 16 << 10;
                }
            }
        }
        let most = (10 << 20) + (1 << 20) / 10 + (32 << 10);
        assert!((10 << 20..=most).contains(&passed), "{passed}");
        bucket.set(None);
        assert_eq!(bucket.pause(now), None, "a limit that is gone holds nothing up");
    }
}
