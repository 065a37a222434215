//! Points at which a daemon under test ends as if it were killed. Only builds with debug assertions have them.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, getpid, kill_process};

static ARMED: OnceLock<String> = OnceLock::new();

/// The prefix of a point at which a task panics, the first time that one reaches it.
const PANIC: &str = "panic:";

/// Chooses the point at which this process ends, or `panic:POINT`. Only the first call has an effect.
pub fn arm(point: &str) {
    if cfg!(debug_assertions) && ARMED.set(point.to_owned()).is_err() {
        tracing::warn!(point, "a failpoint is armed already");
    }
}

/// Ends this process by SIGKILL, or panics, if `point` is the armed one.
pub(crate) fn reach(point: &str) {
    static HAS_PANICKED: AtomicBool = AtomicBool::new(false);
    if cfg!(debug_assertions)
        && ARMED.get().and_then(|armed| armed.strip_prefix(PANIC)).is_some_and(|armed| armed == point)
        && !HAS_PANICKED.swap(true, Ordering::Relaxed)
    {
        panic!("at the failpoint {point}");
    }
    if cfg!(debug_assertions) && ARMED.get().is_some_and(|armed| armed == point) {
        // Written directly, because the log's own thread would die too.
        let _ = writeln!(std::io::stderr(), "ending at a failpoint point=\"{point}\"");
        if kill_process(getpid(), Signal::KILL).is_ok() {
            // Waits for the signal.
            loop {
                std::thread::park();
            }
        }
    }
}
