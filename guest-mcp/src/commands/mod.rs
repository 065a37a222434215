//! Commands: started ([`launch`]), read ([`reading`]), kept ([`kept`]), shown ([`show`]), and ended with all that they started
//! ([`tree`]). All of it is the holder's business ([`crate::holder`]).
//!
//! ```text
//! start ─> Running ─┬─> ended by itself ────────────────────────┐
//!                   ├─> its time is up ─> TERM, grace ─> KILL ──┼─> drain ─> Ended ─> forgotten: by age, count
//!                   └─> cancelled, signalled ───────────────────┘
//! ```
//! Calls come and go, and so do streams ([`attach`]); a command is one task of its own that waits for its process.

mod attach;
mod calls;
mod cgroup;
mod command;
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

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use crate::holder::wire::Settings;

/// How many descriptors a holder allows itself: pipes of all commands.
const DESCRIPTORS: u64 = 65_536;

/// Who calls, and how it can be told of things.
pub(crate) struct Caller {
    /// The client's name, as far as the host said it.
    pub(crate) client: Option<String>,
    /// The VM's configuration at the time of the call.
    pub(crate) settings: Settings,
    /// Cancelled when what the call started is to be killed.
    pub(crate) cancel: CancellationToken,
    /// Tells the newest lines of output, where that is wanted.
    pub(crate) tell: Option<Box<dyn Fn(String) + Send + Sync>>,
}

/// How many descriptors commands may have, and may allow themselves: as many as this process did at its start. It allows itself
/// more with the first call.
fn descriptors_of_commands() -> (u64, u64) {
    static LIMITS: OnceLock<(u64, u64)> = OnceLock::new();
    *LIMITS.get_or_init(|| {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let (now, most) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
        let more = Rlimit { current: Some(DESCRIPTORS.min(most).max(now)), maximum };
        // With fewer, fewer commands run at once.
        let _ = setrlimit(Resource::Nofile, more);
        (now, most)
    })
}
