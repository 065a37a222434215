//! Commands: started ([`launch`]), read ([`reading`]), kept ([`kept`]), shown ([`show`]), and killed with all processes that they started ([`tree`]).
//! All of this runs in the holder ([`crate::holder`]).
//!
//! ```text
//! start ─> Running ─┬─> exits by itself ────────────────────────┐
//!                   ├─> timeout ─> TERM, grace ─> KILL ─────────┼─> drain ─> Ended ─> forgotten: by age, count
//!                   └─> cancelled, signalled ───────────────────┘
//! ```
//! Calls and streams ([`attach`]) come and go; each command has a task of its own that waits for its process.

mod attach;
mod calls;
mod cgroup;
mod command;
mod cursor;
pub(crate) mod freeze;
mod kept;
mod launch;
mod mcp;
mod newest;
mod offline;
mod oom;
mod reading;
mod services;
mod show;
mod streams;
mod table;
mod tree;

pub(crate) use self::launch::PATH;
pub(crate) use self::services::{Orders, Problems, SERVICES_START};
pub(crate) use self::table::Table;

use std::sync::OnceLock;

use nexus_schema::TraceContext;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use crate::holder::wire::Settings;

/// The limit of file descriptors of the agent and of the holder: for streams and programs' connections, and for the pipes of all commands.
const DESCRIPTORS: u64 = 65_536;

/// The caller, and how to send it progress.
pub(crate) struct Caller {
    /// The client's name, if the host gave it.
    pub(crate) client: Option<String>,
    /// The trace that the call belongs to.
    pub(crate) trace: Option<TraceContext>,
    /// The VM's configuration at the time of the call.
    pub(crate) settings: Settings,
    /// Cancelled when what the call started should be killed.
    pub(crate) cancel: CancellationToken,
    /// Sends the newest lines of output, if wanted.
    pub(crate) tell: Option<Box<dyn Fn(String) + Send + Sync>>,
}

/// Returns the soft and hard limits of file descriptors for commands: those that this process had at its start. The first call raises this process's
/// own limit.
pub(crate) fn descriptors_of_commands() -> (u64, u64) {
    static LIMITS: OnceLock<(u64, u64)> = OnceLock::new();
    *LIMITS.get_or_init(|| {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let (now, most) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
        let more = Rlimit { current: Some(DESCRIPTORS.min(most).max(now)), maximum };
        // If this fails, there can be fewer commands and connections at the same time.
        let _ = setrlimit(Resource::Nofile, more);
        (now, most)
    })
}

/// The limits of [`descriptors_of_commands`] as a shell shows them by `ulimit -Sn; ulimit -Hn`.
#[cfg(test)]
pub(crate) fn shown_descriptors() -> String {
    let (now, most) = descriptors_of_commands();
    let shown = |limit: u64| if limit == u64::MAX { "unlimited".to_owned() } else { limit.to_string() };
    format!("{}\n{}\n", shown(now), shown(most))
}
