//! One boot of one VM: from its plan to a running VMM, and what is held while the VMM runs.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use nexus_schema::ToolError;
use nexus_schema::id::BootId;
use nexus_schema::link::{
    ByeReason, Configure, GuestFile, HOSTNAME_REQUEST, HostnameParams, InitMode, MCP_PORT, Mount, PROTOCOL,
    PROTOCOL_MIN, PROXY_REQUEST, ProxyParams, QUIET_MAX,
};
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::vm::{VmState, VmTimings};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::actor::thaw;
use super::mishap;
use super::network::{self, Leased};
use super::policy;
use super::stop::Rung;
use crate::asset::KernelFiles;
use crate::context::Shared;
use crate::egress::{Egress, EgressServer};
use crate::guest::{self, ClockKeeper, GuestEvent, HelloServer, Link, LinkState, Restored};
use crate::os::disk::is_full;
use crate::os::failpoint;
use crate::os::paths::vm_files;
use crate::store::drives::DriveRecord;
use crate::store::vms::{TmpPlace, VmRecord};
use crate::vmm::doctor::Choice;
use crate::vmm::{Accel, Exit, LaunchPlan, MachineEnd, PlanDrive, ShimClient, Stall, VmmError};

/// Size limit of a console's file. Two files are kept: the current and the previous one.
const CONSOLE_BYTES: nexus_schema::ByteSize = nexus_schema::ByteSize::mib(1);
/// Most protocol violations by a guest that are logged in one boot.
const COMPLAINTS_MAX: u32 = 5;
/// Timeout of the notification of a guest about a change of its network.
const PROXY_TIMEOUT: Duration = Duration::from_secs(10);
/// Length of the queue of a guest's events.
const EVENTS_MAX: usize = 32;

/// A running VMM, and the daemon's connections to it.
#[derive(Debug)]
pub(super) struct Boot {
    pub(super) shim: Arc<ShimClient>,
    pub(super) accel: Accel,
    /// Listens for the guest's hello and bye until the boot ends.
    hello: Option<HelloServer>,
    /// Makes the guest's connections to other machines until the boot ends.
    _egress: Option<EgressServer>,
    events: mpsc::Receiver<GuestEvent>,
    /// The link, once the guest is configured.
    pub(super) link: Option<Link>,
    pub(super) link_state: Option<watch::Receiver<LinkState>>,
    pub(super) clock_keeper: Option<ClockKeeper>,
    /// Deadline of the present step.
    pub(super) deadline: Option<Instant>,
    /// The guest's bye, if it sent one before it went down.
    pub(super) bye: Option<Farewell>,
    /// The current step of a stop.
    pub(super) rung: Option<Rung>,
    /// The agent's answer to the request to power off.
    pub(super) asked: Option<tokio::task::JoinHandle<bool>>,
    /// The last protocol violation by the guest, if any.
    pub(super) misbehaved: Option<String>,
    /// Number of protocol violations in this boot.
    complaints: u32,
    /// Waits for the first answer of a shim that was adopted without one.
    silent: Option<AbortOnDropHandle<()>>,
    /// Watches the console for a lost timer, until the guest says hello.
    pub(super) timer: Option<AbortOnDropHandle<()>>,
    /// Timeout until the guest is ready.
    pub(super) patience: Duration,
    /// Why the VMM has paused the guest, if it has.
    pub(super) stall: Option<Stall>,
    stalls: mpsc::Receiver<Option<Stall>>,
    pub(super) clock: Clock,
    /// Whether the VM has a network interface, which must be disconnected when the boot ends.
    pub(super) has_interface: bool,
}

/// A guest's bye.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Farewell {
    pub(super) reason: ByeReason,
    /// Whether the reason is only the guest's guess.
    pub(super) guessed: bool,
    /// Time of the bye.
    pub(super) at: Instant,
}

impl Farewell {
    /// Returns the final reason, now that it is known how the machine ended. The machine's end overrides a guess.
    pub(super) const fn settled(self, machine: Option<MachineEnd>) -> ByeReason {
        match (self.guessed, machine) {
            (true, Some(MachineEnd::Reset)) => ByeReason::Reboot,
            (true, Some(MachineEnd::Off)) => ByeReason::Poweroff,
            (true, None) | (false, _) => self.reason,
        }
    }
}

/// An event of a boot.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one exists at a time, on the stack of one task")]
pub(super) enum Event {
    /// The VMM has ended.
    Exited(Exit),
    /// The guest sent an event.
    Guest(GuestEvent),
    /// The link changed.
    Link(LinkState),
    /// The agent answered the request to power off; `false` if it could not be asked.
    Asked(bool),
    /// The deadline of the present step has passed.
    Deadline,
    /// The VMM has paused the guest by itself, or resumed it.
    Stalled(Option<Stall>),
    /// A shim that was adopted without an answer has answered.
    ShimAnswers,
    /// The console shows that the guest has lost its timer.
    TimerLost,
}

/// Measures the steps of a boot.
#[derive(Debug)]
pub(super) struct Clock {
    started: Instant,
    last: Instant,
    pub(super) timings: VmTimings,
}

impl Clock {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { started: now, last: now, timings: VmTimings::default() }
    }

    /// Returns the time since the boot began; for an adopted boot, since its adoption.
    pub(super) fn since_start(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends a step and returns its duration in milliseconds.
    pub(super) fn step(&mut self) -> u64 {
        let now = Instant::now();
        let step = now.duration_since(self.last);
        self.last = now;
        self.timings.total_ms = millis(now.duration_since(self.started));
        millis(step)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the configuration that the guest gets in response to its hello.
pub(super) fn configure(
    shared: &Shared,
    record: &VmRecord,
    drives: &[DriveRecord],
    boot_id: BootId,
    token: &str,
    leased: Option<&Leased>,
    search: Vec<String>,
) -> Configure {
    let mounts = drives.iter().filter_map(|drive| {
        let path = drive.attachment.as_ref()?.mount.clone()?;
        Some(Mount { label: drive.id.to_string(), path, read_only: drive.read_only })
    });
    // The files were checked before the VM was created.
    let files = record.spec.files.iter().filter_map(|(path, file)| {
        let (content, mode) = file.resolve().ok()?;
        let content_base64 = BASE64.encode(&content);
        Some(GuestFile { path: path.clone(), content_base64, mode, user: file.user.clone() })
    });
    let policy = network::of_proxy(&record.spec.network, leased.is_none());
    let resolver = leased.map(|leased| vec![IpAddr::from(leased.resolver())]);
    Configure {
        protocol: PROTOCOL,
        token: token.into(),
        vm: record.id,
        name: record.name.clone(),
        boot_id,
        hostname: record.spec.hostname.clone(),
        time_unix_ns: 0,
        interfaces: leased.map(Leased::of_guest).into_iter().collect(),
        dns: resolver.unwrap_or_else(|| record.spec.dns.clone()),
        search,
        env: record.spec.env.clone(),
        working_dir: record.spec.working_dir.clone(),
        image_user: record.spec.image_user.clone(),
        wait_for_init_s: wait_for_init_s(shared, record),
        mounts: mounts.collect(),
        files: files.collect(),
        proxy: Some(ProxyParams { enabled: policy.mode == NetworkMode::Proxy }),
        resume: None,
        template: false,
    }
}

/// Returns how long the guest's agent waits for the guest's own init, in seconds; 0: it does not wait.
pub(super) fn wait_for_init_s(shared: &Shared, record: &VmRecord) -> u32 {
    let accel = if record.accel.as_deref() == Some(Accel::Kvm.as_str()) { Accel::Kvm } else { Accel::Tcg };
    match record.spec.init {
        InitMode::System if record.spec.wait_for_init => {
            u32::try_from(shared.boot_timeout(accel).as_secs()).unwrap_or(u32::MAX)
        }
        InitMode::System | InitMode::Agent => 0,
    }
}

/// Returns whether the guest has its configuration. A guest without one says hello again, and may have no token yet.
pub(super) fn is_configured(record: &VmRecord) -> bool {
    matches!(record.state, VmState::Ready | VmState::Unreachable | VmState::Paused)
        || record.guest.as_ref().is_some_and(|guest| guest.configured)
}

/// Returns the launch plan, without an interface.
pub(super) fn plan(
    shared: &Shared,
    record: &VmRecord,
    drives: &[DriveRecord],
    boot_id: BootId,
    choice: &Choice,
    kernel: Option<&KernelFiles>,
    initramfs: &Path,
) -> LaunchPlan {
    let init = match record.spec.init {
        InitMode::Agent => "agent",
        InitMode::System => "system",
    };
    let mut cmdline = vec![format!("nexus.init={init}"), "nexus.root=/dev/vda".into()];
    if record.spec.tmp == TmpPlace::Tmpfs {
        cmdline.push("nexus.tmp=tmpfs".into());
    }
    let own = drives.iter().enumerate().map(|(position, drive)| PlanDrive {
        id: format!("d{position}"),
        path: shared.paths.drive(drive.id).join(crate::drive::DISK),
        read_only: drive.read_only,
    });
    let mut drives: Vec<PlanDrive> = own.collect();
    // After the VM's own drives, so that their device names do not depend on it; the guest finds it by its UUID.
    if let Some(image) = kernel.and_then(|kernel| kernel.module_image.as_ref()) {
        cmdline.push(format!("nexus.modules={}", image.uuid));
        drives.push(PlanDrive { id: "modules".into(), path: image.path.clone(), read_only: true });
    }
    LaunchPlan {
        vm: record.id,
        name: record.name.clone(),
        boot_id,
        driver: choice.driver,
        binary: choice.binary.clone(),
        arch: choice.arch,
        accel: choice.accel,
        directory: shared.paths.vm(record.id),
        vcpus: record.spec.vcpus,
        memory: record.spec.memory,
        kernel: kernel.map(|kernel| kernel.vmlinux.clone()).unwrap_or_default(),
        initramfs: initramfs.into(),
        cmdline,
        drives,
        cid: record.cid,
        link: policy::link(record.spec.checkpoints, &choice.caps),
        interface: None,
        jail: shared.config.jail,
        console_bytes: CONSOLE_BYTES,
        restore: None,
    }
}

impl Boot {
    /// Launches a VMM, which `restored` restores from a checkpoint, unless it is `waiting`. The guest may connect from here on.
    pub(super) async fn launch(
        shared: &Shared,
        plan: &LaunchPlan,
        configure: Configure,
        (restored, waiting): (Option<Restored>, Option<ShimClient>),
        egress: Arc<Egress>,
        clock: Clock,
    ) -> Result<Self, VmmError> {
        let (events_tx, events) = mpsc::channel(EVENTS_MAX);
        let is_restored = restored.is_some();
        let hello = match restored {
            Some(restored) => HelloServer::bind_restored(&plan.directory, configure, restored, events_tx),
            None => HelloServer::bind(&plan.directory, configure, true, events_tx),
        };
        let hello = hello.map_err(|source| VmmError::File {
            action: "listen on",
            path: plan.directory.join(vm_files::HELLO),
            source,
        })?;
        let egress = EgressServer::bind(&plan.directory, egress).map_err(|source| VmmError::File {
            action: "listen on",
            path: plan.directory.join(vm_files::EGRESS),
            source,
        })?;
        failpoint::reach("start-hello-bound");
        let shim = match waiting {
            Some(shim) => shim.resume().await.map(|()| shim)?,
            None => ShimClient::launch(&shared.config.shim_binary, plan).await?,
        };
        let listeners = (Some(hello), Some(egress));
        // One that does not prove in time what it renewed is ended before its commands could go on.
        let patience = if is_restored { QUIET_MAX / 2 } else { shared.boot_timeout(plan.accel) };
        let boot = Self::new(shim, plan.accel, listeners, events, patience, clock);
        let watched = (plan.accel == Accel::Tcg && !is_restored)
            .then(|| mishap::until_timer_lost(plan.directory.clone()));
        let has_interface = plan.interface.is_some();
        Ok(Self {
            has_interface,
            timer: watched.map(|watch| AbortOnDropHandle::new(tokio::spawn(watch))),
            ..boot
        })
    }

    /// Adopts a VMM that an earlier daemon launched.
    pub(super) fn adopt(
        shared: &Shared,
        shim: ShimClient,
        accel: Accel,
        directory: &Path,
        configure_with: Configure,
        configured: bool,
        egress: Arc<Egress>,
    ) -> std::io::Result<Self> {
        let (events_tx, events) = mpsc::channel(EVENTS_MAX);
        let hello = match HelloServer::bind(directory, configure_with, !configured, events_tx) {
            // A configured guest works without the hello server.
            Err(error) if configured && is_full(&error) => {
                tracing::warn!(%error, directory = %directory.display(), "the disk is full: cannot listen for this guest's bye");
                None
            }
            bound => Some(bound?),
        };
        let egress = match EgressServer::bind(directory, egress) {
            Err(error) if is_full(&error) => {
                tracing::warn!(%error, directory = %directory.display(), "the disk is full: this guest has no proxy until its next start");
                None
            }
            bound => Some(bound?),
        };
        let patience = shared.boot_timeout(accel);
        Ok(Self::new(shim, accel, (hello, egress), events, patience, Clock::start()))
    }

    fn new(
        shim: ShimClient,
        accel: Accel,
        (hello, egress): (Option<HelloServer>, Option<EgressServer>),
        events: mpsc::Receiver<GuestEvent>,
        patience: Duration,
        clock: Clock,
    ) -> Self {
        let stalls = shim.stalls();
        Self {
            shim: Arc::new(shim),
            accel,
            hello,
            _egress: egress,
            events,
            link: None,
            link_state: None,
            clock_keeper: None,
            deadline: Some(Instant::now() + patience),
            bye: None,
            rung: None,
            asked: None,
            misbehaved: None,
            complaints: 0,
            silent: None,
            timer: None,
            patience,
            stall: None,
            stalls,
            clock,
            has_interface: false,
        }
    }

    /// Suspends the deadline until the shim answers; see [`Event::ShimAnswers`].
    pub(super) fn wait_for_shim(&mut self) {
        self.deadline = None;
        let shim = self.shim.clone();
        self.silent = Some(AbortOnDropHandle::new(tokio::spawn(async move { shim.answered().await })));
    }

    /// Continues a boot of an earlier daemon, now that its shim answers.
    pub(super) fn go_on(&mut self, shared: &Shared, record: &VmRecord) {
        let is_outdated = record.guest.as_ref().is_some_and(|guest| guest.protocol < PROTOCOL_MIN);
        let waits = !is_outdated && record.state != VmState::Paused;
        self.deadline = waits.then(|| Instant::now() + self.patience);
        let is_up = matches!(record.state, VmState::Running | VmState::Ready | VmState::Unreachable);
        if is_up && is_configured(record) && !is_outdated {
            self.dial(shared, record);
            // An earlier daemon may have ended within a checkpoint.
            if let Some(link) = self.link.clone().filter(|_| record.spec.checkpoints) {
                tokio::spawn(async move { thaw(&link).await });
            }
        }
    }

    /// Counts a protocol violation and returns whether to log it. The limit keeps a guest from filling the log.
    pub(super) fn complains(&mut self) -> bool {
        self.complaints = self.complaints.saturating_add(1);
        self.complaints <= COMPLAINTS_MAX
    }

    /// Starts the link to the guest's MCP server, unless there is one already.
    pub(super) fn dial(&mut self, shared: &Shared, record: &VmRecord) {
        if self.link.is_none() {
            let directory = &shared.paths.vm(record.id);
            let link = Link::start(directory, MCP_PORT);
            let (events, vm, boot_id) = (shared.events.clone(), record.id, record.boot_id);
            link.on_command_ended(move |ended| events.command_ended(vm, boot_id, ended));
            let mut state = link.state();
            state.mark_changed();
            self.link_state = Some(state);
            self.clock_keeper = Some(ClockKeeper::start(link.clone(), directory));
            self.link = Some(link);
        }
    }

    /// Prepares for a pause: the guest's silence and the deadlines of calls do not count until [`Boot::release`].
    pub(super) fn hold(&mut self) {
        // It would measure the pause.
        self.clock_keeper = None;
        if let Some(link) = &self.link {
            link.hold();
        }
    }

    /// Ends what [`Boot::hold`] began. Where the VMM has cut the connections to its guest, they are made anew.
    pub(super) fn release(&self, record: &VmRecord) {
        let Some(link) = &self.link else { return };
        link.release();
        if policy::cuts_connections(record) {
            link.redial();
        }
    }

    /// Goes on with a guest that runs again, and keeps its clock right; connects to it if there is no link.
    pub(super) fn let_go(&mut self, shared: &Shared, record: &VmRecord) {
        self.release(record);
        match self.link.clone() {
            Some(link) => self.clock_keeper = Some(ClockKeeper::start(link, &shared.paths.vm(record.id))),
            None => self.dial(shared, record),
        }
    }

    /// Sets the guest's clock, which stood still during a pause. If that fails, the clock's keeper does it later.
    pub(super) async fn set_clock(&self) {
        if let Some(link) = &self.link {
            guest::set_clock(link).await;
        }
    }

    /// Tells the guest whether it has a proxy from now on: over the link if there is one, and in response to its next hello.
    pub(super) fn tell_proxy(&self, proxy: ProxyParams) {
        if let Some(hello) = &self.hello {
            hello.change(|configure| configure.proxy = Some(proxy));
        }
        let Some(link) = self.link.clone() else { return };
        tokio::spawn(async move {
            let params = serde_json::to_string(&proxy).and_then(serde_json::value::RawValue::from_string);
            let Ok(params) = params else { return };
            // An older agent does not support this request; the VM gets a newer agent at its next start.
            if let Err(error) = link.request(PROXY_REQUEST, &params, PROXY_TIMEOUT).await {
                tracing::info!(%error, "the guest's agent did not accept its network change; it takes effect at the next start");
            }
        });
    }

    /// Sets the guest's hostname. If that fails, the guest has it from its next start on.
    pub(super) fn tell_hostname(&self, hostname: &str) {
        let hostname = HostnameParams { hostname: hostname.to_owned() };
        if let Some(hello) = &self.hello {
            let hostname = hostname.hostname.clone();
            hello.change(|configure| configure.hostname = hostname);
        }
        let Some(link) = self.link.clone() else { return };
        tokio::spawn(async move {
            let params = serde_json::to_string(&hostname).and_then(serde_json::value::RawValue::from_string);
            let Ok(params) = params else { return };
            if let Err(error) = link.request(HOSTNAME_REQUEST, &params, PROXY_TIMEOUT).await {
                tracing::info!(%error, "a guest learns of its hostname at its next start only");
            }
        });
    }

    /// Returns whether the link to the agent is up.
    pub(super) fn agent_answers(&self) -> bool {
        self.link_state.as_ref().is_some_and(|state| *state.borrow() == LinkState::Up)
    }

    /// Asks the agent to power the guest off; the answer comes as [`Event::Asked`].
    pub(super) fn ask_agent(&mut self) {
        let Some(link) = self.link.clone() else { return };
        self.asked = Some(tokio::spawn(async move {
            let params = serde_json::value::RawValue::from_string(r#"{"reason":"poweroff"}"#.into());
            let Ok(params) = params else { return false };
            link.request("nexus/shutdown", &params, Duration::from_secs(5)).await.is_ok()
        }));
    }

    /// Returns the next event. The guest's events come before the end of its VMM; the deadline comes before everything, so that a talkative
    /// guest cannot delay it.
    pub(super) async fn event(&mut self) -> Event {
        let deadline = self.deadline.map(tokio::time::Instant::from_std);
        let shim = self.shim.clone();
        tokio::select! {
            biased;
            () = sleep_until(deadline) => Event::Deadline,
            Some(event) = self.events.recv() => Event::Guest(event),
            state = changed(&mut self.link_state) => Event::Link(state),
            answered = answer(&mut self.asked) => Event::Asked(answered),
            Some(stall) = self.stalls.recv() => Event::Stalled(stall),
            () = finished(&mut self.silent) => Event::ShimAnswers,
            () = finished(&mut self.timer) => Event::TimerLost,
            exit = shim.wait() => Event::Exited(exit),
        }
    }

    /// Returns the next queued event of the guest, if any.
    pub(super) fn last_words(&mut self) -> Option<GuestEvent> {
        self.events.try_recv().ok()
    }
}

async fn changed(state: &mut Option<watch::Receiver<LinkState>>) -> LinkState {
    match state {
        Some(receiver) => match receiver.changed().await {
            Ok(()) => receiver.borrow_and_update().clone(),
            Err(_) => {
                *state = None;
                LinkState::Down { why: "the link was closed".into() }
            }
        },
        None => std::future::pending().await,
    }
}

async fn answer(asked: &mut Option<tokio::task::JoinHandle<bool>>) -> bool {
    match asked {
        Some(task) => {
            let answered = task.await.unwrap_or(false);
            *asked = None;
            answered
        }
        None => std::future::pending().await,
    }
}

async fn finished(silent: &mut Option<AbortOnDropHandle<()>>) {
    match silent {
        Some(task) => {
            task.await.ok();
            *silent = None;
        }
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Returns the error of a failed launch.
pub(super) fn launch_failed(name: &str, error: &VmmError) -> ToolError {
    ToolError::new(
        nexus_schema::ErrorCode::BootFailed,
        format!("start {name}: {}", nexus_schema::error::chain(error)),
    )
    .hint("check vm_logs and system_info; vm_start retries")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_gives_way_to_how_the_machine_ended() {
        let settled =
            |reason, guessed, machine| Farewell { reason, guessed, at: Instant::now() }.settled(machine);
        let (off, again) = (ByeReason::Poweroff, ByeReason::Reboot);
        assert_eq!(settled(off, true, Some(MachineEnd::Reset)), again);
        assert_eq!(settled(again, true, Some(MachineEnd::Off)), off);
        assert_eq!(settled(off, true, None), off);
        // The agent's own init resets the machine to power off.
        assert_eq!(settled(off, false, Some(MachineEnd::Reset)), off);
    }
}
