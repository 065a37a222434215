//! The ports of a virtio-serial device that replace the vsock device of a VM, and what is said on them.
//!
//! Two ports carry packets, each in a [session](crate::session) of its own, so that calls do not wait for bulk. On a third one the host asks the
//! guest to begin new sessions: after the VM was restored, what both ends of a port know of each other is no longer true.

use std::fmt;

use nexus_schema::link::{HOST_PORT, MCP_PORT};

use crate::connection::Cids;
use crate::device::Traits;
use crate::hybrid::FAR_CONNECTIONS_MAX;
use crate::packet::HOST_CID;
use crate::session::Nonce;

/// The ports: the one for requests of the host, then those of the lanes. Their numbers in the device count from 1.
pub const PORTS: [&str; 3] = ["nexus.ctl", "nexus.calls", "nexus.bulk"];
/// Number of lanes.
pub const LANES: usize = PORTS.len() - 1;
/// The word on the kernel's command line that tells the agent to use these ports.
pub const WORD: &str = "nexus.link=serial";

/// Context id of the guest in packets. It is always this one, because a VM that was restored as another one still has it in its memory.
const GUEST_CID: u64 = 3;
/// Maximum length of a request, in bytes.
const REQUEST_MAX: usize = 128;
/// What a request to begin new sessions begins with; the nonce follows.
const RELINK: &str = "R ";

/// Returns the properties of the host's side.
#[must_use]
pub fn host(say: fn(fmt::Arguments<'_>)) -> Traits {
    let cids = Cids { near: HOST_CID, far: GUEST_CID };
    Traits { cids, far_max: FAR_CONNECTIONS_MAX, lanes: LANES, lane_of, say }
}

/// Returns the properties of the guest's side.
#[must_use]
pub fn guest(say: fn(fmt::Arguments<'_>)) -> Traits {
    let cids = Cids { near: GUEST_CID, far: HOST_CID };
    Traits { cids, far_max: usize::MAX, lanes: LANES, lane_of, say }
}

/// Returns the lane of connections to a port of host or guest.
fn lane_of(port: u32) -> usize {
    usize::from(!matches!(port, MCP_PORT | HOST_PORT))
}

/// Returns the request to begin new sessions with this nonce. A line that was cut off before it does not matter.
#[must_use]
pub fn relink(nonce: Nonce) -> String {
    format!("\n{RELINK}{nonce}\n")
}

/// Reads the host's requests.
#[derive(Debug, Default)]
pub struct Requests {
    line: Vec<u8>,
}

impl Requests {
    /// Takes bytes. Returns the newest nonce that new sessions were asked for with.
    pub fn take(&mut self, bytes: &[u8]) -> Option<Nonce> {
        let mut asked = None;
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < REQUEST_MAX {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let nonce = std::str::from_utf8(&line).ok().and_then(|line| line.strip_prefix(RELINK));
            asked = nonce.and_then(|nonce| nonce.parse().ok()).or(asked);
        }
        asked
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::link::{EGRESS_PORT, STREAM_PORT};

    use super::*;

    #[test]
    fn calls_do_not_wait_for_bulk() {
        assert_eq!([MCP_PORT, HOST_PORT].map(lane_of), [0, 0]);
        assert_eq!([STREAM_PORT, EGRESS_PORT, 5000].map(lane_of), [1, 1, 1]);
    }

    #[test]
    fn requests_are_read_however_they_come() {
        let nonce: Nonce = "abc-1".parse().unwrap();
        let line = relink(nonce);
        let mut requests = Requests::default();
        assert_eq!(requests.take(b"R cut o"), None);
        for byte in &line.as_bytes()[..line.len() - 1] {
            assert_eq!(requests.take(&[*byte]), None);
        }
        assert_eq!(requests.take(b"\n"), Some(nonce));
        let two = format!("{}{}junk", relink("old".parse().unwrap()), relink(nonce));
        assert_eq!(requests.take(two.as_bytes()), Some(nonce));
        assert_eq!(requests.take(b"\nR \nR not!\nX abc\n"), None);
        assert_eq!(requests.take(&[b'x'; 100_000]), None);
        assert!(requests.line.len() <= REQUEST_MAX);
    }
}
