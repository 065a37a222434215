//! The daemon's side of a shim: launching it, finding it again, asking it, and knowing when it is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nexus_schema::id::BootId;
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

/// How long a launch may take in all; the VMM's own share is shorter.
const LAUNCH: Duration = Duration::from_secs(60);
/// How long a shim may take to answer what it knows by itself.
const ANSWER: Duration = Duration::from_secs(3);
/// How long a shim may take to answer what it has to ask the VMM for.
const ANSWER_OF_VMM: Duration = Duration::from_secs(8);
/// How long a shim may take to be gone after its VMM was killed, until it is killed too.
const LEAVE: Duration = Duration::from_secs(5);
/// How much of the VMM's log and of the console goes into an error, in bytes.
const TAIL: usize = 4 << 10;
/// How long a plan's file is at most, in bytes.
const PLAN_MAX: u64 = 1 << 20;
/// Where a shim's own log begins anew, in bytes.
const SHIM_LOG_MAX: u64 = 64 << 10;

/// One live shim and the VMM under it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ShimClient {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) directory: PathBuf,
    pub(super) identity: ShimIdentity,
    /// What the shim said of itself; empty until it has answered.
    pub(super) status: OnceLock<Status>,
    /// The generation of a shim that is newer than this daemon, and so cannot be talked to.
    pub(super) newer: OnceLock<u32>,
    pub(super) shim: AsyncFd<ProcessHandle>,
    /// `None`: gone when it was looked for.
    pub(super) vmm: Option<AsyncFd<ProcessHandle>>,
}

impl ShimClient {
    /// Launches a VM; returns once the VMM runs and took its configuration.
    ///
    /// The plan's directory must exist and hold no live shim. What an earlier one left there is removed first; its logs stay.
    /// If the future is dropped before it is done, the VM is ended.
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
        let launched = timeout(LAUNCH, starting.launched()).await;
        match launched {
            Ok(Ok(Some(Launched::Running(status)))) => {
                limit_vmm(plan, status.vmm.pid);
                let shim = Self::hold_launched(&plan.directory, status)?;
                starting.keep = true;
                match shim {
                    Some(shim) => Ok(shim),
                    // It ended between its report and this line.
                    None => Err(starting.failed(plan, read_exit(&plan.directory))),
                }
            }
            Ok(Ok(Some(Launched::Failed(exit)))) => {
                // The directory is free for the next try once the shim is gone.
                starting.ended().await;
                Err(starting.failed(plan, Some(exit)))
            }
            Ok(Ok(None) | Err(_)) => {
                // Nothing was said: it died, and its log may say more than nothing.
                starting.ended().await;
                Err(starting.failed(plan, read_exit(&plan.directory)))
            }
            Err(_) => {
                starting.kill();
                starting.ended().await;
                Err(VmmError::LaunchTimeout { driver: plan.driver.as_str(), seconds: LAUNCH.as_secs() })
            }
        }
    }

    /// Which process the shim is; to be kept for [`ShimClient::adopt`].
    pub fn identity(&self) -> ShimIdentity {
        self.inner.identity
    }

    /// The VMM under it; `None` until the shim has answered.
    pub fn vmm(&self) -> Option<&VmmInfo> {
        self.inner.status.get().map(|status| &status.vmm)
    }

    /// The boot that it was launched for; `None` until the shim has answered.
    pub fn boot_id(&self) -> Option<BootId> {
        self.inner.status.get().map(|status| status.boot_id)
    }

    /// Asks the guest through the VMM to shut down, as pressing a button would. Not every guest listens: see
    /// [`Caps::can_ask_guest`](super::Caps).
    pub async fn shutdown(&self) -> Result<(), VmmError> {
        self.request(Request::Shutdown, "ask the guest to shut down").await
    }

    /// Stops the guest's processors.
    pub async fn pause(&self) -> Result<(), VmmError> {
        self.request(Request::Pause, "pause").await
    }

    /// Lets the guest's processors go on.
    pub async fn resume(&self) -> Result<(), VmmError> {
        self.request(Request::Resume, "resume").await
    }

    /// Lets the guest see that a drive has grown: the one at `index` of the plan, whose file is `bytes` long by now.
    pub async fn resize_drive(&self, index: usize, bytes: u64) -> Result<(), VmmError> {
        self.request(Request::ResizeDrive { index, bytes }, "resize a drive").await
    }

    async fn request(&self, request: Request, action: &'static str) -> Result<(), VmmError> {
        let unanswered = |source| VmmError::Unanswered { pid: self.inner.identity.pid, action, source };
        match self.ask(request, ANSWER_OF_VMM).await.map_err(unanswered)? {
            Reply::Refused(message) => Err(VmmError::Refused { action, message }),
            Reply::Done => Ok(()),
            Reply::Status(_) | Reply::Ended(_) | Reply::Stalled(_) => {
                Err(unanswered(io::ErrorKind::InvalidData.into()))
            }
        }
    }

    /// Asks one thing, in the words of the shim's generation.
    async fn ask(&self, request: Request, limit: Duration) -> io::Result<Reply> {
        let exchange = async {
            let mut stream = self.send(request).await?;
            next_reply(&mut stream).await
        };
        timeout(limit, exchange).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Sends a request; the replies come on the connection.
    pub(super) async fn send(&self, request: Request) -> io::Result<BufReader<UnixStream>> {
        // One that has not answered is asked in the oldest words.
        let protocol = self.inner.status.get().map_or(wire::PROTOCOL_MIN, |status| status.protocol);
        let line = wire::request_line(request, protocol).map_err(io::Error::other)?;
        let mut stream = connect_in_tokio(&self.inner.directory, vm_files::SHIM).await?;
        stream.write_all(&line).await?;
        Ok(BufReader::new(stream))
    }

    /// Ends the VMM at once. Works also when the shim hangs or is gone. A VMM that has ended already is fine; [`ShimClient::wait`] tells
    /// when everything is gone.
    pub async fn kill(&self) -> Result<(), VmmError> {
        // Through the shim, so that it notes that it was asked for.
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
            tracing::warn!(pid = self.inner.identity.pid, "a shim did not end with its VMM, and is killed");
            self.inner.shim.get_ref().kill().map_err(failed)?;
        }
        Ok(())
    }

    /// Resolves when shim and VMM are gone, and tells how the VMM ended. May be called any number of times and dropped at any
    /// time.
    pub async fn wait(&self) -> Exit {
        gone(&self.inner.shim).await;
        if let Some(vmm) = &self.inner.vmm {
            // It dies with its shim; if the shim could not see to it, it is seen to here.
            if !gone_within(vmm, Duration::from_secs(1)).await {
                if let Err(error) = vmm.get_ref().kill() {
                    tracing::error!(pid = vmm.get_ref().pid(), %error, "a VMM without a shim cannot be killed");
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

/// The boot that a VM's directory was last made ready for; its logs and its `exit.json` are of this one.
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

/// Puts a shim that was just started into a group with its VM's limits; what it starts from then on is in it too.
fn limit(plan: &LaunchPlan, pid: u32) {
    if !plan.jail {
        return;
    }
    let Some(name) = cgroup::name_of(&plan.directory) else { return };
    let groups = Groups::look();
    let lacking = groups.limit(&name, Limits::of(plan));
    if !lacking.is_empty() {
        tracing::debug!(vm = %plan.name, ?lacking, "limits that could not be set");
    }
    if let Err(error) = groups.put(&name, pid) {
        tracing::warn!(vm = %plan.name, %error, "a VM runs without limits");
    }
}

/// Puts the VMM into its shim's group, if it was started before the shim was there. Nobody waits for it.
fn limit_vmm(plan: &LaunchPlan, pid: u32) {
    let (directory, limited) = (plan.directory.clone(), plan.jail);
    tokio::task::spawn_blocking(move || {
        if let Some(name) = cgroup::name_of(&directory).filter(|_| limited)
            && let Err(error) = Groups::look().put(&name, pid)
        {
            tracing::debug!(%error, "a VMM is not in its group");
        }
    });
}

/// Removes what a jail leaves on the disk: its shim is not root any more, and its mounts are gone with it.
fn remove_jail(directory: &Path) {
    if let Err(error) = super::jail::remove(&directory.join(vm_files::JAIL)) {
        tracing::warn!(directory = %directory.display(), %error, "a jail is left behind");
    }
    if let Some(name) = cgroup::name_of(directory) {
        Groups::look().remove(&name);
    }
}

/// Removes the sockets and the jail that a VM left in its directory: its shim may not, or was killed. Only while no shim lives there.
pub(crate) fn remove_sockets(directory: &Path) {
    remove_jail(directory);
    for name in shim::sockets().chain([vm_files::HELLO, vm_files::EGRESS]) {
        match std::fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(directory = %directory.display(), name, %error, "a socket is left behind");
            }
            _ => {}
        }
    }
}

/// A shim that has not reported yet. Dropped, it is killed.
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
            tracing::error!(pid = handle.pid(), %error, "a shim that did not report cannot be killed");
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
                // What cannot be read is not told.
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

/// Makes a VM's directory ready and starts its shim. Blocks for milliseconds.
fn start(shim_binary: &Path, plan: &LaunchPlan) -> Result<Starting, VmmError> {
    let directory = &plan.directory;
    let failed = |action, name: &str| {
        let path = directory.join(name);
        move |source| VmmError::File { action, path, source }
    };
    if is_taken(directory).map_err(failed("look at", vm_files::SHIM_LOCK))? {
        return Err(VmmError::AlreadyRunning { directory: directory.clone() });
    }
    regular::take_back(directory).map_err(failed("take back", ""))?;
    for name in shim::sockets().chain([vm_files::EXIT]) {
        match std::fs::remove_file(directory.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", name)(e)),
            _ => {}
        }
    }
    let tsc_khz = if plan.accel == Accel::Tcg { tsc::khz() } else { None };
    let job = wire::write_numbered(&Job { plan: plan.clone(), tsc_khz });
    job.map_err(io::Error::from)
        .and_then(|job| exit::write_atomic(directory, vm_files::PLAN, &job, false))
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
    // A shim is this process's child until one of the two ends: someone must reap it. In a plain thread: it waits for as long as
    // the VM runs, and must not keep a runtime from shutting down.
    reap_in_background(child).map_err(spawn_failed)?;
    Ok(Starting { handle: Some(handle?), report: report.map_err(spawn_failed)?, keep: false })
}

/// Whether a shim lives in a directory and does not go within a second, as one does whose launch was given up.
fn is_taken(directory: &Path) -> io::Result<bool> {
    const LEAVE: Duration = Duration::from_secs(1);
    let Some(holder) = shim::read_holder(directory)? else { return Ok(false) };
    if let Holder::Known(identity) = holder
        && let Some(handle) = ProcessHandle::open_identified(identity.pid, identity.start_time)?
        && !handle.wait_ended(LEAVE)?
    {
        return Ok(true);
    }
    Ok(shim::read_holder(directory)?.is_some())
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
            tracing::warn!(pid = child.id(), %error, "a shim cannot be reaped");
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

/// Resolves when a process has ended.
pub(super) async fn gone(handle: &AsyncFd<ProcessHandle>) {
    // The only thing that a pidfd ever has to tell; it stays readable.
    if let Err(error) = handle.readable().await {
        tracing::error!(%error, "cannot wait for a process");
    }
}

async fn gone_within(handle: &AsyncFd<ProcessHandle>, limit: Duration) -> bool {
    timeout(limit, gone(handle)).await.is_ok()
}

/// The next reply on a connection to a shim.
pub(super) async fn next_reply(stream: &mut BufReader<UnixStream>) -> io::Result<Reply> {
    let mut answer = Vec::new();
    stream.take(LINE_MAX as u64).read_until(b'\n', &mut answer).await?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&answer)?)
}
