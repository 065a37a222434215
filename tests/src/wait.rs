//! Waits for something, with a deadline.

use std::time::{Duration, Instant};

/// Calls `ask` until it returns a value or the time is up. The pauses grow from 5 to 200 ms.
pub fn until<T>(longest: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + longest;
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// Waits for a time during which something must not happen.
pub fn stay(time: Duration) {
    until(time, || None::<()>);
}
