//! How soon a guest that rebooted is started again: at once, unless it does nothing but reboot.

use std::time::Duration;

/// A boot that lasts less counts as a step of a loop.
pub(super) const QUICK: Duration = Duration::from_secs(60);
/// So many of them in a row are a loop.
pub(super) const QUICK_MAX: u32 = 8;
/// So many are started again at once: installers and updates reboot more than once.
const AT_ONCE: u32 = 3;

/// What to do about a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reboot {
    /// Start it again at once.
    Now,
    /// Start it again after a while.
    Later(Duration),
    /// Leave it: it reboots in a loop.
    Never,
}

/// The reboots of one VM since it was started.
#[derive(Debug, Default)]
pub(super) struct Reboots {
    quick: u32,
}

impl Reboots {
    /// What to do about a reboot after a boot that lasted so long.
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
        // Started again by someone, it has its chances again; and so has one that ran for a while.
        assert_eq!(reboots.next(second), now);
        for _ in 0..20 {
            assert_eq!(reboots.next(QUICK), now);
        }
    }
}
