//! The task that owns one VM. Only this task changes the VM's state, runs its boots and deletes it.

mod copies;
mod drives;
mod events;
mod launch;
mod life;
mod pause;
mod reboots;
mod remove;
mod restore;
mod save;
mod stop;
mod suspend;
mod update;
mod wake;
mod warm;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::FutureExt;
use nexus_schema::id::BootId;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ToolError};
use tokio::sync::{mpsc, watch};

use self::reboots::Reboots;
use crate::context::{Activity, Command, Handle, Shared, Used, View, Waiting};
use crate::op::{caught, message_of};
use crate::os::failpoint;
use crate::store::drives::DriveRecord;
use crate::store::vms::{VmProcesses, VmRecord};
use crate::store::{StoreError, history, vms};
use crate::vm::boot::{Boot, Event};
use crate::vm::policy;
use crate::vm::recover;
use crate::vmm::{ShimClient, ShimIdentity};

pub(crate) use drives::busy_drive;
pub(in crate::vm) use remove::{remove_files, remove_rows};
pub(in crate::vm) use save::{HOLD, quiesce, save_failed, thaw};

/// Actor in the history of transitions that no caller requested.
pub(crate) const DAEMON: &str = "nexusd";

/// Length of the queue of commands for a VM's task.
const COMMANDS_MAX: usize = 64;
/// Timeout for the VMM to end after it was killed.
const DELETE_PATIENCE: Duration = Duration::from_secs(20);

pub(in crate::vm) struct Actor {
    shared: Arc<Shared>,
    record: VmRecord,
    drives: Vec<DriveRecord>,
    view: Arc<watch::Sender<View>>,
    boot: Option<Boot>,
    /// A change of state that could not be written yet, and the time of the next retry.
    unwritten: Option<(Transition, Instant)>,
    deleted: bool,
    reboots: Reboots,
    /// Whether the boot was already retried because of a fault of the emulator, and the VM has not been ready since.
    had_mishap: bool,
    /// Time of the next start of a VM that reboots in a loop.
    again_at: Option<Instant>,
    /// Why the last wake failed, and when. Those who asked before are not answered by a wake of their own.
    unwoken: Option<(Instant, ToolError)>,
    activity: Activity,
    /// The prepared machine that the VM is being started from.
    prepared: Option<Used>,
    /// The size that its guest knows of its root drive, if this daemon has begun the start.
    prepared_disk: Option<ByteSize>,
    /// The machine that waited for this VM, until the VM goes on from it.
    waiting: Option<Waiting>,
}

/// A change of state for the history: from which state, why, and who asked.
type Transition = (VmState, String, String);

/// Maximum delay before the task of a VM is restarted after repeated panics.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Delay before a failed write is retried.
const WRITE_AGAIN: Duration = Duration::from_secs(2);

/// Starts the task of a VM and registers it; `boot` is a VMM that an earlier daemon left running.
pub(in crate::vm) fn spawn(
    shared: &Arc<Shared>,
    record: VmRecord,
    drives: Vec<DriveRecord>,
    boot: Option<Boot>,
) -> Handle {
    let (commands, mailbox) = mpsc::channel(COMMANDS_MAX);
    let (id, name) = (record.id, record.name.clone());
    let (view, watcher) = watch::channel(View {
        record: record.clone(),
        drives: drives.clone(),
        link: boot.as_ref().and_then(|b| b.link.clone()),
        deleted: false,
    });
    shared.events.know(&record);
    let activity = Activity::new();
    let handle = Handle { commands, view: watcher, activity: activity.clone() };
    shared.vms.insert(id, name, handle.clone());
    let actor = Actor::new(shared.clone(), record, drives, Arc::new(view), boot, activity);
    shared.tasks.spawn(supervise(actor, mailbox));
    handle
}

/// Runs a VM's task to its end. After a panic in the task, the VM is adopted again, as after a restart of the daemon; the new task answers
/// the calls that waited meanwhile.
async fn supervise(mut actor: Actor, mut mailbox: mpsc::Receiver<Command>) {
    let (shared, view, activity) = (actor.shared.clone(), actor.view.clone(), actor.activity.clone());
    let id = actor.record.id;
    let mut pause = Duration::from_millis(100);
    while let Err(panic) = AssertUnwindSafe(actor.run(&mut mailbox)).catch_unwind().await {
        let message = message_of(&*panic);
        tracing::error!(vm = %id, message, "the task of a vm panicked: restarting the task");
        actor = loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            let taken = Box::pin(caught("adopting the VM", recover::take_up_anew(&shared, id))).await;
            match taken {
                Ok(Some((record, drives, boot))) => {
                    let view = view.clone();
                    let actor = Actor::new(shared.clone(), record, drives, view, boot, activity.clone());
                    actor.publish();
                    break actor;
                }
                Ok(None) => return,
                Err(error) => tracing::error!(vm = %id, %error, "cannot restart the task of a vm yet"),
            }
        };
    }
}

impl Actor {
    fn new(
        shared: Arc<Shared>,
        record: VmRecord,
        drives: Vec<DriveRecord>,
        view: Arc<watch::Sender<View>>,
        boot: Option<Boot>,
        activity: Activity,
    ) -> Self {
        let reboots = Reboots::default();
        Self {
            shared,
            record,
            drives,
            view,
            boot,
            unwritten: None,
            deleted: false,
            reboots,
            had_mishap: false,
            again_at: None,
            unwoken: None,
            activity,
            prepared: None,
            prepared_disk: None,
            waiting: None,
        }
    }

    async fn run(mut self, mailbox: &mut mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = mailbox.recv() => match command {
                    Some(Command::Detach) | None => return,
                    Some(command) => self.command(command).await,
                },
                event = next(&mut self.boot) => self.event(event).await,
                () = until(self.again_at) => {
                    self.again_at = None;
                    self.reboot("the guest rebooted").await;
                }
                () = until(self.unwritten.as_ref().map(|(_, at)| *at)) => {
                    if let Some((change, _)) = self.unwritten.take() {
                        self.write(Some(change)).await.ok();
                    }
                }
            }
            if self.deleted {
                return;
            }
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Start { who, if_boot, progress, reply } => {
                let result = match self.same_boot(if_boot) {
                    Ok(()) => self.start(&who, "start requested", &progress).await,
                    Err(error) => Err(error),
                };
                reply.send(result).ok();
            }
            Command::Stop { who, force, if_boot, reply } => {
                let why = if force { "forced stop requested" } else { "stop requested" };
                let result = match self.same_boot(if_boot) {
                    Ok(()) => self.stop(&who, force, why).await,
                    Err(error) => Err(error),
                };
                reply.send(result).ok();
            }
            Command::Pause { who, if_boot, reply } => {
                let result = match self.same_boot(if_boot) {
                    Ok(()) => self.pause(&who).await,
                    Err(error) => Err(error),
                };
                reply.send(result).ok();
            }
            Command::Resume { who, if_boot, reply } => {
                let result = match self.same_boot(if_boot) {
                    Ok(()) => self.resume(&who).await,
                    Err(error) => Err(error),
                };
                reply.send(result).ok();
            }
            Command::Suspend { who, if_boot, reply } => {
                let result = match self.same_boot(if_boot) {
                    Ok(()) => Box::pin(self.suspend(&who, "suspend requested", None)).await,
                    Err(error) => Err(error),
                };
                reply.send(result).ok();
            }
            // Whoever called does not wait any more.
            Command::Wake { reply, .. } if reply.is_closed() => {}
            Command::Wake { who, why, asked, reply } => {
                let result = Box::pin(self.wake_for_call(&who, &why, asked)).await;
                reply.send(result).ok();
            }
            Command::Delete { who, force, if_boot, why, reply } => {
                let result = match self.same_boot(if_boot) {
                    Ok(()) => self.delete(&who, force, why).await,
                    Err(error) => Err(error),
                };
                reply.send(result).ok();
            }
            // It is asked for again, if it is still due.
            Command::Expire { reply } | Command::StopIdle { reply } if reply.is_closed() => {}
            Command::Expire { reply } => drop(reply.send(self.expire().await)),
            Command::StopIdle { reply } => drop(reply.send(self.stop_idle().await)),
            Command::Packages { reply } => drop(reply.send(self.refresh_packages().await)),
            Command::Update { who, change, reply } => {
                let result = self.update(*change, &who).await;
                reply.send(result).ok();
            }
            Command::Created { record, drives, reply } => {
                // Keep what was changed meanwhile.
                let before = std::mem::replace(&mut self.record, *record);
                self.record.generation = before.generation;
                self.record.tags = before.tags;
                self.record.protected = before.protected;
                self.record.expires_at = before.expires_at;
                self.record.spec.network = before.spec.network;
                self.record.spec.idle_stop = before.spec.idle_stop;
                if self.record.spec.checkpoints {
                    self.record.spec.idle_action = before.spec.idle_action;
                }
                self.drives = drives;
                let result = self.transition(VmState::Created, None, "drives created", DAEMON).await;
                reply.send(result).ok();
            }
            Command::Undo { reason, drives, reply } => {
                let result = self.undo(&drives, &reason).await;
                reply.send(result).ok();
            }
            Command::Attach { attach, reply } => {
                let result = self.attach(*attach).await;
                reply.send(result).ok();
            }
            Command::Take { drive, if_boot, reply } => {
                let result = self.detach(drive, if_boot).await;
                reply.send(result).ok();
            }
            Command::Resized { drive, size, reply } => {
                self.resized(drive, size);
                reply.send(Ok(())).ok();
            }
            Command::Checkpoint { take, reply } => {
                let result = self.checkpoint(&take).await;
                reply.send(result.map(Box::new)).ok();
            }
            Command::CopyDrives { copy, reply } => drop(reply.send(self.copy_drives(&copy).await)),
            Command::Checkpointed { checkpoint, reply } => {
                self.record.lineage.checkpoint = Some(checkpoint);
                reply.send(self.write(None).await).ok();
            }
            Command::Restore { restore, reply } => {
                let result = Box::pin(self.restore(&restore)).await;
                reply.send(result).ok();
            }
            Command::Machine { reply } => {
                let alone = self.check_alone().await;
                reply.send(alone.map(|()| self.boot.as_ref().map(|boot| boot.shim.clone()))).ok();
            }
            Command::Detach => {}
        }
    }

    // --- transitions

    /// Makes a transition: checks the edge, writes state and history in one transaction that checks the generation, then
    /// publishes. Nothing else changes the state.
    async fn transition(
        &mut self,
        to: VmState,
        reason: Option<String>,
        why: &str,
        who: &str,
    ) -> Result<(), ToolError> {
        let from = self.record.state;
        if !policy::is_edge(from, to) {
            return Err(ToolError::internal(format!("{} cannot go from {from} to {to}", self.record.name)));
        }
        tracing::info!(vm = %self.record.name, %from, %to, why, who, "vm changes state");
        self.record.state = to;
        self.record.reason = reason;
        let history = match &self.record.reason {
            Some(reason) => reason.clone(),
            None => why.to_owned(),
        };
        let written = self.write(Some((from, history.clone(), who.to_owned()))).await;
        failpoint::reach(to.as_str());
        // Whoever hears of it sees it.
        self.shared.events.vm(&self.record, Some(from), &history);
        let tally = &self.shared.tally;
        match (from, to) {
            (VmState::Running, VmState::Ready) => drop(tally.boots.fetch_add(1, Ordering::Relaxed)),
            (VmState::Ready, VmState::Unreachable) => drop(tally.link_losses.fetch_add(1, Ordering::Relaxed)),
            _ => {}
        }
        if to == VmState::Ready {
            self.activity.touch(Duration::ZERO);
            self.shared.lifetimes.notify_one();
        }
        written
    }

    /// Refuses a call for another boot than the current or last one.
    fn same_boot(&self, asked: Option<BootId>) -> Result<(), ToolError> {
        policy::same_boot(self.record.name.as_str(), self.record.boot_id, asked)
    }

    /// Writes the row, with a line of history if the state changed, and publishes it. A failed write is retried later: the new state is real
    /// whether or not it can be written.
    async fn write(&mut self, change: Option<Transition>) -> Result<(), ToolError> {
        const TRIES: u32 = 3;
        // An earlier change that could not be written is merged into this one: the history line starts at the earlier change's first state.
        let change = match (self.unwritten.take(), change) {
            (Some(((from, reason, who), _)), None) => Some((from, reason, who)),
            (Some(((from, ..), _)), Some((_, reason, who))) => Some((from, reason, who)),
            (None, change) => change,
        };
        let expected = self.record.generation;
        self.record.generation = expected + 1;
        let mut result = Ok(());
        for attempt in 1..=TRIES {
            let (row, change) = (self.record.clone(), change.clone());
            result = self
                .shared
                .store
                .write(move |tx| -> Result<(), StoreError> {
                    vms::update(tx, &row, expected)?;
                    if let Some((from, reason, who)) = change {
                        history::insert(
                            tx,
                            row.id,
                            &row.name,
                            Some(from),
                            Some(row.state),
                            &reason,
                            &who,
                            row.boot_id,
                        )?;
                    }
                    Ok(())
                })
                .await;
            match &result {
                Ok(()) | Err(StoreError::Closed) => break,
                Err(error) => {
                    tracing::error!(vm = %self.record.name, %error, attempt, "cannot record the vm's state")
                }
            }
        }
        if result.is_err() {
            // The row in the store is unchanged: the next write must expect its generation.
            self.record.generation = expected;
            self.unwritten = change.map(|change| (change, Instant::now() + WRITE_AGAIN));
        }
        self.publish();
        result.map_err(crate::op::store_error)
    }

    fn publish(&self) {
        if !self.deleted {
            self.shared.events.know(&self.record);
        }
        self.view.send_replace(View {
            record: self.record.clone(),
            drives: self.drives.clone(),
            link: self.boot.as_ref().and_then(|b| b.link.clone()),
            deleted: self.deleted,
        });
    }

    /// Makes a transition that no caller waits for; a failure to record it is only logged.
    async fn settle(&mut self, to: VmState, reason: Option<String>, why: &str) {
        if let Err(error) = self.transition(to, reason, why, DAEMON).await {
            tracing::error!(vm = %self.record.name, %to, %error, "a transition was not recorded");
        }
    }

    /// Adds a line to the history without a change of state.
    async fn note(&mut self, what: &str) {
        let line = (self.record.state, what.to_owned(), DAEMON.to_owned());
        if let Err(error) = self.write(Some(line)).await {
            tracing::error!(vm = %self.record.name, what, %error, "a note was not recorded");
        }
        self.shared.events.vm(&self.record, Some(self.record.state), what);
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

async fn next(boot: &mut Option<Boot>) -> Event {
    match boot {
        Some(boot) => boot.event().await,
        None => std::future::pending().await,
    }
}

/// Returns the processes of a VM; `None` until its shim has answered.
fn processes_of(shim: &ShimClient) -> Option<VmProcesses> {
    let vmm = shim.vmm()?;
    let ShimIdentity { pid: shim_pid, start_time: shim_start } = shim.identity();
    Some(VmProcesses { shim_pid, shim_start, vmm_pid: vmm.pid })
}
