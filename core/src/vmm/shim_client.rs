//! The daemon's client of a shim: launching it, sending requests, and waiting for its end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nexus_schema::id::BootId;
use nexus_schema::network::Bandwidth;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::cgroup::{self, Groups, Limits};
use super::control::{Job, LINE_MAX, Launched, Reply, Request, ShimIdentity, Status, VmmError, VmmInfo};
use super::exit::{self, Exit, read_exit};
use super::plan::{Accel, LaunchPlan};
use super::shim::{self, Holder};
use super::{log, process, wire};
use crate::os::paths::vm_files;
use crate::os::process::ProcessHandle;
use crate::os::regular;
use crate::os::socket::connect_in_tokio;
use crate::os::tsc;

/// Timeout of a launch; the VMM's own timeout is shorter.
const LAUNCH: Duration = Duration::from_secs(60);
/// Least rate at which a shim reads the memory of a guest that goes on, before it starts the VMM, in bytes per millisecond.
const READ_MIN: u64 = 64 << 10;
/// Timeout of a request that the shim answers by itself.
const ANSWER: Duration = Duration::from_secs(3);
/// Timeout of a request that the shim passes on to the VMM.
const ANSWER_OF_VMM: Duration = Duration::from_secs(8);
/// Timeout of a pause. The shim gives up on its VMM before.
const ANSWER_OF_PAUSE: Duration = Duration::from_secs(40);
/// Timeout of a shim to end after its VMM was killed, before it is killed too.
const LEAVE: Duration = Duration::from_secs(5);
/// Length of the ends of the VMM's log and of the console in an error, in bytes.
const TAIL: usize = 4 << 10;
/// Maximum size of a plan's file, in bytes.
const PLAN_MAX: u64 = 1 << 20;
/// Size at which a shim's own log is truncated, in bytes.
const SHIM_LOG_MAX: u64 = 64 << 10;

/// Client of a running shim and its VMM. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ShimClient {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) directory: PathBuf,
    pub(super) identity: ShimIdentity,
    /// The shim's status; empty until it has answered.
    pub(super) status: OnceLock<Status>,
    /// Generation of a shim that is newer than this daemon supports.
    pub(super) newer: OnceLock<u32>,
    pub(super) shim: AsyncFd<ProcessHandle>,
    /// `None`: not found, or already ended.
    pub(super) vmm: Option<AsyncFd<ProcessHandle>>,
}

impl ShimClient {
    /// Launches a VM. Returns once the VMM runs and has accepted its configuration.
    ///
    /// The plan's directory must exist, and no shim may run in it. Files of an earlier shim are removed first, except its logs.
    /// If the future is dropped before it has completed, the VM is killed.
    pub async fn launch(shim_binary: &Path, plan: &LaunchPlan) -> Result<Self, VmmError> {
        let (binary, plan_for_start) = (shim_binary.to_owned(), plan.clone());
        let started = tokio::task::spawn_blocking(move || start(&binary, &plan_for_start));
        let mut starting = match started.await {
            Ok(started) => started?,
            Err(error) => {
                return Err(VmmError::Spawn {
                    binary: shim_binary.to_owned(),
                    source: io::Error::other(error),
                });
            }
        };
        let limit = launch_limit(plan);
        let launched = timeout(limit, starting.launched()).await;
        match launched {
            Ok(Ok(Some(Launched::Running(status)))) => {
                limit_vmm(plan, status.vmm.pid);
                let shim = Self::hold_launched(&plan.directory, status)?;
                starting.keep = true;
                match shim {
                    Some(shim) => Ok(shim),
                    // It ended right after its report.
                    None => Err(starting.failed(plan, read_exit(&plan.directory))),
                }
            }
            Ok(Ok(Some(Launched::Failed(exit)))) => {
                // The directory is free for another launch once the shim has ended.
                starting.ended().await;
                Err(starting.failed(plan, Some(exit)))
            }
            Ok(Ok(None) | Err(_)) => {
                // No report: the shim died, and its log may say why.
                starting.ended().await;
                Err(starting.failed(plan, read_exit(&plan.directory)))
            }
            Err(_) => {
                starting.kill();
                starting.ended().await;
                Err(VmmError::LaunchTimeout { driver: plan.driver.as_str(), seconds: limit.as_secs() })
            }
        }
    }

    /// Returns the identity of the shim's process, to be stored for [`ShimClient::adopt`].
    pub fn identity(&self) -> ShimIdentity {
        self.inner.identity
    }

    /// Returns the shim's VMM; `None` until the shim has answered.
    pub fn vmm(&self) -> Option<&VmmInfo> {
        self.inner.status.get().map(|status| &status.vmm)
    }

    /// Returns the boot that the shim was launched for; `None` until the shim has answered.
    pub fn boot_id(&self) -> Option<BootId> {
        self.inner.status.get().map(|status| status.boot_id)
    }

    /// Asks the guest through the VMM to shut down, as if the power button were pressed. Not every guest reacts: see
    /// [`Caps::can_ask_guest`](super::Caps).
    pub async fn shutdown(&self) -> Result<(), VmmError> {
        self.request(Request::Shutdown, "ask the guest to shut down").await
    }

    /// Pauses the guest's processors until [`ShimClient::resume`].
    pub async fn pause(&self) -> Result<(), VmmError> {
        self.request_within(Request::Pause, "pause", ANSWER_OF_PAUSE).await
    }

    /// Pauses the guest's processors for at most `time`: the shim resumes them by itself if it is neither called again nor
    /// [`ShimClient::release_guest`] in that time. At most a minute, since the daemon may have ended.
    pub async fn hold_guest(&self, time: Duration) -> Result<(), VmmError> {
        let ms = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        self.request_within(Request::Hold { ms }, "pause for a while", ANSWER_OF_PAUSE).await
    }

    /// Ends [`ShimClient::hold_guest`]. A pause by [`ShimClient::pause`] stays.
    pub async fn release_guest(&self) -> Result<(), VmmError> {
        self.request_within(Request::Release, "resume", ANSWER_OF_PAUSE).await
    }

    /// Resumes the guest's processors.
    pub async fn resume(&self) -> Result<(), VmmError> {
        self.request_within(Request::Resume, "resume", ANSWER_OF_PAUSE).await
    }

    /// Tells the guest that a drive has grown: the one at `index` of the plan, whose file is now `bytes` long.
    pub async fn resize_drive(&self, index: usize, bytes: u64) -> Result<(), VmmError> {
        self.request(Request::ResizeDrive { index, bytes }, "resize a drive").await
    }

    /// Changes the limits of the guest's network interface, where [`Caps::limits_bandwidth`](super::Caps).
    pub async fn limit(&self, bandwidth: Bandwidth) -> Result<(), VmmError> {
        let Bandwidth { rx, tx } = bandwidth;
        self.request(Request::Limit { rx, tx }, "limit the bandwidth").await
    }

    pub(super) async fn request(&self, request: Request, action: &'static str) -> Result<(), VmmError> {
        self.request_within(request, action, ANSWER_OF_VMM).await
    }

    async fn request_within(
        &self,
        request: Request,
        action: &'static str,
        limit: Duration,
    ) -> Result<(), VmmError> {
        let unanswered = |source| VmmError::Unanswered { pid: self.inner.identity.pid, action, source };
        match self.ask(request, limit).await.map_err(unanswered)? {
            Reply::Refused(message) => Err(VmmError::Refused { action, message }),
            Reply::Done => Ok(()),
            Reply::Status(_) | Reply::Ended(_) | Reply::Stalled(_) | Reply::Saved(_) => {
                Err(unanswered(io::ErrorKind::InvalidData.into()))
            }
        }
    }

    /// Sends a request in the shim's generation, and waits for the reply.
    async fn ask(&self, request: Request, limit: Duration) -> io::Result<Reply> {
        let exchange = async {
            let mut stream = self.send(request).await?;
            next_reply(&mut stream).await
        };
        timeout(limit, exchange).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Sends a request. Returns the connection, on which the replies arrive.
    pub(super) async fn send(&self, request: Request) -> io::Result<BufReader<UnixStream>> {
        let line = self.line(request)?;
        let mut stream = self.connect().await?;
        stream.write_all(&line).await?;
        Ok(BufReader::new(stream))
    }

    /// Returns a request as the shim's generation writes it.
    pub(super) fn line(&self, request: Request) -> io::Result<Vec<u8>> {
        // Until the shim has answered, use the oldest generation.
        let protocol = self.inner.status.get().map_or(wire::PROTOCOL_MIN, |status| status.protocol);
        wire::request_line(request, protocol).map_err(io::Error::other)
    }

    /// Connects to the shim.
    pub(super) async fn connect(&self) -> io::Result<UnixStream> {
        connect_in_tokio(&self.inner.directory, vm_files::SHIM).await
    }

    /// Kills the VMM. Works also if the shim hangs or has ended. Succeeds if the VMM has already ended. [`ShimClient::wait`] resolves when
    /// both have ended.
    pub async fn kill(&self) -> Result<(), VmmError> {
        // Through the shim, so that it records the end as requested.
        let answer = self.ask(Request::Kill, ANSWER).await;
        if matches!(answer, Ok(Reply::Done)) && gone_within(&self.inner.shim, LEAVE).await {
            return Ok(());
        }
        let failed =
            |source| VmmError::Unanswered { pid: self.inner.identity.pid, action: "end the VMM", source };
        if let Some(vmm) = &self.inner.vmm {
            vmm.get_ref().kill().map_err(failed)?;
        }
        if !gone_within(&self.inner.shim, LEAVE).await {
            tracing::warn!(
                pid = self.inner.identity.pid,
                "a shim did not end with its VMM: killing the shim"
            );
            self.inner.shim.get_ref().kill().map_err(failed)?;
        }
        Ok(())
    }

    /// Waits until shim and VMM have ended, and returns how the VMM ended. May be called any number of times, and its future dropped
    /// at any time.
    pub async fn wait(&self) -> Exit {
        gone(&self.inner.shim).await;
        if let Some(vmm) = &self.inner.vmm {
            // The VMM dies with its shim; if it did not, kill it here.
            if !gone_within(vmm, Duration::from_secs(1)).await {
                if let Err(error) = vmm.get_ref().kill() {
                    tracing::error!(pid = vmm.get_ref().pid(), %error, "cannot kill a VMM without a shim");
                }
                gone(vmm).await;
            }
        }
        if matches!(shim::read_holder(&self.inner.directory), Ok(None)) {
            remove_jail(&self.inner.directory);
        }
        read_exit(&self.inner.directory).unwrap_or_else(Exit::lost)
    }
}

/// Timeout of a launch: a guest that goes on has its memory read first, which may be large.
fn launch_limit(plan: &LaunchPlan) -> Duration {
    match &plan.restore {
        Some(_) => LAUNCH + Duration::from_millis(plan.memory.as_bytes() / READ_MIN),
        None => LAUNCH,
    }
}

/// Returns the boot that a VM's directory was last prepared for; its `exit.json` is from this boot.
pub(crate) fn launched_boot(directory: &Path) -> Option<BootId> {
    #[derive(serde::Deserialize)]
    struct Job {
        plan: Plan,
    }
    #[derive(serde::Deserialize)]
    struct Plan {
        boot_id: BootId,
    }
    let job = regular::open(&directory.join(vm_files::PLAN)).ok()?;
    Some(serde_json::from_reader::<_, Job>(io::Read::take(job, PLAN_MAX)).ok()?.plan.boot_id)
}

/// Puts a shim that was just started into a control group with its VM's limits; processes that it starts from then on are in it too.
fn limit(plan: &LaunchPlan, pid: u32) {
    if !plan.jail {
        return;
    }
    let Some(name) = cgroup::name_of(&plan.directory) else { return };
    let groups = Groups::look();
    let lacking = groups.limit(&name, Limits::of(plan));
    if !lacking.is_empty() {
        tracing::debug!(vm = %plan.name, ?lacking, "some limits could not be set");
    }
    if let Err(error) = groups.put(&name, pid) {
        tracing::warn!(vm = %plan.name, %error, "cannot put a VM into its control group: it runs without limits");
    }
}

/// Puts the VMM into its shim's control group, in case it was started before the shim was in it. Runs in the background.
fn limit_vmm(plan: &LaunchPlan, pid: u32) {
    let (directory, limited) = (plan.directory.clone(), plan.jail);
    tokio::task::spawn_blocking(move || {
        if let Some(name) = cgroup::name_of(&directory).filter(|_| limited)
            && let Err(error) = Groups::look().put(&name, pid)
        {
            tracing::debug!(%error, "cannot put a VMM into its control group");
        }
    });
}

/// Removes what a jail leaves on the disk, since its shim is not root any more. Its mounts ended with the shim.
fn remove_jail(directory: &Path) {
    if let Err(error) = super::jail::remove(&directory.join(vm_files::JAIL)) {
        tracing::warn!(directory = %directory.display(), %error, "cannot remove a jail");
    }
    if let Some(name) = cgroup::name_of(directory) {
        Groups::look().remove(&name);
    }
}

/// Removes the sockets and the jail that a VM left in its directory: its shim has no permission to, or was killed. Call it only while no shim
/// runs there.
pub(crate) fn remove_sockets(directory: &Path) {
    remove_jail(directory);
    for name in shim::sockets().chain([vm_files::HELLO, vm_files::EGRESS]) {
        match std::fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(directory = %directory.display(), name, %error, "cannot remove a socket");
            }
            _ => {}
        }
    }
}

/// A shim that has not reported yet. It is killed on drop.
struct Starting {
    handle: Option<ProcessHandle>,
    report: pipe::Receiver,
    keep: bool,
}

impl Starting {
    async fn launched(&mut self) -> io::Result<Option<Launched>> {
        let mut line = Vec::new();
        BufReader::new((&mut self.report).take(LINE_MAX as u64)).read_until(b'\n', &mut line).await?;
        Ok(serde_json::from_slice(&line).ok())
    }

    fn kill(&self) {
        if let Some(handle) = &self.handle
            && let Err(error) = handle.kill()
        {
            tracing::error!(pid = handle.pid(), %error, "cannot kill a shim that did not report");
        }
    }

    async fn ended(&mut self) {
        let Some(handle) = self.handle.take() else { return };
        match handle.watched() {
            Ok(fd) => {
                if !gone_within(&fd, LEAVE).await {
                    self.handle = Some(fd.into_inner());
                }
            }
            Err(error) => tracing::error!(%error, "cannot wait for a shim"),
        }
    }

    fn failed(&self, plan: &LaunchPlan, exit: Option<Exit>) -> VmmError {
        let exit = exit.unwrap_or_else(|| {
            let mut said = Vec::new();
            if let Ok(log) = regular::open(&plan.directory.join(vm_files::SHIM_LOG)) {
                // A failed read only shortens the message.
                let _ = io::Read::read_to_end(&mut io::Read::take(log, 2 * SHIM_LOG_MAX), &mut said);
            }
            let said = String::from_utf8_lossy(&said[said.len().saturating_sub(TAIL)..]).trim().to_owned();
            Exit { message: format!("the shim ended without a report: {said}"), ..Exit::lost() }
        });
        let tail =
            |name| String::from_utf8_lossy(&log::tail(&plan.directory, name, TAIL)).trim_end().to_owned();
        VmmError::Launch {
            driver: plan.driver.as_str(),
            exit,
            vmm_log: tail(vm_files::VMM_LOG),
            console: tail(vm_files::CONSOLE),
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if !self.keep {
            self.kill();
        }
    }
}

/// Prepares a VM's directory and starts its shim. Blocks for milliseconds.
fn start(shim_binary: &Path, plan: &LaunchPlan) -> Result<Starting, VmmError> {
    let directory = &plan.directory;
    let failed = |action, name: &str| {
        let path = directory.join(name);
        move |source| VmmError::File { action, path, source }
    };
    if holder_that_stays(directory).map_err(failed("check", vm_files::SHIM_LOCK))?.is_some() {
        return Err(VmmError::AlreadyRunning { directory: directory.clone() });
    }
    regular::take_back(directory).map_err(failed("take ownership of", ""))?;
    for name in shim::sockets().chain([vm_files::EXIT]) {
        match std::fs::remove_file(directory.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", name)(e)),
            _ => {}
        }
    }
    let tsc_khz = if plan.accel == Accel::Tcg { tsc::khz() } else { None };
    let job = wire::write_numbered(&Job { plan: plan.clone(), tsc_khz });
    job.map_err(io::Error::from)
        .and_then(|job| exit::write_atomic(&directory.join(vm_files::PLAN), &job, false))
        .map_err(failed("write", vm_files::PLAN))?;
    let log = open_shim_log(directory).map_err(failed("open", vm_files::SHIM_LOG))?;

    let spawn_failed = |source| VmmError::Spawn { binary: shim_binary.to_owned(), source };
    let mut child = process::spawn_shim(shim_binary, directory, log).map_err(spawn_failed)?;
    let handle = ProcessHandle::of_child(&child).map_err(spawn_failed);
    limit(plan, child.id());
    let stdout = child.stdout.take().map(OwnedFd::from);
    let report = stdout.ok_or_else(|| io::ErrorKind::BrokenPipe.into()).and_then(|fd| {
        process::set_nonblocking(&fd)?;
        pipe::Receiver::from_owned_fd(fd)
    });
    // A shim is this process's child until one of the two ends, so it must be reaped. This waits for as long as the VM runs, in a task that
    // does not keep the runtime from shutting down.
    reap_in_background(child).map_err(spawn_failed)?;
    Ok(Starting { handle: Some(handle?), report: report.map_err(spawn_failed)?, keep: false })
}

/// Returns the shim that runs in a directory and does not end within a second. A shim whose launch was given up ends in that time.
fn holder_that_stays(directory: &Path) -> io::Result<Option<Holder>> {
    const LEAVE: Duration = Duration::from_secs(1);
    let Some(holder) = shim::read_holder(directory)? else { return Ok(None) };
    if let Holder::Known(identity) = holder
        && let Some(handle) = ProcessHandle::open_identified(identity.pid, identity.start_time)?
        && !handle.wait_ended(LEAVE)?
    {
        return Ok(Some(holder));
    }
    shim::read_holder(directory)
}

/// Returns the shim that runs in a directory, whatever boot it is of, and does not end within a second. Blocks for that time at most. One that has not
/// written its identity yet counts as none.
pub(crate) fn shim_that_stays(directory: &Path) -> io::Result<Option<ShimIdentity>> {
    Ok(match holder_that_stays(directory)? {
        Some(Holder::Known(identity)) => Some(identity),
        Some(Holder::Unknown) | None => None,
    })
}

fn reap_in_background(mut child: std::process::Child) -> io::Result<()> {
    tokio::spawn(async move {
        let ended = match ProcessHandle::of_child(&child).and_then(ProcessHandle::watched) {
            Ok(handle) => {
                gone(&handle).await;
                child.wait()
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::warn!(pid = child.id(), %error, "cannot reap a shim");
        }
    });
    Ok(())
}

fn open_shim_log(directory: &Path) -> io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = directory.join(vm_files::SHIM_LOG);
    let file = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    if file.metadata()?.len() > SHIM_LOG_MAX {
        file.set_len(0)?;
    }
    Ok(file)
}

/// Waits until a process has ended.
pub(super) async fn gone(handle: &AsyncFd<ProcessHandle>) {
    // A pidfd becomes readable when its process has ended, and stays readable.
    if let Err(error) = handle.readable().await {
        tracing::error!(%error, "cannot wait for a process");
    }
}

async fn gone_within(handle: &AsyncFd<ProcessHandle>, limit: Duration) -> bool {
    timeout(limit, gone(handle)).await.is_ok()
}

/// Reads the next reply on a connection to a shim.
pub(super) async fn next_reply(stream: &mut BufReader<UnixStream>) -> io::Result<Reply> {
    let mut answer = Vec::new();
    stream.take(LINE_MAX as u64).read_until(b'\n', &mut answer).await?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&answer)?)
}
