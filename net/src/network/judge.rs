//! Cuts connections that are no longer allowed, until it succeeds.

use std::time::Instant;

use nexus_net_wire::Event;

use super::Network;
use crate::error::Error;
use crate::firewall;
use crate::nft::socket::Netfilter;

impl Network {
    /// Cuts connections that are no longer allowed; returns their number. Connections that could not be cut are reported and retried.
    pub(super) fn judge(&mut self, netfilter: &mut Netfilter) -> Result<u64, Error> {
        let judged = firewall::judge(netfilter, &self.shared.view(), &self.shared.pins());
        let is_done = judged.as_ref().is_ok_and(|judged| judged.not_cut.is_none());
        self.to_judge.tried(is_done, Instant::now());
        let judged = judged?;
        let count = judged.cut.len() as u64;
        for denial in judged.cut {
            self.shared.denials.note(denial);
        }
        match judged.not_cut {
            None => Ok(count),
            Some((connections, source)) => {
                tracing::warn!(connections, error = %source, "could not cut connections that are no longer allowed; retrying");
                self.shared.denials.tell(Event::NotCut { connections, why: source.to_string() });
                Err(Error::Firewall { what: "cut connections that are no longer allowed", source })
            }
        }
    }

    /// Retries to cut connections.
    pub(super) fn judge_again(&mut self) -> Result<u64, Error> {
        let mut netfilter = firewall::open().inspect_err(|_| self.to_judge.tried(false, Instant::now()))?;
        self.judge(&mut netfilter)
    }
}
