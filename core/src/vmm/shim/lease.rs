//! Lets a guest's commands go on that stand still for a step of a daemon, if that daemon does not do it.
//!
//! ```text
//! a hold begins ─> a secret to the agent ─> guest paused, perhaps saved ─┬─ the hold runs out: guest resumed ─> the secret again: commands go on
//!                                                                       └─ released by the daemon, which thaws; if it does not, the same
//! ```
//! A guest cannot know whether it is the one that goes on or one that was restored from what was saved of it. But only this shim has the secret besides
//! them, and a restored guest has another shim, which never says it. An agent that does not know this request waits for a daemon.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use nexus_schema::link::{LEASE_PORT, LeaseAnswer, LeaseRequest};

use super::say;
use crate::os::random;
use crate::vmm::ask_agent::ask;

/// Timeout of the agent's answer before the guest is held. Without it the guest is held all the same, and its commands wait for a daemon. An emulated
/// guest on a busy host is slow.
const HOLD_TRY: Duration = Duration::from_secs(2);
/// Timeout of the agent's answer afterwards. It is asked again.
const TRY: Duration = Duration::from_millis(500);
/// Delay before the agent is asked again that did not answer: after a save, connections may break.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it is asked at most.
const TRIES: u32 = 60;

/// What a guest that is held was told.
#[derive(Debug)]
pub(super) struct Lease {
    /// The socket of the vsock device.
    socket: PathBuf,
    secret: Option<String>,
    /// When the agent is told to let commands go on.
    due: Option<Instant>,
    tries: u32,
}

impl Lease {
    pub(super) const fn new(socket: PathBuf) -> Self {
        Self { socket, secret: None, due: None, tries: 0 }
    }

    /// Tells the agent of a guest that runs, and is about to be held, a new secret.
    pub(super) fn begin(&mut self) {
        let secret = random::token();
        (self.secret, self.due) = (None, None);
        let answer = self.ask(&LeaseRequest::Hold { secret: secret.clone() }, HOLD_TRY);
        if answer.is_ok_and(|answer| answer.known) {
            self.secret = Some(secret);
        }
    }

    /// Has commands go on after this time, unless they do by then.
    pub(super) fn end_after(&mut self, time: Duration) {
        if self.secret.is_none() {
            return;
        }
        let at = Instant::now() + time;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
        self.tries = 0;
    }

    /// When [`Lease::end`] is to be called, if the guest runs.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Tells the agent of a running guest to let commands go on. If it does not answer, this is due again.
    pub(super) fn end(&mut self) {
        let Some(secret) = self.secret.clone() else {
            self.due = None;
            return;
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time_unix_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.tries += 1;
        match self.ask(&LeaseRequest::GoOn { secret, time_unix_ns }, TRY) {
            Ok(LeaseAnswer { known }) => {
                if known {
                    say("no daemon let the guest's commands go on: they were told to");
                }
                (self.secret, self.due) = (None, None);
            }
            Err(_) if self.tries < TRIES => self.due = Some(Instant::now() + AGAIN),
            Err(error) => {
                say(&format!(
                    "the guest's commands may wait for a daemon: its agent does not answer: {error}"
                ));
                (self.secret, self.due) = (None, None);
            }
        }
    }

    fn ask(&self, request: &LeaseRequest, limit: Duration) -> std::io::Result<LeaseAnswer> {
        let line = serde_json::to_string(request).map_err(std::io::Error::other)?;
        let answer = ask(&self.socket, LEASE_PORT, &line, limit)?;
        serde_json::from_str(&answer).map_err(std::io::Error::other)
    }
}
