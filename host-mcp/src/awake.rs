//! Keeps the processors awake while calls follow upon each other.
//!
//! A call wakes the daemon, then the guest, then the daemon and the client again. To wake a processor takes longer than all the
//! work of a short call, on virtual machines above all, which leave it to their hosts. Linux lets root ask that none sleeps:
//! PM QoS by `/dev/cpu_dma_latency` (the kernel's `Documentation/power/pm_qos_interface.rst`).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A call that begins so soon after the end of one follows upon it.
const SOON: Duration = Duration::from_millis(1);
/// For how long after such a call no processor sleeps.
const HOLD: Duration = Duration::from_millis(10);
/// How long waking may take, in microseconds.
const AT_ONCE: i32 = 0;
/// What says the same as not to ask: `PM_QOS_CPU_LATENCY_DEFAULT_VALUE` of the kernel, in microseconds.
const WHENEVER: i32 = 2_000_000_000;

/// Watches how calls follow upon each other. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Awake(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    /// Holds what was asked for last until it is closed.
    device: File,
    start: Instant,
    /// When the last call ended, in nanoseconds since `start`; 0 before any has.
    ended: AtomicU64,
    /// Until when no processor sleeps, likewise.
    until: AtomicU64,
    is_kept: AtomicBool,
}

impl Awake {
    /// Lets processors sleep when they like.
    pub fn off() -> Self {
        Self(None)
    }

    /// Asks by the kernel's device, which root alone may open. Nothing is asked for before there are calls.
    pub fn by(device: &Path) -> io::Result<Self> {
        Ok(Self(Some(Arc::new(Inner {
            device: File::options().append(true).open(device)?,
            start: Instant::now(),
            ended: AtomicU64::new(0),
            until: AtomicU64::new(0),
            is_kept: AtomicBool::new(false),
        }))))
    }

    /// A call begins. In a Tokio runtime.
    pub(crate) fn begins(&self, now: Instant) {
        if let Some(inner) = &self.0 {
            inner.begins(now);
        }
    }

    /// A call has ended.
    pub(crate) fn ended(&self, now: Instant) {
        if let Some(inner) = &self.0 {
            inner.ended.store(inner.nanos(now), Ordering::Relaxed);
        }
    }
}

impl Inner {
    fn begins(self: &Arc<Self>, now: Instant) {
        let ended = self.ended.load(Ordering::Relaxed);
        let now = self.nanos(now);
        if ended == 0 || now.saturating_sub(ended) > nanos(SOON) {
            return;
        }
        self.until.store(now + nanos(HOLD), Ordering::Relaxed);
        if !self.is_kept.swap(true, Ordering::AcqRel) {
            self.ask(AT_ONCE);
            tokio::spawn(Arc::clone(self).let_go());
        }
    }

    /// Waits for the end of the calls; then processors may sleep again.
    async fn let_go(self: Arc<Self>) {
        loop {
            let left = self.until.load(Ordering::Relaxed).saturating_sub(self.nanos(Instant::now()));
            if left == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_nanos(left)).await;
        }
        self.ask(WHENEVER);
        self.is_kept.store(false, Ordering::Release);
    }

    fn ask(&self, micros: i32) {
        if let Err(error) = (&self.device).write_all(&micros.to_ne_bytes()) {
            tracing::debug!(%error, micros, "cannot ask how soon processors are to wake");
        }
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.start))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn processors_are_kept_awake_for_calls_in_a_row_and_no_longer() {
        let device = tempfile::NamedTempFile::new().unwrap();
        let said = || -> Vec<i32> {
            let bytes = fs_err::read(device.path()).unwrap();
            bytes.chunks(4).map(|value| i32::from_ne_bytes(value.try_into().unwrap())).collect()
        };
        let awake = Awake::by(device.path()).unwrap();
        let now = Instant::now();
        awake.begins(now);
        awake.ended(now + Duration::from_millis(50));
        awake.begins(now + Duration::from_millis(52));
        assert!(said().is_empty(), "neither the first call nor one that comes later");

        awake.ended(now + Duration::from_millis(100));
        awake.begins(now + Duration::from_micros(100_500));
        awake.ended(now + Duration::from_micros(100_900));
        awake.begins(now + Duration::from_millis(101));
        assert_eq!(said(), [AT_ONCE], "asked for once");
        while said().len() < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(said(), [AT_ONCE, WHENEVER]);
        assert!(now.elapsed() >= Duration::from_millis(111));

        // The next series asks again.
        let later = Instant::now();
        while awake.0.as_ref().unwrap().is_kept.load(Ordering::Acquire) {
            tokio::task::yield_now().await;
        }
        awake.ended(later);
        awake.begins(later);
        assert_eq!(said(), [AT_ONCE, WHENEVER, AT_ONCE]);
    }

    #[test]
    fn without_the_device_nothing_is_asked() {
        assert!(Awake::by(Path::new("/nowhere/device")).is_err());
        let (off, now) = (Awake::off(), Instant::now());
        off.ended(now);
        off.begins(now);
    }
}
