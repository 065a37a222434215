//! Points at which a daemon under test ends as if it were killed there. Builds without debug assertions have none.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, getpid, kill_process};

static ARMED: OnceLock<String> = OnceLock::new();

/// What the name of a point begins with at which a task panics, the first time that one is there.
const PANIC: &str = "panic:";

/// Chooses the point at which this process ends, or `panic:POINT`. The first choice counts.
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
        // At once: the log is written by another thread, which dies too.
        let _ = writeln!(std::io::stderr(), "ending at a failpoint point=\"{point}\"");
        if kill_process(getpid(), Signal::KILL).is_ok() {
            // Nothing more may happen until the signal is there.
            loop {
                std::thread::park();
            }
        }
    }
}
