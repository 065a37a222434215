//! A connection to the host that is made before a program needs it.
//!
//! Programs often make several connections in a row. So while they do, the agent keeps one to the host for the next of them, which then waits only for
//! the host's answer. Nothing is kept for programs that make none.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_wire::duplex::{self, Reader, Writer};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use super::host::dial;
use crate::agent::Agent;

/// Timeout of a connection to the host.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the connection is kept. The host waits longer for its opening.
const KEPT: Duration = Duration::from_secs(2);

/// A connection to the host.
pub(super) type Ends = (Reader, Writer);

/// The place of the connection.
#[derive(Debug, Default)]
pub(super) struct Spare {
    ready: Mutex<Option<Ends>>,
    wanted: Notify,
}

impl Spare {
    fn ready(&self) -> MutexGuard<'_, Option<Ends>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the connection, if there is one. The host may have given it up.
    pub(super) fn take(&self) -> Option<Ends> {
        self.ready().take()
    }

    /// Has a connection made for the next program.
    pub(super) fn want(&self) {
        self.wanted.notify_one();
    }

    /// Waits until the connection was taken and the next one is wanted; `false` if it becomes too old before.
    async fn is_next_wanted(&self, until: Instant) -> bool {
        loop {
            let is_wanted = timeout_at(until, self.wanted.notified()).await.is_ok();
            if !is_wanted || self.ready().is_none() {
                return is_wanted;
            }
        }
    }
}

/// Makes connections forever when they are wanted, one at a time.
pub(super) async fn keep(agent: Arc<Agent>) {
    let spare = &agent.proxy.spare;
    loop {
        spare.wanted.notified().await;
        loop {
            // First the program goes on that has just got its connection.
            rustix::thread::sched_yield();
            // If it fails, the next program tries again and hears why.
            let Ok(ends) = connect(&agent).await else { break };
            *spare.ready() = Some(ends);
            if !spare.is_next_wanted(Instant::now() + KEPT).await {
                break;
            }
        }
        drop(spare.take());
    }
}

/// Connects to the host.
pub(super) async fn connect(agent: &Agent) -> io::Result<Ends> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not accept the connection");
    duplex::split(timeout(DIAL_TIMEOUT, dial(agent)).await.map_err(late)??)
}
