//! How often a peer may give a wrong token. The right one is looked up first and served always, so a limit costs its holder nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many wrong tokens a peer may give at once.
const BURST: u32 = 20;
/// How often a peer may give another one after that.
const EVERY: Duration = Duration::from_millis(500);
/// How many peers are remembered.
const PEERS_MAX: usize = 1024;

/// Who gives tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Who {
    /// A user of the Unix socket, by number.
    User(u32),
    /// A client of HTTP, by its address.
    Address(IpAddr),
}

/// The wrong tokens of each peer.
#[derive(Debug, Default)]
pub(super) struct WrongTokens(Mutex<HashMap<Who, Peer>>);

#[derive(Debug)]
struct Peer {
    left: u32,
    since: Instant,
}

impl WrongTokens {
    /// Counts a wrong token; whether the peer has given too many.
    pub(super) fn is_too_many(&self, peer: Who) -> bool {
        self.count(peer, Instant::now())
    }

    fn count(&self, peer: Who, now: Instant) -> bool {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() >= PEERS_MAX && !peers.contains_key(&peer) {
            peers.retain(|_, peer| now.duration_since(peer.since) < EVERY * BURST);
            if peers.len() >= PEERS_MAX {
                return true;
            }
        }
        let peer = peers.entry(peer).or_insert(Peer { left: BURST, since: now });
        let regained =
            u32::try_from(now.duration_since(peer.since).as_nanos() / EVERY.as_nanos()).unwrap_or(BURST);
        if regained > 0 {
            peer.left = peer.left.saturating_add(regained).min(BURST);
            peer.since = now;
        }
        let is_too_many = peer.left == 0;
        peer.left = peer.left.saturating_sub(1);
        is_too_many
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_tokens_are_limited_per_peer_and_the_limit_passes() {
        let wrong = WrongTokens::default();
        let now = Instant::now();
        let peer = |last| Who::Address(IpAddr::from([127, 0, 0, last]));
        let refused = (0..10_000).filter(|_| wrong.count(peer(1), now)).count();
        assert_eq!(refused, 10_000 - BURST as usize);
        assert!(!wrong.count(peer(2), now) && !wrong.count(Who::User(7), now), "another peer");
        assert!(!wrong.count(peer(1), now + EVERY));
        assert!(wrong.count(peer(1), now + EVERY));
        assert!(!wrong.count(peer(1), now + EVERY * 100));
    }
}
