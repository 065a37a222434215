//! The clock: the host reports its own time, and asks this agent to correct the difference.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nexus_schema::link::{ClockAnswer, ClockParams};
use rustix::time::{ClockId, Timespec};

use super::{Agent, Place};
use crate::os::uptime;

/// The host's time, and when it was reported.
#[derive(Debug, Clone, Copy)]
struct Sighting {
    host: Duration,
    uptime: Duration,
}

/// The last known time of the host.
#[derive(Debug, Default)]
pub(super) struct HostClock(Mutex<Option<Sighting>>);

impl HostClock {
    pub(super) fn saw(&self, unix_ns: u64) {
        let sighting = Sighting { host: Duration::from_nanos(unix_ns), uptime: uptime() };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(sighting);
    }

    /// Returns how far this system's clock is ahead of the host's, in milliseconds; `None` before the host has reported its time.
    fn skew_ms(&self) -> Option<i64> {
        let sighting = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let host = sighting.host + uptime().saturating_sub(sighting.uptime);
        Some(millis(now()) - millis(host))
    }
}

impl Agent {
    /// Returns how far this system's clock is ahead of the host's, in milliseconds.
    pub(crate) fn clock_skew_ms(&self) -> Option<i64> {
        self.host_clock.skew_ms()
    }

    /// Handles a clock request of the host.
    pub(super) fn clock(&self, params: ClockParams) -> io::Result<ClockAnswer> {
        self.host_clock.saw(params.time_unix_ns);
        if let Some(add) = params.add_ns {
            match self.place {
                Place::Vm { .. } => set(moved(now(), add))?,
                Place::Process { .. } => return Err(io::Error::other("this guest is a process of the host")),
            }
        }
        let time_unix_ns = u64::try_from(now().as_nanos()).unwrap_or(u64::MAX);
        Ok(ClockAnswer { time_unix_ns })
    }

    /// Sets the clock of a VM to the host's time, after its processors stood still.
    pub(super) fn set_clock(&self, host_unix_ns: u64) -> io::Result<()> {
        self.host_clock.saw(host_unix_ns);
        let host = Duration::from_nanos(host_unix_ns);
        match self.place {
            // Never back: the message was on its way.
            Place::Vm { .. } if host > now() => set(host),
            Place::Vm { .. } | Place::Process { .. } => Ok(()),
        }
    }
}

/// Returns this system's time since 1970.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Sets this system's clock to a time since 1970.
pub(super) fn set(time: Duration) -> io::Result<()> {
    let time = Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

fn moved(time: Duration, by_ns: i64) -> Duration {
    let by = Duration::from_nanos(by_ns.unsigned_abs());
    if by_ns < 0 { time.saturating_sub(by) } else { time.saturating_add(by) }
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skew_is_against_what_the_host_said() {
        let clock = HostClock::default();
        assert_eq!(clock.skew_ms(), None);
        let host = now() + Duration::from_secs(60);
        clock.saw(u64::try_from(host.as_nanos()).unwrap());
        let skew = clock.skew_ms().unwrap();
        assert!((-61_000..=-59_000).contains(&skew), "{skew}");
    }

    #[test]
    fn clocks_move_both_ways() {
        let second = 1_000_000_000;
        assert_eq!(moved(Duration::from_secs(10), second), Duration::from_secs(11));
        assert_eq!(moved(Duration::from_secs(10), -second), Duration::from_secs(9));
        assert_eq!(moved(Duration::from_secs(1), i64::MIN), Duration::ZERO);
    }
}
