//! Pauses of the guest: one that lasts until it is resumed, and one that a daemon holds for a step of its own and that ends by itself if
//! the daemon does not go on with it.
//!
//! One thread makes all pauses and resumes, one after the other, so that the last request counts. It also sees to it that commands, which stand still
//! for such a step too, go on ([`lease`](super::lease)).

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::lease::Lease;
use super::save::{self, Save};
use super::say;
use super::serve::{STACK, send};
use crate::os::paths::vm_files;
use crate::vmm::control::{HOLD_MAX, Reply};
use crate::vmm::driver::{DriverError, Machine};
use crate::vmm::plan::LaunchPlan;

/// Delay before a resume that failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long after a hold was released commands go on at the latest. The daemon that released it lets them go on within that time.
const THAWED_WITHIN: Duration = Duration::from_secs(15);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Pause until [`Order::Resume`].
    Pause,
    /// End that.
    Resume,
    /// Pause for this time.
    Hold(Duration),
    /// End that.
    Release,
    /// Resume a guest that the VMM has paused by itself, unless it is paused by one of the above.
    GoOn,
}

/// An order, or a save, which needs the guest paused.
enum Task {
    /// The answer is sent to the caller, if there is one.
    Order(Order, Option<UnixStream>),
    Save(Save),
}

/// The pauses of a guest.
pub(super) struct Pauses {
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

impl Pauses {
    /// Starts the thread. It ends when this is dropped.
    pub(super) fn start(machine: &Arc<dyn Machine>, plan: &LaunchPlan) -> std::io::Result<Self> {
        Self::start_at(vm_files::VSOCK.into(), machine, plan)
    }

    /// The same with the socket of the guest's vsock device.
    pub(super) fn start_at(
        socket: PathBuf,
        machine: &Arc<dyn Machine>,
        plan: &LaunchPlan,
    ) -> std::io::Result<Self> {
        let (tasks, taken) = channel();
        let machine = Arc::clone(machine);
        let drives = plan.drives.iter().filter(|drive| !drive.read_only).map(|drive| drive.path.clone());
        let drives: Vec<PathBuf> = drives.collect();
        let thread = std::thread::Builder::new()
            .name("pauses".to_owned())
            .stack_size(STACK)
            .spawn(move || serve(&*machine, &drives, Lease::new(socket), &taken))?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Passes an order on. The answer is sent to `caller`.
    pub(super) fn order(&self, order: Order, caller: Option<UnixStream>) {
        self.pass_on(Task::Order(order, caller));
    }

    /// Passes a save on, which holds the guest. The answer is sent to its caller.
    pub(super) fn save(&self, save: Save) {
        self.pass_on(Task::Save(save));
    }

    fn pass_on(&self, task: Task) {
        let sent = self.tasks.as_ref().map(|tasks| tasks.send(task));
        if !matches!(sent, Some(Ok(()))) {
            say("the thread for pauses has ended");
        }
    }
}

impl Drop for Pauses {
    /// Waits for the thread, which holds the machine.
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            say("the thread for pauses panicked");
        }
    }
}

/// Why a guest is paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Reasons {
    by_request: bool,
    held_until: Option<Instant>,
}

impl Reasons {
    const fn any(self) -> bool {
        self.by_request || self.held_until.is_some()
    }

    /// Returns the reasons after an order.
    fn after(self, order: Order, now: Instant) -> Self {
        match order {
            Order::Pause => Self { by_request: true, ..self },
            Order::Resume => Self { by_request: false, ..self },
            Order::Hold(time) => Self { held_until: Some(now + time.min(HOLD_MAX)), ..self },
            Order::Release => Self { held_until: None, ..self },
            Order::GoOn => self,
        }
    }
}

fn serve(machine: &dyn Machine, drives: &[PathBuf], lease: Lease, tasks: &Receiver<Task>) {
    let mut guest = Guest { machine, drives, lease, reasons: Reasons::default() };
    loop {
        let taken = match guest.look_at() {
            None => tasks.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => tasks.recv_timeout(until.saturating_duration_since(Instant::now())),
        };
        let (order, caller) = match taken {
            Ok(Task::Order(order, caller)) => (order, caller),
            Ok(Task::Save(save)) => {
                save::serve(&mut guest, &save);
                continue;
            }
            Err(RecvTimeoutError::Timeout) if !guest.reasons.any() => {
                guest.lease.end();
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                say("the daemon does not go on with what it paused the guest for: resuming the guest");
                guest.lease.end_after(Duration::ZERO);
                (Order::Release, None)
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let result = guest.obey(order);
        if let Some(caller) = caller {
            let reply = match result {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused(nexus_schema::error::chain(&error)),
            };
            send(&caller, &reply);
        }
    }
}

/// The guest, as the thread for pauses knows it.
pub(super) struct Guest<'a> {
    pub(super) machine: &'a dyn Machine,
    drives: &'a [PathBuf],
    /// How its commands go on without a daemon.
    pub(super) lease: Lease,
    reasons: Reasons,
}

impl Guest<'_> {
    /// When there is something to do without an order: at the end of a hold, or when commands are to go on in a guest that runs.
    fn look_at(&self) -> Option<Instant> {
        if self.reasons.any() { self.reasons.held_until } else { self.lease.due() }
    }

    /// Carries an order out. What fails is also said in the shim's log.
    pub(super) fn obey(&mut self, order: Order) -> Result<(), DriverError> {
        let result = self.carry_out(order);
        if let Err(error) = &result {
            say(&format!("{order:?} failed: {}", nexus_schema::error::chain(error)));
        }
        if order == Order::Release {
            self.lease.end_after(THAWED_WITHIN);
        }
        result
    }

    fn carry_out(&mut self, order: Order) -> Result<(), DriverError> {
        let after = self.reasons.after(order, Instant::now());
        if after.any() {
            if order == Order::GoOn {
                return Ok(());
            }
            if !self.reasons.any() {
                if matches!(order, Order::Hold(_)) {
                    self.lease.begin();
                }
                sync(self.drives);
            }
            self.machine.set_paused(true)?;
            self.reasons = after;
            return Ok(());
        }
        let resumed = self.machine.set_paused(false);
        self.reasons = match &resumed {
            // A guest never stays paused without a reason: the end of a hold is tried again.
            Err(_) if order == Order::Release => {
                Reasons { held_until: Some(Instant::now() + AGAIN), ..after }
            }
            Err(_) => self.reasons,
            Ok(()) => after,
        };
        resumed
    }

    /// Sets the time of a hold anew, while the guest is paused.
    pub(super) fn extend(&mut self, time: Duration) {
        self.reasons = self.reasons.after(Order::Hold(time), Instant::now());
    }
}

/// Puts what the guest has written on the disk, since the VMM does so within its pause. Where the files cannot be opened, as in a jail, the
/// pause takes longer.
fn sync(drives: &[PathBuf]) {
    for drive in drives {
        if let Ok(file) = std::fs::File::open(drive) {
            file.sync_data().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_runs_when_nothing_pauses_it() {
        let now = Instant::now();
        let hold = Order::Hold(Duration::from_secs(1));
        for (orders, is_paused) in [
            (&[Order::Pause][..], true),
            (&[Order::Pause, Order::Resume], false),
            (&[hold], true),
            (&[hold, hold, Order::Release], false),
            (&[Order::Pause, hold, Order::Release], true),
            (&[Order::Pause, hold, Order::Resume], true),
            (&[Order::Pause, hold, Order::Resume, Order::Release], false),
            (&[Order::Pause, Order::GoOn], true),
            (&[Order::GoOn], false),
        ] {
            let after = orders.iter().fold(Reasons::default(), |reasons, order| reasons.after(*order, now));
            assert_eq!(after.any(), is_paused, "{orders:?}");
        }
        let long = Reasons::default().after(Order::Hold(Duration::from_secs(1 << 20)), now);
        assert_eq!(long.held_until, Some(now + HOLD_MAX));
    }
}
