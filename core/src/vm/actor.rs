//! The task that owns one VM: it alone changes its state, runs its boots and deletes it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_schema::id::{BootId, DriveId};
use nexus_schema::link::{ByeReason, Hello};
use nexus_schema::tools::vm::{VmDeleteOutput, VmState};
use nexus_schema::{ErrorCode, Name, ToolError};
use tokio::sync::{mpsc, oneshot, watch};

use super::boot::{self, Boot, Clock, Event};
use super::policy::{self, Decision};
use super::registry::Handle;
use super::stop::Rung;
use super::view::View;
use crate::guest::{GuestEvent, LinkState};
use crate::nexus::Shared;
use crate::op::Progress;
use crate::os::random;
use crate::store::drives::DriveRecord;
use crate::store::vms::{GuestRecord, VmProcesses, VmRecord};
use crate::store::{StoreError, drives, history, now, random_id, vms};
use crate::vmm::Exit;

/// Who makes the transitions that nobody asked for.
pub(crate) const DAEMON: &str = "nexusd";

/// What others ask of a VM's task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Start it; the reply names the boot that is under way.
    Start { who: String, progress: Progress, reply: oneshot::Sender<Result<BootId, ToolError>> },
    /// Begin to stop it; the reply says whether there is anything to stop.
    Stop { who: String, force: bool, reply: oneshot::Sender<Result<Decision, ToolError>> },
    /// Delete it.
    Delete { who: String, force: bool, reply: oneshot::Sender<Result<VmDeleteOutput, ToolError>> },
    /// Change its labels and protection.
    Update { change: Box<Change>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Its drives are made: creating -> created.
    Created { record: Box<VmRecord>, drives: Vec<DriveRecord>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Its creation failed: leave nothing of it but its history.
    Undo { reason: String, drives: Vec<DriveId>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// End the task; what runs goes on running.
    Detach,
}

/// A change that `vm_update` asks for.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) tags: std::collections::BTreeMap<String, String>,
    pub(crate) remove_tags: Vec<String>,
    pub(crate) protected: Option<bool>,
}

/// How many commands may wait for a VM's task.
const COMMANDS_MAX: usize = 64;
/// How long a forced deletion waits for the VMM to be gone.
const DELETE_PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Actor {
    shared: Arc<Shared>,
    record: VmRecord,
    drives: Vec<DriveRecord>,
    view: watch::Sender<View>,
    boot: Option<Boot>,
    deleted: bool,
}

/// Starts the task of a VM and registers it; `boot` is what an earlier daemon left running.
pub(super) fn spawn(
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
    let handle = Handle { commands, view: watcher };
    shared.vms.insert(id, name, handle.clone());
    let actor = Actor { shared: shared.clone(), record, drives, view, boot, deleted: false };
    shared.tasks.spawn(actor.run(mailbox));
    handle
}

impl Actor {
    async fn run(mut self, mut mailbox: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = mailbox.recv() => match command {
                    Some(Command::Detach) | None => return,
                    Some(command) => self.command(command).await,
                },
                event = next(&mut self.boot) => self.event(event).await,
            }
            if self.deleted {
                return;
            }
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Start { who, progress, reply } => {
                let result = self.start(&who, "asked for", &progress).await;
                reply.send(result).ok();
            }
            Command::Stop { who, force, reply } => {
                let result = self.stop(&who, force).await;
                reply.send(result).ok();
            }
            Command::Delete { who, force, reply } => {
                let result = self.delete(&who, force).await;
                reply.send(result).ok();
            }
            Command::Update { change, reply } => {
                let result = self.update(*change).await;
                reply.send(result).ok();
            }
            Command::Created { record, drives, reply } => {
                self.record = VmRecord { generation: self.record.generation, ..*record };
                self.drives = drives;
                let result = self.transition(VmState::Created, None, "its drives are made", DAEMON).await;
                reply.send(result).ok();
            }
            Command::Undo { reason, drives, reply } => {
                let result = self.remove(&drives, &reason, DAEMON).await;
                reply.send(result).ok();
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
        self.write(Some((from, history, who.to_owned()))).await
    }

    /// Writes the row, with a line of history if the state changed, and publishes it. A store that fails is tried again:
    /// what happened to a VM happened, whether it can be written down or not.
    async fn write(&mut self, change: Option<(VmState, String, String)>) -> Result<(), ToolError> {
        const TRIES: u32 = 3;
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
            // The next write still finds the row as it is in the store.
            self.record.generation = expected;
        }
        self.publish();
        result.map_err(crate::op::store_error)
    }

    fn publish(&self) {
        self.view.send_replace(View {
            record: self.record.clone(),
            drives: self.drives.clone(),
            link: self.boot.as_ref().and_then(|b| b.link.clone()),
            deleted: self.deleted,
        });
    }

    /// A transition that nobody waits for; a failure to record it is in the log already.
    async fn settle(&mut self, to: VmState, reason: Option<String>, why: &str) {
        if let Err(error) = self.transition(to, reason, why, DAEMON).await {
            tracing::error!(vm = %self.record.name, %to, %error, "a transition was not recorded");
        }
    }

    // --- start

    async fn start(&mut self, who: &str, why: &str, progress: &Progress) -> Result<BootId, ToolError> {
        let name = self.record.name.clone();
        if policy::start(name.as_str(), self.record.state)? == Decision::Already {
            return self
                .record
                .boot_id
                .ok_or_else(|| ToolError::internal(format!("{name} runs without a boot id")));
        }
        self.launch(who, why, progress).await
    }

    /// Launches the VMM from a state in which none runs, or after a reboot.
    async fn launch(&mut self, who: &str, why: &str, progress: &Progress) -> Result<BootId, ToolError> {
        let mut clock = Clock::start();
        // Everything that can be refused is refused before anything changes.
        let choice = self.shared.choose_driver(self.record.spec.driver).await?;
        let kernel = self.shared.kernel_files(&self.record).await?;
        for drive in &self.drives {
            let path = self.shared.paths.drive(drive.id).join(crate::drive::DISK);
            if let Err(error) = fs_err::metadata(&path) {
                return Err(ToolError::new(
                    ErrorCode::DriveNotFound,
                    format!("drive {}: {error}", drive.name),
                )
                .hint("its file is gone: delete the VM and create it anew"));
            }
        }
        progress.step("starting the VMM");
        let boot_id: BootId = random_id();
        let token = random::token();
        self.record.boot_id = Some(boot_id);
        self.record.token = Some(token.clone());
        self.record.guest = None;
        self.record.timings = None;
        self.record.processes = None;
        self.record.driver = Some(choice.driver.as_str().into());
        self.record.driver_version = Some(choice.version.clone());
        self.record.accel = Some(choice.accel.as_str().into());
        self.record.started_at = Some(now());
        self.transition(VmState::Starting, None, why, who).await?;

        let configure = boot::configure(&self.record, boot_id, &token);
        let launched = async {
            let initramfs = self.shared.initramfs(kernel.as_ref()).await?;
            let vmlinux = kernel.map(|k| k.vmlinux).unwrap_or_default();
            let plan =
                boot::plan(&self.shared, &self.record, &self.drives, boot_id, &choice, &vmlinux, &initramfs);
            fs_err::create_dir_all(&plan.directory)
                .map_err(|e| ToolError::internal(format!("make the VM's directory: {e}")))?;
            clock.timings.plan_ms = clock.step();
            Boot::launch(&self.shared, &plan, configure, clock)
                .await
                .map_err(|error| boot::launch_failed(self.record.name.as_str(), &error))
        }
        .await;
        match launched {
            Ok(mut boot) => {
                boot.clock.timings.spawn_ms = boot.clock.step();
                let identity = boot.shim.identity();
                self.record.processes = Some(VmProcesses {
                    shim_pid: identity.pid,
                    shim_start: identity.start_time,
                    vmm_pid: boot.shim.vmm().pid,
                });
                self.boot = Some(boot);
                self.write(None).await.ok();
                progress.step("booting");
                Ok(boot_id)
            }
            Err(error) => {
                self.settle(VmState::Failed, Some(error.message.clone()), "the VMM could not be started")
                    .await;
                Err(error)
            }
        }
    }

    // --- stop

    async fn stop(&mut self, who: &str, force: bool) -> Result<Decision, ToolError> {
        let decision = policy::stop(self.record.name.as_str(), self.record.state)?;
        if self.record.state == VmState::Stopping {
            if force {
                self.climb(Rung::Kill).await;
            }
            return Ok(Decision::Go);
        }
        if decision == Decision::Already {
            return Ok(decision);
        }
        let why = if force { "forced stop asked for" } else { "stop asked for" };
        self.transition(VmState::Stopping, None, why, who).await?;
        let answers = self.boot.as_ref().is_some_and(Boot::agent_answers);
        self.climb(Rung::first(force, answers)).await;
        Ok(Decision::Go)
    }

    /// Steps on a rung of the stop ladder.
    async fn climb(&mut self, rung: Rung) {
        let graceful = Duration::from_secs(self.shared.config.stop_timeout_s.into());
        let name = &self.record.name;
        let Some(boot) = self.boot.as_mut() else { return };
        tracing::debug!(vm = %name, ?rung, "stopping");
        boot.rung = Some(rung);
        boot.deadline = Some(Instant::now() + rung.patience(graceful));
        let result = match rung {
            Rung::AskAgent => {
                boot.ask_agent();
                Ok(())
            }
            Rung::AskVmm => boot.shim.shutdown().await,
            Rung::Kill => boot.shim.kill().await,
        };
        if let Err(error) = result {
            tracing::warn!(vm = %name, ?rung, %error, "this way to stop the vm failed");
            boot.deadline = Some(Instant::now() + Duration::from_millis(200));
        }
    }

    // --- events of a boot

    async fn event(&mut self, event: Event) {
        match event {
            Event::Guest(event) => self.guest_event(event).await,
            Event::Link(state) => self.link_event(state).await,
            Event::Asked(true) => {}
            Event::Asked(false) => {
                if let Some(rung) = self.boot.as_ref().and_then(|b| b.rung)
                    && rung == Rung::AskAgent
                {
                    self.climb(rung.next()).await;
                }
            }
            Event::Deadline => self.deadline().await,
            Event::Exited(exit) => self.exited(exit).await,
        }
    }

    async fn guest_event(&mut self, event: GuestEvent) {
        let Some(boot) = self.boot.as_mut() else { return };
        match event {
            GuestEvent::Hello(hello) => {
                if self.record.state == VmState::Starting {
                    boot.clock.timings.boot_ms = boot.clock.step();
                    boot.clock.timings.guest_uptime_ms = hello.uptime_ms;
                    self.record.guest = Some(guest_record(hello));
                    self.settle(VmState::Running, None, "the agent said hello").await;
                }
            }
            GuestEvent::Ready { hello, ack } => {
                boot.clock.timings.configure_ms = boot.clock.step();
                boot.dial(&self.shared.paths.vm(self.record.id));
                let mut guest = guest_record(hello);
                guest.problems = ack.problems;
                self.record.guest = Some(guest);
                self.write(None).await.ok();
            }
            GuestEvent::Bye(reason) => {
                tracing::info!(vm = %self.record.name, ?reason, "the guest goes down");
                boot.bye = Some(reason);
            }
            GuestEvent::Outdated { protocol, build } => {
                tracing::warn!(vm = %self.record.name, protocol, build, "the guest is outdated");
                let error = super::view::outdated(self.record.name.as_str(), protocol);
                boot.misbehaved = Some(error.message);
                if matches!(self.record.state, VmState::Starting | VmState::Running) {
                    boot.deadline = Some(Instant::now());
                }
            }
            GuestEvent::Misbehaved { what } => {
                tracing::warn!(vm = %self.record.name, what, "the guest misbehaves");
                boot.misbehaved = Some(what);
            }
        }
    }

    async fn link_event(&mut self, state: LinkState) {
        let Some(boot) = self.boot.as_mut() else { return };
        match (state, self.record.state) {
            (LinkState::Up, VmState::Running) => {
                boot.clock.timings.link_ms = boot.clock.step();
                boot.deadline = None;
                self.record.timings = Some(boot.clock.timings);
                self.settle(VmState::Ready, None, "its tools work").await;
            }
            (LinkState::Up, VmState::Unreachable) => {
                boot.deadline = None;
                self.settle(VmState::Ready, None, "the agent answers again").await;
            }
            (LinkState::Up, VmState::Ready) => boot.deadline = None,
            // A guest that said bye loses its link on its way down.
            (LinkState::Down { why }, VmState::Ready) if boot.bye.is_none() => {
                boot.deadline = None;
                self.settle(VmState::Unreachable, Some(why), "the link was lost").await;
            }
            _ => {}
        }
    }

    async fn deadline(&mut self) {
        let Some(boot) = self.boot.as_mut() else { return };
        boot.deadline = None;
        match self.record.state {
            VmState::Starting | VmState::Running => {
                let waited = self.shared.boot_timeout(boot.accel).as_secs();
                let what = match (&boot.misbehaved, self.record.state) {
                    (Some(what), _) => what.clone(),
                    (None, VmState::Starting) => format!("no hello from the guest in {waited} s"),
                    (None, _) => format!("the guest was not ready in {waited} s"),
                };
                let directory = self.shared.paths.vm(self.record.id);
                let reason = boot::with_console(what, &directory);
                if let Err(error) = boot.shim.kill().await {
                    tracing::error!(vm = %self.record.name, %error, "cannot kill the VMM");
                }
                let shim = boot.shim.clone();
                let gone = tokio::time::timeout(DELETE_PATIENCE, shim.wait()).await;
                if gone.is_err() {
                    tracing::error!(vm = %self.record.name, "the VMM is still there after it was killed");
                }
                self.end_boot();
                self.settle(VmState::Failed, Some(reason), "it did not come up").await;
            }
            VmState::Ready => {
                // Taken up again, but its agent never answered.
                let reason = "its agent did not answer this daemon".to_owned();
                self.settle(VmState::Unreachable, Some(reason), "the link was lost").await;
            }
            VmState::Stopping => {
                let rung = boot.rung.unwrap_or(Rung::AskVmm).next();
                self.climb(rung).await;
            }
            _ => {}
        }
    }

    async fn exited(&mut self, exit: Exit) {
        while let Some(event) = self.boot.as_mut().and_then(Boot::last_words) {
            self.guest_event(event).await;
        }
        let Some(boot) = self.boot.as_ref() else { return };
        let bye = boot.bye;
        let directory = self.shared.paths.vm(self.record.id);
        let failure = match &boot.misbehaved {
            Some(what) => format!("{}; before that: {what}", exit.message),
            None => exit.message.clone(),
        };
        self.end_boot();
        match (self.record.state, bye) {
            (VmState::Stopping, _) => self.settle(VmState::Stopped, None, "it is down").await,
            (VmState::Starting, _) => {
                let reason = boot::with_console(failure, &directory);
                self.settle(VmState::Failed, Some(reason), "the VMM ended before the guest said hello").await;
            }
            (_, Some(ByeReason::Poweroff)) => {
                self.settle(VmState::Stopped, None, "the guest powered off").await;
            }
            (_, Some(ByeReason::Reboot)) => {
                let restarted = self.launch(DAEMON, "the guest rebooted", &Progress::default()).await;
                if let Err(error) = restarted
                    && self.record.state != VmState::Failed
                {
                    let reason = format!("start it again after its reboot: {}", error.message);
                    self.settle(VmState::Crashed, Some(reason), "the reboot failed").await;
                }
            }
            (_, None) => {
                let reason = boot::with_console(failure, &directory);
                self.settle(VmState::Crashed, Some(reason), "the VMM is gone without a bye").await;
            }
        }
    }

    /// Lets go of a boot whose VMM is gone.
    fn end_boot(&mut self) {
        if let Some(boot) = self.boot.take() {
            if let Some(link) = &boot.link {
                link.close("the VM is down");
            }
            if let Some(asked) = &boot.asked {
                asked.abort();
            }
        }
        self.record.processes = None;
    }

    // --- delete, update

    async fn delete(&mut self, who: &str, force: bool) -> Result<VmDeleteOutput, ToolError> {
        policy::delete(self.record.name.as_str(), self.record.state, self.record.protected, force)?;
        if let Some(boot) = &self.boot {
            let shim = boot.shim.clone();
            if let Err(error) = shim.kill().await {
                tracing::warn!(vm = %self.record.name, %error, "cannot kill the VMM through its shim");
            }
            if tokio::time::timeout(DELETE_PATIENCE, shim.wait()).await.is_err() {
                return Err(ToolError::new(
                    ErrorCode::Timeout,
                    format!(
                        "the VMM of {} is still there {} s after it was killed",
                        self.record.name,
                        DELETE_PATIENCE.as_secs()
                    ),
                )
                .hint("try again; vm_inspect shows its process id"));
            }
            self.end_boot();
        }
        let output = VmDeleteOutput {
            id: self.record.id,
            name: self.record.name.clone(),
            drives: self.drives.iter().map(|d| d.name.clone()).collect::<Vec<Name>>(),
        };
        let ids: Vec<DriveId> = self.drives.iter().map(|d| d.id).collect();
        self.remove(&ids, "deleted", who).await?;
        Ok(output)
    }

    /// Takes the VM out of the store and out of memory, then removes its files.
    async fn remove(&mut self, drive_ids: &[DriveId], reason: &str, who: &str) -> Result<(), ToolError> {
        remove_rows(&self.shared, &self.record, drive_ids, reason, who).await?;
        self.deleted = true;
        self.shared.vms.remove(self.record.id, &self.record.name);
        self.publish();
        remove_files(&self.shared, &self.record, drive_ids).await;
        Ok(())
    }

    async fn update(&mut self, change: Change) -> Result<(), ToolError> {
        let mut tags = self.record.tags.clone();
        for key in &change.remove_tags {
            tags.remove(key);
        }
        tags.extend(change.tags);
        let mut mistakes = Vec::new();
        super::spec::check_tags(&tags, &mut |mistake| mistakes.push(mistake));
        if !mistakes.is_empty() {
            return Err(ToolError::invalid(mistakes.join("; ")));
        }
        let before = self.record.clone();
        self.record.tags = tags;
        self.record.protected = change.protected.unwrap_or(before.protected);
        if let Err(error) = self.write(None).await {
            self.record = before;
            self.publish();
            return Err(error);
        }
        Ok(())
    }
}

async fn next(boot: &mut Option<Boot>) -> Event {
    match boot {
        Some(boot) => boot.event().await,
        None => std::future::pending().await,
    }
}

fn guest_record(hello: Hello) -> GuestRecord {
    let protocol = hello.protocol.min(nexus_schema::link::PROTOCOL);
    GuestRecord { hello: Hello { token: None, ..hello }, protocol, problems: Vec::new() }
}

/// Takes a VM and its drives out of the store; its history stays.
pub(super) async fn remove_rows(
    shared: &Shared,
    record: &VmRecord,
    drive_ids: &[DriveId],
    reason: &str,
    who: &str,
) -> Result<(), ToolError> {
    let (row, ids, reason, who) = (record.clone(), drive_ids.to_vec(), reason.to_owned(), who.to_owned());
    shared
        .store
        .write(move |tx| -> Result<(), StoreError> {
            for id in ids {
                drives::delete(tx, id)?;
            }
            vms::delete(tx, row.id)?;
            history::insert(tx, row.id, &row.name, Some(row.state), None, &reason, &who, row.boot_id)
        })
        .await
        .map_err(crate::op::store_error)
}

/// Removes the files of a VM whose rows are gone. What cannot be removed now is removed at the next start.
pub(super) async fn remove_files(shared: &Shared, record: &VmRecord, drive_ids: &[DriveId]) {
    for id in drive_ids {
        if let Err(error) = shared.drives.delete(&shared.paths.drive(*id)).await {
            tracing::warn!(vm = %record.name, drive = %id, %error, "a drive's file is left for the next start");
        }
    }
    let directory = shared.paths.vm(record.id);
    if let Err(error) = tokio::task::spawn_blocking(move || match fs_err::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
    .await
    .unwrap_or(Ok(()))
    {
        tracing::warn!(vm = %record.name, %error, "the VM's directory is left for the next start");
    }
}
