//! Handling of a boot's events: messages of the guest, its link, deadlines, the end of the VMM.

use std::time::{Duration, Instant};

use nexus_schema::link::{ByeReason, Hello};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{DriverKind, ErrorCode, ToolError};

use super::reboots::{self, Reboot};
use super::{Actor, DAEMON, DELETE_PATIENCE, processes_of};
use crate::guest::{GuestEvent, LinkState, Recorded, STANDSTILL};
use crate::os::{failpoint, remove};
use crate::progress::Progress;
use crate::store::drives::DriveRecord;
use crate::store::vms::GuestRecord;
use crate::vm::boot::{self, Boot, Event, Farewell};
use crate::vm::last_words;
use crate::vm::mishap;
use crate::vm::network;
use crate::vm::policy::DISK_FULL;
use crate::vm::stop::Rung;
use crate::vm::view;
use crate::vmm::{Accel, Caps, Exit, Stall};

/// Time for which the daemon drains guest events after it was stalled.
const HEARING: Duration = Duration::from_secs(5);
/// Time limit of a guest to end after it said bye by itself, in multiples of the stop timeout: its init may wait for services.
const FAREWELL_STOPS: u32 = 4;
/// Interval between two checks of such a guest.
const FAREWELL_LOOK: Duration = Duration::from_secs(2);

impl Actor {
    pub(super) async fn event(&mut self, event: Event) {
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
            Event::Stalled(stall) => self.stalled(stall).await,
            Event::ShimAnswers => self.shim_answers().await,
            Event::TimerLost => self.timer_lost().await,
            Event::Exited(exit) => self.exited(exit).await,
        }
    }

    async fn guest_event(&mut self, event: GuestEvent) {
        let Some(boot) = self.boot.as_mut() else { return };
        match event {
            GuestEvent::Hello(hello) => {
                boot.timer = None;
                if self.record.state == VmState::Starting {
                    boot.clock.timings.boot_ms = boot.clock.step();
                    boot.clock.timings.guest_uptime_ms = hello.uptime_ms;
                    // The init of a restored guest was waited for long ago.
                    let is_restored = hello.resumed.is_some();
                    let wait = boot::wait_for_init_s(&self.shared, &self.record);
                    let wait = if is_restored { 0 } else { wait };
                    boot.deadline = boot.deadline.map(|due| due + Duration::from_secs(wait.into()));
                    self.record.guest = Some(guest_record(hello));
                    self.settle(VmState::Running, None, "the agent said hello").await;
                }
            }
            GuestEvent::Ready { hello, ack, recorded } => {
                boot.clock.timings.configure_ms = boot.clock.step();
                boot.dial(&self.shared, &self.record);
                let is_restored = ack.resumed.is_some();
                // A restored machine's network is cut until its guest has addresses of its own.
                if is_restored
                    && boot.has_interface
                    && let Err(error) = boot.shim.set_link(true).await
                {
                    tracing::error!(vm = %self.record.name, %error, "cannot connect the network of a restored vm");
                }
                let mut guest = guest_record(hello);
                guest.problems = ack.problems;
                guest.resumed = ack.resumed;
                guest.configured = true;
                self.record.guest = Some(guest);
                // In the same write: files are written to the guest only once; later changes of them are up to the guest. A warm start may become a
                // cold one until the VM is ready.
                if self.record.spec.warm.is_none() {
                    self.record.spec.files.clear();
                }
                failpoint::reach("start-configured");
                if let (Err(error), true) = (self.write(None).await, is_restored) {
                    return self.not_recorded(recorded, &error);
                }
                drop(recorded);
                failpoint::reach("start-welcomed");
            }
            GuestEvent::Bye { reason, guessed } => {
                tracing::info!(vm = %self.record.name, ?reason, guessed, "the guest is shutting down");
                boot.bye = Some(Farewell { reason, guessed, at: Instant::now() });
                if matches!(self.record.state, VmState::Ready | VmState::Unreachable) {
                    boot.deadline = Some(Instant::now() + FAREWELL_LOOK);
                }
            }
            GuestEvent::Outdated { protocol, build } => {
                if boot.complains() {
                    tracing::warn!(vm = %self.record.name, protocol, build, "the guest is outdated");
                }
                let error = view::outdated(self.record.name.as_str(), protocol);
                boot.misbehaved = Some(error.message);
                if matches!(self.record.state, VmState::Starting | VmState::Running) {
                    boot.deadline = Some(Instant::now());
                }
            }
            GuestEvent::Unrenewed { what } => {
                boot.misbehaved = Some(what);
                if matches!(self.record.state, VmState::Starting | VmState::Running) {
                    boot.deadline = Some(Instant::now());
                }
            }
            GuestEvent::Misbehaved { what } => {
                if boot.complains() {
                    tracing::warn!(vm = %self.record.name, what, "protocol violation by the guest");
                }
                boot.misbehaved = Some(what);
            }
        }
    }

    /// Handles that it cannot be recorded what a restored guest has renewed. A later daemon would end it with all that ran in it, so nothing runs yet: it
    /// says hello again, until its boot takes too long.
    fn not_recorded(&mut self, recorded: Recorded, error: &ToolError) {
        tracing::error!(vm = %self.record.name, %error, "cannot record what a restored guest has renewed: it does not go on yet");
        if let Some(boot) = self.boot.as_mut() {
            if let Some(link) = boot.link.take() {
                link.close("what its guest has renewed cannot be recorded");
            }
            boot.link_state = None;
            boot.clock_keeper = None;
        }
        if let Some(guest) = self.record.guest.as_mut() {
            guest.configured = false;
        }
        self.publish();
        recorded.lose();
    }

    /// Handles the first answer of a shim that did not answer when the daemon started.
    async fn shim_answers(&mut self) {
        let Some(boot) = self.boot.as_mut() else { return };
        self.record.processes = processes_of(&boot.shim).or(self.record.processes);
        if self.record.state != VmState::Stopping {
            boot.go_on(&self.shared, &self.record);
        }
        self.pause_anew().await;
        self.record.reason = (self.record.state == VmState::Unreachable)
            .then(|| "its shim answers again; waiting for its agent".to_owned());
        self.note("its shim answers again").await;
    }

    /// Handles that the VMM has paused the guest by itself or refuses its writes, or that this is over.
    async fn stalled(&mut self, stall: Option<Stall>) {
        let Some(boot) = self.boot.as_mut() else { return };
        if std::mem::replace(&mut boot.stall, stall) == stall {
            return;
        }
        self.shared.events.pressure_of(&self.record, stall.is_some());
        let driver = self.record.driver.as_deref().and_then(DriverKind::vmm);
        if driver.is_some_and(|driver| !Caps::of(driver).pauses_on_full_disk) {
            // The guest runs on, so its tools work: the state does not change.
            let what = match stall {
                Some(_) => failed_writes(&self.drives),
                None => "the host's disk has space again; if the guest's filesystem is read-only now, restart the VM".to_owned(),
            };
            self.record.reason = stall.is_some().then(|| what.clone());
            return self.note(&what).await;
        }
        let (state, answers) = (self.record.state, boot.agent_answers());
        let is_booting = matches!(state, VmState::Starting | VmState::Running);
        if is_booting {
            // The boot timeout does not run while the guest is paused.
            boot.deadline = stall.is_none().then(|| Instant::now() + boot.patience);
        }
        let Some(Stall::DiskFull { drive }) = stall else {
            let again = "the host's disk has space again: the guest was resumed";
            if state == VmState::Unreachable && answers {
                return self.settle(VmState::Ready, None, again).await;
            }
            self.record.reason =
                (state == VmState::Unreachable).then(|| format!("{again}; waiting for its agent"));
            return self.note(again).await;
        };
        let name = self.drives.get(drive).map_or("of the kernel's modules", |drive| drive.name.as_str());
        let what = format!(
            "{DISK_FULL}the host has no space for what the guest writes to drive {name}; it resumes when there is space"
        );
        match state {
            VmState::Ready => self.settle(VmState::Unreachable, Some(what), "the host's disk is full").await,
            VmState::Stopping => self.note(&what).await,
            _ => {
                self.record.reason = Some(what.clone());
                self.note(&what).await;
            }
        }
    }

    async fn link_event(&mut self, state: LinkState) {
        let Some(boot) = self.boot.as_mut() else { return };
        match (state, self.record.state) {
            (LinkState::Up, VmState::Running) => {
                boot.clock.timings.link_ms = boot.clock.step();
                boot.deadline = None;
                self.had_mishap = false;
                self.record.timings = Some(boot.clock.timings);
                let is_warm = self.record.spec.warm.is_some();
                if !Box::pin(self.finish_warm()).await {
                    return;
                }
                let woken = self.record.suspended.take();
                let why = match (&woken, is_warm) {
                    (Some(_), _) => "woken: guest agent ready",
                    (None, true) => "warm start: guest agent ready",
                    (None, false) => "guest agent ready",
                };
                self.settle(VmState::Ready, None, why).await;
                if let Some(memory) = woken {
                    failpoint::reach("wake-ready");
                    remove::tree(&self.shared.paths.suspended(memory.manifest.checkpoint)).await;
                }
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
        if boot.deadline.take().is_some_and(|due| due.elapsed() >= STANDSTILL) {
            tracing::warn!(vm = %self.record.name, "the daemon was stalled; draining guest events before timing out");
            boot.deadline = Some(Instant::now() + HEARING);
            return;
        }
        match self.record.state {
            VmState::Ready | VmState::Unreachable if boot.bye.is_some() => self.outstay().await,
            VmState::Starting | VmState::Running => {
                let waited = self.shared.boot_timeout(boot.accel).as_secs();
                let what = match (&boot.misbehaved, self.record.state) {
                    (Some(what), _) => what.clone(),
                    (None, VmState::Starting) => format!("no hello from the guest in {waited} s"),
                    (None, _) => format!("the guest was not ready in {waited} s"),
                };
                let reason = last_words::with_console(what.clone(), &self.shared.paths.vm(self.record.id));
                if let Err(error) = self.kill_boot().await {
                    return self.still_runs(&error).await;
                }
                if self.sleep_on(&what).await || self.cold_instead(&what).await {
                    return;
                }
                self.settle(VmState::Failed, Some(reason), "it did not come up").await;
            }
            VmState::Ready => {
                // The VM was adopted, but its agent never answered.
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

    /// Ends a boot at once, with its VMM. If the VMM cannot be ended, the boot stays.
    pub(super) async fn kill_boot(&mut self) -> Result<(), ToolError> {
        let Some(boot) = self.boot.as_ref() else { return Ok(()) };
        let shim = boot.shim.clone();
        if let Err(error) = shim.kill().await {
            tracing::warn!(vm = %self.record.name, %error, "cannot kill the VMM through its shim");
        }
        if tokio::time::timeout(DELETE_PATIENCE, shim.wait()).await.is_err() {
            let seconds = DELETE_PATIENCE.as_secs();
            let message =
                format!("the VMM of {} is still running {seconds} s after it was killed", self.record.name);
            return Err(ToolError::new(ErrorCode::Timeout, message)
                .hint("try again; vm_inspect shows its process id"));
        }
        self.end_boot().await;
        Ok(())
    }

    /// Handles that a boot cannot be ended: it is tried again at the next deadline.
    pub(super) async fn still_runs(&mut self, error: &ToolError) {
        if let Some(boot) = self.boot.as_mut() {
            boot.deadline = Some(Instant::now() + DELETE_PATIENCE);
        }
        self.record.reason = Some(error.message.clone());
        self.note(&error.message).await;
    }

    /// Retries the boot of a VM whose guest lost its timer while it booted.
    async fn timer_lost(&mut self) {
        if self.record.state != VmState::Starting || std::mem::replace(&mut self.had_mishap, true) {
            return;
        }
        if let Err(error) = self.kill_boot().await {
            return self.still_runs(&error).await;
        }
        failpoint::reach("timer-lost-killed");
        self.start_once_more("the guest lost its timer during boot because the host was busy").await;
    }

    async fn start_once_more(&mut self, what: &str) {
        tracing::warn!(vm = %self.record.name, "{what}: retrying the start once");
        let why = format!("{what}; retrying the start once");
        if let Err(error) = self.launch(DAEMON, &why, &Progress::default()).await
            && self.record.state == VmState::Starting
        {
            let reason = format!("retry the start: {}", error.message);
            self.settle(VmState::Failed, Some(reason), "it did not come up").await;
        }
    }

    /// Checks a machine whose guest said bye by itself. Not every machine ends when its kernel halts (Firecracker's does not), and a guest may
    /// keep running after its bye.
    async fn outstay(&mut self) {
        let graceful = Duration::from_secs(self.shared.config.stop_timeout_s.into());
        let is_halted = last_words::is_halted(&self.shared.paths.vm(self.record.id));
        let Some(boot) = self.boot.as_mut() else { return };
        let Some(farewell) = boot.bye else { return };
        let is_over = farewell.at.elapsed() >= graceful * FAREWELL_STOPS;
        if is_halted || (is_over && !farewell.guessed) {
            tracing::info!(vm = %self.record.name, is_halted, "the guest has shut down but its VMM still runs: killing the VMM");
            if let Err(error) = boot.shim.kill().await {
                tracing::error!(vm = %self.record.name, %error, "cannot kill the VMM");
            }
        } else if !is_over {
            boot.deadline = Some(Instant::now() + FAREWELL_LOOK);
        } else if self.record.state == VmState::Ready {
            // Only the agent ended, and assumed that the guest was shutting down.
            let reason =
                "its agent said that the guest was shutting down, but the guest still runs".to_owned();
            self.settle(VmState::Unreachable, Some(reason), "the link was lost").await;
        }
    }

    async fn exited(&mut self, exit: Exit) {
        while let Some(event) = self.boot.as_mut().and_then(Boot::last_words) {
            self.guest_event(event).await;
        }
        let Some(boot) = self.boot.as_ref() else { return };
        let lasted = boot.clock.since_start();
        let bye = boot.bye.map(|farewell| farewell.settled(exit.machine));
        let is_emulated = boot.accel == Accel::Tcg;
        let directory = self.shared.paths.vm(self.record.id);
        let failure = match &boot.misbehaved {
            Some(what) => format!("{}; before that: {what}", exit.message),
            None => exit.message.clone(),
        };
        self.end_boot().await;
        failpoint::reach("stop-down");
        if self.sleep_on(&failure).await || self.cold_instead(&failure).await {
            return;
        }
        match (self.record.state, bye) {
            (VmState::Stopping, _) => self.settle(VmState::Stopped, None, "it is down").await,
            (VmState::Starting, _)
                if is_emulated && !self.had_mishap && mishap::is_crashed(&directory).await =>
            {
                self.had_mishap = true;
                self.start_once_more("the guest's kernel crashed during boot under software emulation").await;
            }
            (VmState::Starting, _) => {
                let reason = last_words::with_console(failure, &directory);
                self.settle(VmState::Failed, Some(reason), "the VMM ended before the guest said hello").await;
            }
            (_, Some(ByeReason::Poweroff)) => {
                self.settle(VmState::Stopped, None, "the guest powered off").await;
            }
            (_, Some(ByeReason::Reboot)) => match self.reboots.next(lasted) {
                Reboot::Now => self.reboot("the guest rebooted").await,
                Reboot::Later(wait) => {
                    let reason = format!(
                        "the guest rebooted again soon after its start; next start in {} s",
                        wait.as_secs()
                    );
                    self.again_at = Some(Instant::now() + wait);
                    self.settle(VmState::Stopped, Some(reason), "the guest rebooted").await;
                }
                Reboot::Never => {
                    let reason = format!(
                        "the guest rebooted {} times in a row within {} s of its start",
                        reboots::QUICK_MAX,
                        reboots::QUICK.as_secs()
                    );
                    let reason = last_words::with_console(reason, &directory);
                    self.settle(VmState::Failed, Some(reason), "it reboots in a loop").await;
                }
            },
            (_, None) => {
                let reason = last_words::with_console(failure, &directory);
                self.settle(VmState::Crashed, Some(reason), "the VMM ended without a bye from the guest")
                    .await;
            }
        }
    }

    /// Starts a VM again after its guest rebooted.
    pub(super) async fn reboot(&mut self, why: &str) {
        let restarted = self.launch(DAEMON, why, &Progress::default()).await;
        if let Err(error) = &restarted
            && matches!(self.record.state, VmState::Running | VmState::Ready | VmState::Unreachable)
        {
            let reason = format!("start it again after its reboot: {}", error.message);
            self.settle(VmState::Crashed, Some(reason), "the reboot failed").await;
        } else if let Err(error) = restarted
            && self.record.state == VmState::Stopped
        {
            let reason = format!("start it again after its reboot: {}", error.message);
            self.record.reason = Some(reason.clone());
            self.note(&reason).await;
        }
    }

    /// Releases a boot whose VMM has ended.
    pub(super) async fn end_boot(&mut self) {
        if let Some(boot) = self.boot.take() {
            if let Some(link) = &boot.link {
                link.close("the VM is down");
            }
            if let Some(asked) = &boot.asked {
                asked.abort();
            }
            crate::vmm::remove_sockets(&self.shared.paths.vm(self.record.id));
            if boot.has_interface {
                network::disconnect(&self.shared, &self.record).await;
            }
        }
        self.record.processes = None;
    }
}

/// The reason of a VM whose writes fail because the host's disk is full, while it runs on.
fn failed_writes(drives: &[DriveRecord]) -> String {
    let written = drives.iter().filter(|drive| !drive.read_only).map(|drive| drive.name.as_str());
    let names = written.collect::<Vec<_>>().join(", ");
    format!(
        "{DISK_FULL}the host has no space for what the guest writes, and its writes fail; its writable drives: {names}; free space on the host"
    )
}

fn guest_record(hello: Hello) -> GuestRecord {
    let protocol = hello.protocol.min(nexus_schema::link::PROTOCOL);
    GuestRecord {
        hello: Hello { token: None, resumed: None, ..hello },
        protocol,
        configured: false,
        problems: Vec::new(),
        resumed: None,
    }
}
