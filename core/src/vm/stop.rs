//! The ladder of a stop: rungs with a deadline each, as data.

use std::time::Duration;

/// One way to bring a VM down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rung {
    /// The agent is asked: it ends commands, writes disks out and powers off.
    AskAgent,
    /// The VMM is asked, as if its power button were pressed.
    AskVmm,
    /// The VMM is killed.
    Kill,
}

impl Rung {
    /// The first rung of a stop.
    pub(crate) const fn first(force: bool, agent_answers: bool) -> Self {
        match (force, agent_answers) {
            (true, _) => Self::Kill,
            (false, true) => Self::AskAgent,
            (false, false) => Self::AskVmm,
        }
    }

    /// The rung after this one; the last one is climbed again and again.
    pub(crate) const fn next(self) -> Self {
        match self {
            Self::AskAgent => Self::AskVmm,
            Self::AskVmm | Self::Kill => Self::Kill,
        }
    }

    /// How long to wait on this rung; `graceful` is what the agent is given.
    pub(crate) const fn patience(self, graceful: Duration) -> Duration {
        match self {
            Self::AskAgent => graceful,
            Self::AskVmm => Duration::from_secs(2),
            Self::Kill => Duration::from_secs(5),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ladder_ends_with_a_kill() {
        for force in [true, false] {
            for agent in [true, false] {
                let mut rung = Rung::first(force, agent);
                assert_eq!(rung == Rung::Kill, force);
                for _ in 0..3 {
                    rung = rung.next();
                }
                assert_eq!(rung, Rung::Kill);
            }
        }
    }
}
