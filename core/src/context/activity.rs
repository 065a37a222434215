//! What is under way in one VM: calls, streams and connections. Commands are the guest's own to tell.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// The zero of [`Inner::last`].
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What is under way in one VM. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activity(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    under_way: AtomicUsize,
    /// When something was under way last, in milliseconds.
    last: AtomicU64,
}

/// Counts one thing as under way in a VM until it is dropped. The default is of no VM.
#[derive(Debug)]
pub struct Busy(Activity);

impl Activity {
    /// Nothing is under way, and something was just now.
    pub(crate) fn new() -> Self {
        let this = Self::default();
        this.touch(Duration::ZERO);
        this
    }

    /// One more thing is under way.
    pub(crate) fn begin(&self) -> Busy {
        self.0.under_way.fetch_add(1, Ordering::AcqRel);
        Busy(self.clone())
    }

    /// Something was under way so long ago.
    pub(crate) fn touch(&self, ago: Duration) {
        let at = millis(START.elapsed().saturating_sub(ago));
        self.0.last.fetch_max(at, Ordering::AcqRel);
    }

    /// How long nothing has been under way; `None` while something is.
    pub(crate) fn idle(&self) -> Option<Duration> {
        // Whatever ends between the two counts as under way until now.
        let last = self.0.last.load(Ordering::Acquire);
        if self.0.under_way.load(Ordering::Acquire) > 0 {
            return None;
        }
        let last = last.max(self.0.last.load(Ordering::Acquire));
        Some(START.elapsed().saturating_sub(Duration::from_millis(last)))
    }
}

impl Default for Busy {
    fn default() -> Self {
        Activity::default().begin()
    }
}

impl Clone for Busy {
    fn clone(&self) -> Self {
        self.0.begin()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.touch(Duration::ZERO);
        self.0.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_idle_once_all_that_was_under_way_has_ended() {
        let activity = Activity::new();
        let (one, other) = (activity.begin(), activity.begin());
        let copy = one.clone();
        drop((one, other));
        assert_eq!(activity.idle(), None);
        drop(copy);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(20) {
            std::thread::yield_now();
        }
        assert!(activity.idle().is_some_and(|idle| idle >= Duration::from_millis(15)));
        activity.touch(Duration::ZERO);
        assert!(activity.idle().is_some_and(|idle| idle < Duration::from_millis(15)));
        // What was earlier than what is known changes nothing.
        activity.touch(Duration::from_secs(5));
        assert!(activity.idle().is_some_and(|idle| idle < Duration::from_secs(1)));
    }
}
