//! How long VMs live, and how long they may be idle: one task for all VMs decides when to look at which, and asks its task to act.
//!
//! ```text
//! expires_at <= now ─────────────────────────────────────────> Expire: delete it, or stop it if it is protected
//! ready, and nothing under way for idle_stop ─> ask the guest ─> StopIdle, unless a command runs or ended since: stops or suspends it
//! ```
//! Calls, streams and connections of published ports are counted by [`Activity`](crate::context::Activity); commands are the guest's to tell,
//! and it is asked only when all else is quiet. Services do not count: they run as long as their VM. The end of a life is in the VM's row.
//! The idle time is in memory, and begins anew with the daemon.

use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::tools::command::{CommandList, CommandListParams, CommandState};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{TimeSpan, Timestamp, ToolError};

use super::guest_call;
use super::wait::ask;
use crate::context::{Command, Handle, Shared};
use crate::op::store_error;
use crate::store::vms::VmRecord;
use crate::store::{now, ops};

/// How long nothing is looked at, at most.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// How soon something is looked at again that could not be done.
const AGAIN: Duration = Duration::from_secs(2);
/// How long one VM is waited for: to suspend one may take minutes, and others are due, too.
const ACT_MAX: Duration = Duration::from_secs(30);
/// How long a guest may take to say what it runs.
const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How many commands are asked for: those that run come first.
const COMMANDS_MAX: u32 = 500;

/// When a life of this length ends that begins now; `None` for one without an end.
pub(crate) fn end_of(ttl: TimeSpan) -> Option<Timestamp> {
    let millis = i64::try_from(ttl.as_seconds()).unwrap_or(i64::MAX).saturating_mul(1000);
    (!ttl.is_zero()).then(|| Timestamp::from_millis(now().as_millis().saturating_add(millis)))
}

/// What is due for a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// Nothing, and it has no limits.
    Never,
    /// Nothing before so long from now.
    In(Duration),
    /// Its life is over.
    Expired,
    /// It may have been idle for too long: its guest knows.
    Idle,
}

/// What is due for a VM in which nothing has been under way for `idle`; `None` while something is.
fn due(record: &VmRecord, idle: Option<Duration>, now: Timestamp) -> Due {
    let left = record.expires_at.map(|at| at.as_millis().saturating_sub(now.as_millis()));
    let left = match left {
        Some(..=0) => return Due::Expired,
        Some(millis) => Some(Duration::from_millis(millis.unsigned_abs())),
        None => None,
    };
    let until_idle = match record.spec.idle_stop.filter(|_| record.state == VmState::Ready) {
        None => None,
        Some(limit) => match idle.map(|idle| limit.duration().saturating_sub(idle)) {
            Some(Duration::ZERO) => return Due::Idle,
            // What ends right now makes it idle so long from now.
            until => Some(until.unwrap_or(limit.duration())),
        },
    };
    match [left, until_idle].into_iter().flatten().min() {
        Some(soonest) => Due::In(soonest),
        None => Due::Never,
    }
}

/// When a VM is looked at whether it is idle; `None` if it has no such limit, is not ready, or something is under way in it.
pub(super) fn idle_stop_at(record: &VmRecord, idle: Option<Duration>) -> Option<Timestamp> {
    let limit = record.spec.idle_stop.filter(|_| record.state == VmState::Ready)?;
    let left = limit.duration().saturating_sub(idle?);
    let millis = i64::try_from(left.as_millis()).unwrap_or(i64::MAX);
    Some(Timestamp::from_millis(now().as_millis().saturating_add(millis)))
}

/// Whether the host's clock can be believed, by which lives end: a clock that is set forward must not delete VMs.
#[derive(Debug)]
struct Trust {
    /// The host's clock, and the time since its boot, at the last look.
    last: (Timestamp, Duration),
    /// The time since boot until which no life ends.
    doubtful_until: Duration,
}

/// The largest step of the clock that is taken for a correction.
const STEP_MAX: Duration = Duration::from_secs(60);
/// How long no life ends after a larger step, so that a wrong clock can be corrected or lives be extended.
const DOUBT: Duration = Duration::from_secs(10 * 60);
/// How long after the host's boot its clock may still be unsynchronised.
const BOOT_DOUBT: Duration = Duration::from_secs(2 * 60);

impl Trust {
    const fn begin(wall: Timestamp, since_boot: Duration) -> Self {
        Self { last: (wall, since_boot), doubtful_until: BOOT_DOUBT }
    }

    /// Compares the clock with the time since boot, and returns whether lives may end now.
    fn look(&mut self, wall: Timestamp, since_boot: Duration) -> bool {
        let (before, at) = std::mem::replace(&mut self.last, (wall, since_boot));
        let passed = i64::try_from(since_boot.saturating_sub(at).as_millis()).unwrap_or(i64::MAX);
        let step = wall.as_millis().saturating_sub(before.as_millis()).saturating_sub(passed);
        if u128::from(step.max(0).unsigned_abs()) > STEP_MAX.as_millis() {
            self.doubtful_until = since_boot + DOUBT;
            tracing::warn!(
                seconds = step / 1000,
                "the host's clock was set forward: no vm is deleted at the end of its time to live for 10 minutes"
            );
        }
        since_boot >= self.doubtful_until
    }
}

/// The time since the host's boot, its sleep included.
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::from_secs(time.tv_sec.unsigned_abs())
}

/// Keeps the lifetimes for as long as the daemon runs.
pub(crate) async fn keep(shared: Weak<Shared>) {
    let mut trust = Trust::begin(now(), since_boot());
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let mut pause = LOOK_MAX;
        let mut acting = Vec::new();
        let lives_may_end = trust.look(now(), since_boot());
        for handle in shared.vms.all() {
            let due = due(&handle.view.borrow().record, handle.activity.idle(), now());
            match due {
                Due::Never => {}
                Due::In(time) => pause = pause.min(time),
                Due::Expired if !lives_may_end => {}
                Due::Expired | Due::Idle => acting.push(act(&shared, handle, due)),
            }
        }
        if !acting.is_empty() {
            pause = pause.min(AGAIN);
        }
        futures::future::join_all(acting).await;
        let changed = shared.lifetimes.clone();
        // Nothing of the daemon is held meanwhile.
        drop(shared);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = changed.notified() => {}
        }
    }
}

async fn act(shared: &Arc<Shared>, handle: Handle, due: Due) {
    let record = handle.view.borrow().record.clone();
    let acted = async {
        match due {
            Due::Expired if record.state == VmState::Creating => cancel_creation(shared, &record).await,
            Due::Expired => ask(&handle, |reply| Command::Expire { reply }).await,
            Due::Idle => stop_if_idle(&handle, &record).await,
            Due::Never | Due::In(_) => Ok(()),
        }
    };
    // What is under way by then goes on; what is still due is asked for again.
    let Ok(done) = tokio::time::timeout(ACT_MAX, acted).await else { return };
    if let Err(error) = done
        && !handle.view.borrow().deleted
    {
        tracing::warn!(vm = %record.name, %error, "the end of the vm's lifetime cannot be kept yet");
    }
}

/// Ends the creation of a VM whose life is over before it began.
async fn cancel_creation(shared: &Arc<Shared>, record: &VmRecord) -> Result<(), ToolError> {
    let id = record.id.to_string();
    let running = shared.store.read(ops::running).await.map_err(store_error)?;
    for op in running.into_iter().filter(|op| op.summary.subject_id.as_ref() == Some(&id)) {
        tracing::info!(vm = %record.name, "the vm's time to live is over before it was created");
        shared.ops.cancel(op.summary.op_id).await?;
    }
    Ok(())
}

/// Stops a VM in which nothing is under way, if its guest runs no command either.
async fn stop_if_idle(handle: &Handle, record: &VmRecord) -> Result<(), ToolError> {
    let Ok(link) = handle.view.borrow().guest_link().cloned() else { return Ok(()) };
    let params = CommandListParams { limit: Some(COMMANDS_MAX), cursor: None };
    let said =
        guest_call::call::<CommandList>(&link, record.name.as_str(), &params, None, GUEST_TIMEOUT).await?;
    let now = now().as_millis();
    for command in said.facts.commands.iter().filter(|command| command.service.is_none()) {
        let runs = command.state == CommandState::Running || command.descendants.is_some();
        let ended = command.started_at.as_millis().saturating_add_unsigned(command.duration_ms);
        // A guest's clock may be wrong; what it says never makes a VM idle that is not.
        let ago = if runs { 0 } else { u64::try_from(now.saturating_sub(ended)).unwrap_or(0) };
        handle.activity.touch(Duration::from_millis(ago));
    }
    ask(handle, |reply| Command::StopIdle { reply }).await
}

#[cfg(test)]
mod tests {
    use nexus_schema::TimeSpan;

    use super::*;

    #[test]
    fn a_clock_that_is_set_forward_ends_no_life_for_a_while() {
        let wall = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let boot = |seconds: u64| Duration::from_secs(seconds);
        let mut trust = Trust::begin(wall(1_000_000), boot(500));
        assert!(trust.look(wall(1_000_030), boot(530)));
        // A day forward within ten seconds.
        assert!(!trust.look(wall(1_086_440), boot(540)));
        assert!(!trust.look(wall(1_087_030), boot(1130)));
        assert!(trust.look(wall(1_087_040), boot(1140)));
        // Back again, and small corrections: no doubt.
        assert!(trust.look(wall(1_000_650), boot(1150)));
        assert!(trust.look(wall(1_000_700), boot(1160)));
        // Sleep of the host is time, not a step; right after its boot the clock may be wrong.
        assert!(trust.look(wall(1_004_300), boot(4760)));
        assert!(!Trust::begin(wall(9), boot(3)).look(wall(10), boot(4)));
    }

    fn record(state: VmState, expires_in: Option<i64>, idle_stop: Option<u64>) -> VmRecord {
        let mut record = crate::store::tests::vm("web", 3);
        record.state = state;
        record.expires_at = expires_in.map(|millis| Timestamp::from_millis(1_000_000 + millis));
        record.spec.idle_stop = idle_stop.map(TimeSpan::seconds);
        record
    }

    #[test]
    fn what_comes_first_is_due() {
        let now = Timestamp::from_millis(1_000_000);
        let seconds = Duration::from_secs;
        let (busy, idle) = (None, |secs| Some(seconds(secs)));
        use VmState::{Creating, Ready, Stopped};
        for (state, expires_in, idle_stop, idle, expected) in [
            (Ready, None, None, idle(1_000_000), Due::Never),
            (Ready, Some(5000), None, busy, Due::In(seconds(5))),
            (Creating, Some(0), None, idle(0), Due::Expired),
            (Stopped, Some(-1), Some(10), busy, Due::Expired),
            (Ready, None, Some(10), idle(3), Due::In(seconds(7))),
            (Ready, None, Some(10), busy, Due::In(seconds(10))),
            (Ready, Some(2000), Some(10), idle(3), Due::In(seconds(2))),
            (Ready, Some(2000), Some(10), idle(10), Due::Idle),
            (Stopped, None, Some(10), idle(99), Due::Never),
        ] {
            let record = record(state, expires_in, idle_stop);
            assert_eq!(due(&record, idle, now), expected, "{state} {expires_in:?} {idle_stop:?} {idle:?}");
        }
    }
}
