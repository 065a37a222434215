//! Handling of a guest that its VMM paused because the host's disk is full: the shim notifies watchers, and resumes the guest when there is
//! space.
//!
//! The shim does this, so that the guest resumes even while no daemon runs.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pause::{Order, Pauses};
use super::say;
use super::serve::{is_open, send};
use crate::vmm::control::{Reply, Stall};
use crate::vmm::driver::Machine;
use crate::vmm::plan::LaunchPlan;

/// Interval between two checks of the free space.
const LOOK: Duration = Duration::from_secs(1);
/// Free space at which the guest is resumed, in bytes.
const ROOM: u64 = 16 << 20;
/// Interval at which the guest is resumed as a test if there is less space, or if the space is unknown.
const TRY_ANYWAY: Duration = Duration::from_secs(30);
/// Time that a guest has to run without a stall before the stall counts as over: its first write may fail again.
const SETTLED: Duration = Duration::from_secs(1);

/// The stall of a guest, and its watchers.
pub(super) struct Stalls {
    /// Files of the plan's drives.
    drives: Vec<PathBuf>,
    watchers: Vec<UnixStream>,
    /// The last state that was sent to the watchers.
    told: Option<Stall>,
    /// Time since which the guest runs again.
    running_since: Option<Instant>,
    /// Time at which the guest was last resumed.
    tried_at: Option<Instant>,
    /// Time of the next check, while a stall is not over.
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

    /// Returns the time by which [`Stalls::look`] must be called.
    pub(super) fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    pub(super) fn watchers(&self) -> usize {
        self.watchers.len()
    }

    /// Adds a watcher: sends it the current state now, and every change later.
    pub(super) fn watch(&mut self, watcher: UnixStream) {
        send(&watcher, &Reply::Stalled(self.told));
        self.watchers.push(watcher);
    }

    /// Drops watchers that have disconnected.
    pub(super) fn retain_watchers(&mut self) {
        self.watchers.retain(is_open);
    }

    /// Checks the machine, sends changes to the watchers, and resumes the guest when possible.
    pub(super) fn look(&mut self, machine: &Arc<dyn Machine>, pauses: &Pauses) {
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
                        pauses.order(Order::GoOn, None);
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
            None => "the guest runs again".to_owned(),
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
