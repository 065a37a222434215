//! A guest that its VMM paused because the host's disk is full: told to who watches, and let go on when there is room.
//!
//! The shim does it, so that the guest goes on also while no daemon runs.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::say;
use super::serve::{STACK, is_open, send};
use crate::vmm::control::{Reply, Stall};
use crate::vmm::driver::Machine;
use crate::vmm::plan::LaunchPlan;

/// How often the room is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// So much room, in bytes, lets the guest go on.
const ROOM: u64 = 16 << 20;
/// With less room, or where it cannot be looked at, the guest is let go on this often, to find out.
const TRY_ANYWAY: Duration = Duration::from_secs(30);
/// How long a guest has to run without a stall before the stall counts as over: a first write may fail again.
const SETTLED: Duration = Duration::from_secs(1);

/// What keeps a guest from running, and who wants to know.
pub(super) struct Stalls {
    /// The plan's drives.
    drives: Vec<PathBuf>,
    watchers: Vec<UnixStream>,
    /// What they were told last.
    told: Option<Stall>,
    /// Since when the guest runs again.
    running_since: Option<Instant>,
    /// When the guest was last let go on.
    tried_at: Option<Instant>,
    /// When to look next, while a stall is not over.
    look_at: Option<Instant>,
}

impl Stalls {
    pub(super) fn of(plan: &LaunchPlan) -> Self {
        Self {
            drives: plan.drives.iter().map(|drive| drive.path.clone()).collect(),
            watchers: Vec::new(),
            told: None,
            running_since: None,
            tried_at: None,
            look_at: None,
        }
    }

    /// When [`Stalls::look`] has to be called at the latest.
    pub(super) fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    pub(super) fn watchers(&self) -> usize {
        self.watchers.len()
    }

    /// Tells this one how things are, and every change from now on.
    pub(super) fn watch(&mut self, watcher: UnixStream) {
        send(&watcher, &Reply::Stalled(self.told));
        self.watchers.push(watcher);
    }

    /// Forgets watchers that have gone.
    pub(super) fn retain_watchers(&mut self) {
        self.watchers.retain(is_open);
    }

    /// Looks how the machine is, tells changes, and lets the guest go on when it can.
    pub(super) fn look(&mut self, machine: &Arc<dyn Machine>) {
        let now = Instant::now();
        let stall = machine.stall();
        if stall.is_none() && self.told.is_none() {
            return;
        }
        match stall {
            Some(stall) => {
                self.running_since = None;
                self.tell(Some(stall));
                let is_due = self.look_at.is_none_or(|at| at <= now);
                if is_due {
                    self.look_at = Some(now + LOOK);
                    let tried_at = *self.tried_at.get_or_insert(now);
                    if self.has_room(stall) || tried_at + TRY_ANYWAY <= now {
                        self.tried_at = Some(now);
                        go_on(machine);
                    }
                }
            }
            None => {
                let since = *self.running_since.get_or_insert(now);
                if since + SETTLED <= now {
                    self.tell(None);
                    (self.running_since, self.tried_at, self.look_at) = (None, None, None);
                } else {
                    self.look_at = Some(since + SETTLED);
                }
            }
        }
    }

    fn tell(&mut self, stall: Option<Stall>) {
        if self.told == stall {
            return;
        }
        self.told = stall;
        say(&match stall {
            Some(Stall::DiskFull { drive }) => {
                format!("the host's disk is full: drive {drive} cannot be written")
            }
            None => "the guest goes on".to_owned(),
        });
        for watcher in &self.watchers {
            send(watcher, &Reply::Stalled(stall));
        }
    }

    fn has_room(&self, stall: Stall) -> bool {
        let Stall::DiskFull { drive } = stall;
        let Some(path) = self.drives.get(drive) else { return false };
        rustix::fs::statvfs(path).is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= ROOM)
    }
}

/// In a thread: the VMM may take its time, and this one reads its answer.
fn go_on(machine: &Arc<dyn Machine>) {
    let machine = Arc::clone(machine);
    let spawned = std::thread::Builder::new().name("go-on".to_owned()).stack_size(STACK).spawn(move || {
        if let Err(error) = machine.set_paused(false) {
            say(&format!("let the guest go on: {}", nexus_schema::error::chain(&error)));
        }
    });
    if let Err(error) = spawned {
        say(&format!("start a thread to let the guest go on: {error}"));
    }
}
