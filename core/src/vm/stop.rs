//! The steps of a stop ("rungs of a ladder"), each with a timeout, as data.

use std::time::Duration;

/// One way to stop a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rung {
    /// Ask the agent: it ends commands, syncs disks and powers off.
    AskAgent,
    /// Ask the VMM, as if the machine's power button were pressed.
    AskVmm,
    /// Kill the VMM.
    Kill,
}

impl Rung {
    /// Returns the first rung of a stop.
    pub(crate) const fn first(force: bool, agent_answers: bool) -> Self {
        match (force, agent_answers) {
            (true, _) => Self::Kill,
            (false, true) => Self::AskAgent,
            (false, false) => Self::AskVmm,
        }
    }

    /// Returns the rung after this one; the last one repeats.
    pub(crate) const fn next(self) -> Self {
        match self {
            Self::AskAgent => Self::AskVmm,
            Self::AskVmm | Self::Kill => Self::Kill,
        }
    }

    /// Returns the timeout of this rung; `graceful` is the timeout for the agent.
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
