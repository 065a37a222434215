//! Adoption of shims that an earlier daemon launched.
//!
//! A running shim that does not answer is slow, not dead: its VM is still running. So nothing is killed here. The shim is adopted without an
//! answer, and [`ShimClient::answered`] resolves when it answers.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::control::{Reply, Request, ShimIdentity, Stall, Status, VmmError};
use super::known;
use super::shim::{self, Holder};
use super::shim_client::{Inner, ShimClient, gone, next_reply};
use super::wire;
use crate::os::process::{self, ProcessHandle};

/// Timeout of the daemon's start for a shim's first answer. On an idle host a shim answers within a millisecond.
const FIRST_ANSWER: Duration = Duration::from_secs(3);
/// Length of the queue of changes of a stall.
const STALLS_MAX: usize = 8;
/// Delay before a shim is asked again after a failed request.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl ShimClient {
    /// Adopts a shim that an earlier daemon launched. `None` means that it does not run any more: the process has ended, is a
    /// zombie, or is another one with the same pid. A shim that does not answer in time is adopted anyway; see
    /// [`ShimClient::silence`].
    pub async fn adopt(directory: &Path, identity: ShimIdentity) -> Result<Option<Self>, VmmError> {
        let Some(shim) = Self::hold(directory, identity, None)? else { return Ok(None) };
        tokio::select! {
            biased;
            () = gone(&shim.inner.shim) => Ok(None),
            _ = timeout(FIRST_ANSWER, shim.answered()) => {
                // The VMM in its answer is more reliable than the one found in /proc.
                let status = shim.inner.status.get().cloned();
                match status {
                    Some(status) => Self::hold(directory, identity, Some(status)),
                    None => Ok(Some(shim)),
                }
            }
        }
    }

    /// Returns the shim that runs in a directory, if any: for a daemon that was killed before it could record the shim. A shim that
    /// has only just started and has not written its identity counts as none; it ends by itself, since its daemon is gone.
    pub fn discover(directory: &Path) -> Result<Option<ShimIdentity>, VmmError> {
        match shim::read_holder(directory) {
            Ok(Some(Holder::Known(identity))) => Ok(Some(identity)),
            Ok(Some(Holder::Unknown) | None) => Ok(None),
            Err(source) => {
                Err(VmmError::File { action: "look for a shim in", path: directory.to_owned(), source })
            }
        }
    }

    /// Returns why the shim's state is unknown; `None` once it has answered.
    pub fn silence(&self) -> Option<String> {
        if self.inner.status.get().is_some() {
            return None;
        }
        let pid = self.inner.identity.pid;
        Some(match self.inner.newer.get() {
            Some(protocol) => format!(
                "its shim (process {pid}) speaks protocol {protocol}, this nexusd supports only {} to {}; \
                 start the newer nexusd again, or stop the VM",
                wire::PROTOCOL_MIN,
                wire::PROTOCOL
            ),
            None => format!("its shim (process {pid}) is running but has not answered since nexusd started"),
        })
    }

    /// Resolves when the shim has answered; at once if it already has. Never resolves if the shim is newer than this daemon or ends.
    pub async fn answered(&self) {
        while self.inner.status.get().is_none() {
            match self.first_answer().await {
                Ok(status) if status.protocol > wire::PROTOCOL => {
                    self.inner.newer.set(status.protocol).ok();
                    std::future::pending().await
                }
                Ok(status) => {
                    self.inner.status.set(status).ok();
                }
                Err(error) => {
                    tracing::debug!(pid = self.inner.identity.pid, %error, "a shim gave no answer");
                    sleep(ASK_AGAIN).await;
                }
            }
        }
    }

    /// Receives why the VMM has paused the guest: the current state and each change, until the shim ends or the receiver is dropped. A
    /// shim of generation 1 does not report it.
    pub fn stalls(&self) -> mpsc::Receiver<Option<Stall>> {
        let (tell, told) = mpsc::channel(STALLS_MAX);
        let shim = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = gone(&shim.inner.shim) => {}
                () = tell.closed() => {}
                () = shim.tell_stalls(&tell) => {}
            }
        });
        told
    }

    async fn tell_stalls(&self, tell: &mpsc::Sender<Option<Stall>>) {
        self.answered().await;
        while self.inner.status.get().is_some_and(|status| status.protocol >= 2) {
            let watched = async {
                let mut stream = self.send(Request::Watch).await?;
                loop {
                    match next_reply(&mut stream).await? {
                        Reply::Stalled(stall) => tell.send(stall).await.map_err(io::Error::other)?,
                        other => return Err(io::Error::other(format!("another answer: {other:?}"))),
                    }
                }
            };
            let ended: io::Result<()> = watched.await;
            tracing::debug!(pid = self.inner.identity.pid, error = ?ended.err(), "a shim's report of stalls ended");
            sleep(ASK_AGAIN).await;
        }
    }

    /// Asks for the shim's status, without a timeout: a slow shim answers late.
    async fn first_answer(&self) -> io::Result<Status> {
        let mut stream = self.send(Request::Status).await?;
        let identity = self.inner.identity;
        match next_reply(&mut stream).await? {
            Reply::Status(status)
                if status.pid == identity.pid && status.start_time == identity.start_time =>
            {
                Ok(status)
            }
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("another answer: {other:?}"))),
        }
    }

    /// Returns the client of a shim that has just reported its launch.
    pub(super) fn hold_launched(directory: &Path, status: Status) -> Result<Option<Self>, VmmError> {
        let identity = ShimIdentity { pid: status.pid, start_time: status.start_time };
        Self::hold(directory, identity, Some(status))
    }

    fn hold(
        directory: &Path,
        identity: ShimIdentity,
        status: Option<Status>,
    ) -> Result<Option<Self>, VmmError> {
        let open = |source| VmmError::File { action: "hold the shim of", path: directory.to_owned(), source };
        let Some(shim) = ProcessHandle::open_identified(identity.pid, identity.start_time).map_err(open)?
        else {
            return Ok(None);
        };
        known::meet(identity);
        let vmm = match &status {
            Some(status) => ProcessHandle::open_identified(status.vmm.pid, status.vmm_start_time),
            None => only_child(identity.pid),
        };
        let vmm = vmm.map_err(open)?.map(ProcessHandle::watched).transpose().map_err(open)?;
        let shim = shim.watched().map_err(open)?;
        let status = status.map_or_else(OnceLock::new, OnceLock::from);
        let directory = directory.to_owned();
        Ok(Some(Self {
            inner: Arc::new(Inner { directory, identity, status, newer: OnceLock::new(), shim, vmm }),
        }))
    }
}

/// Returns the only child of a shim that does not answer: its VMM. `None` if the kernel does not list children, or if there is not exactly one.
fn only_child(shim: u32) -> io::Result<Option<ProcessHandle>> {
    let Ok(children) = std::fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")) else {
        return Ok(None);
    };
    let mut children = children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok());
    let (Some(pid), None) = (children.next(), children.next()) else { return Ok(None) };
    let Some(handle) = ProcessHandle::open(pid)? else { return Ok(None) };
    let is_child = process::stat(pid)?.is_some_and(|stat| stat.parent == shim);
    Ok(Some(handle).filter(|_| is_child))
}
