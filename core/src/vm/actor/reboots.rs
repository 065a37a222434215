//! The delay before a guest that rebooted is started again: none, unless the guest reboots in a loop.

use std::time::Duration;

/// A shorter boot counts as part of a reboot loop.
pub(super) const QUICK: Duration = Duration::from_secs(60);
/// Number of quick reboots in a row that count as a loop and are not followed by another start.
pub(super) const QUICK_MAX: u32 = 8;
/// Number of quick reboots that are followed by a start without delay: installers and updates reboot more than once.
const AT_ONCE: u32 = 3;

/// Response to a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reboot {
    /// Start it again at once.
    Now,
    /// Start it again after this delay.
    Later(Duration),
    /// Do not start it again: it reboots in a loop.
    Never,
}

/// The reboots of one VM since it was started.
#[derive(Debug, Default)]
pub(super) struct Reboots {
    quick: u32,
}

impl Reboots {
    /// Decides what to do about a reboot, given the duration of the boot before it.
    pub(super) fn next(&mut self, lasted: Duration) -> Reboot {
        self.quick = if lasted < QUICK { self.quick + 1 } else { 0 };
        match self.quick {
            0..=AT_ONCE => Reboot::Now,
            QUICK_MAX.. => {
                self.quick = 0;
                Reboot::Never
            }
            quick => Reboot::Later(Duration::from_secs(1 << (quick - AT_ONCE - 1))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_slows_down_and_ends() {
        let mut reboots = Reboots::default();
        let second = Duration::from_secs(1);
        let steps: Vec<Reboot> = (0..8).map(|_| reboots.next(second)).collect();
        let later = |seconds| Reboot::Later(Duration::from_secs(seconds));
        let now = Reboot::Now;
        assert_eq!(steps, [now, now, now, later(1), later(2), later(4), later(8), Reboot::Never]);
        // The count starts again after a start by a caller, and after a longer boot.
        assert_eq!(reboots.next(second), now);
        for _ in 0..20 {
            assert_eq!(reboots.next(QUICK), now);
        }
    }
}
