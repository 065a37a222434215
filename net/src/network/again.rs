//! Changes that failed for now and are tried again: requests are answered in between.

use std::time::Instant;

use nexus_net_wire::Event;

use super::Network;
use crate::backoff::Backoff;
use crate::error::Error;
use crate::nft::socket::Netfilter;
use crate::{firewall, host_firewall};

impl Network {
    /// Returns when to try something again; `None` if there is nothing.
    pub(crate) fn due(&self) -> Option<Instant> {
        [&self.to_judge, &self.to_open].into_iter().filter_map(Backoff::due).min()
    }

    /// Tries again what is due. What fails again is tried later.
    pub(crate) fn try_again(&mut self) {
        let now = Instant::now();
        let is_due = |backoff: &Backoff| backoff.due().is_some_and(|at| at <= now);
        if is_due(&self.to_judge)
            && let Ok(cut) = self.judge_again()
        {
            tracing::info!(cut, "cut connections that are no longer allowed");
        }
        if is_due(&self.to_open) {
            match self.open_again() {
                Ok(changes) if changes > 0 => self.shared.denials.tell(Event::Repaired { changes }),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, cause = ?std::error::Error::source(&error), "cannot change the host's firewall");
                }
            }
        }
    }

    /// Looks for chains of the host's firewall that drop packets of VMs, and adds rules to them if configured; returns the number of changed
    /// rules. Waits for no other program that changes chains: that is tried again.
    pub(super) fn open_firewall(&mut self, netfilter: &mut Netfilter) -> Result<u64, Error> {
        let Some(instance) = &self.instance else { return Ok(0) };
        let failed = |source| Error::Firewall { what: "look at the rules of the host's firewall", source };
        let applied = host_firewall::apply(netfilter, instance.id, instance.opens_firewall)
            .inspect_err(|_| self.to_open.tried(true, Instant::now()))
            .map_err(failed)?;
        let now = Instant::now();
        match &applied.held {
            None => self.to_open.tried(true, now),
            // Changes by others, which are more reasons to look, are no tries that failed.
            Some(_) if self.to_open.due().is_some_and(|at| at > now) => {}
            Some(why) => {
                if self.to_open.due().is_none() {
                    tracing::warn!(why, "cannot change the host's firewall now; retrying");
                }
                self.to_open.tried(false, now);
            }
        }
        self.firewall = applied.chains;
        // What is held is tried again all the same.
        match applied.error {
            Some(source) => {
                let what = "remove rules from the host's firewall";
                Err(Error::Firewall { what, source })
            }
            None => Ok(applied.changes),
        }
    }

    fn open_again(&mut self) -> Result<u64, Error> {
        let mut netfilter = firewall::open().inspect_err(|_| self.to_open.tried(false, Instant::now()))?;
        self.open_firewall(&mut netfilter)
    }
}
