//! The sleep of VMs from outside of their tasks: calls that wake one, and what a daemon that ended left of it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};

use super::policy;
use super::recover::orphans;
use super::wait::{ask, until_ready};
use crate::context::{Command, Handle, Shared, View};
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::remove;
use crate::progress::Progress;
use crate::store::vms::{self, VmRecord};

/// Wakes a VM if it sleeps, and waits until its guest's tools can be called; at most for `limit`. Returns how long that took, or `None` of one that does
/// not sleep. `what` is for its history: what it is woken for.
pub(crate) async fn wake(
    handle: &Handle,
    who: &str,
    what: &str,
    limit: Duration,
) -> Result<Option<Duration>, ToolError> {
    if !policy::is_asleep(&handle.view.borrow().record) {
        return Ok(None);
    }
    let _busy = handle.activity.begin();
    let begun = Instant::now();
    let woken = async {
        let mut view = handle.view.clone();
        // One that is falling asleep has to be down first.
        let is_down = |view: &View| view.deleted || view.record.state != VmState::Stopping;
        if view.wait_for(is_down).await.is_err() {
            return Err(ToolError::new(ErrorCode::ShuttingDown, "the daemon is shutting down"));
        }
        let (who, why, asked) = (who.to_owned(), format!("woken for {what}"), Instant::now());
        let boot = ask(handle, |reply| Command::Wake { who, why, asked, reply }).await?;
        until_ready(&mut view, boot, &Progress::default()).await
    };
    match tokio::time::timeout(limit, woken).await {
        Ok(done) => done.map(|()| Some(begun.elapsed())),
        Err(_) => {
            let name = handle.view.borrow().record.name.clone();
            let message = format!("{name} was not awake within {} s", limit.as_secs());
            Err(ToolError::new(ErrorCode::Timeout, message)
                .hint("it goes on waking: call again; vm_inspect shows its state"))
        }
    }
}

/// Whether an earlier daemon ended while it woke this VM, so that its guest has not gone on from the saved memory. The nonce that it would prove itself
/// with is lost.
pub(super) fn is_unfinished(shared: &Shared, record: &VmRecord) -> bool {
    let Some(memory) = &record.suspended else { return false };
    let is_renewed = record.guest.as_ref().is_some_and(|guest| guest.configured);
    // Without the files it was ready, and that could not be recorded.
    let is_there = || shared.paths.suspended(memory.manifest.checkpoint).join(checkpoint_files::RAM).exists();
    matches!(record.state, VmState::Starting | VmState::Running) && !is_renewed && is_there()
}

/// For the start of the daemon: removes saved memories that no VM is to be woken with, but what is `unknown` and kept.
pub(super) async fn sweep(shared: &Shared, unknown: &HashSet<String>) -> Result<(), ToolError> {
    let all = shared.store.read(vms::all).await.map_err(store_error)?;
    let memories = all.iter().filter_map(|vm| vm.suspended.as_ref());
    let memories = memories.map(|memory| memory.manifest.checkpoint.to_string());
    let kept = memories.chain(unknown.iter().cloned()).collect();
    let directory = shared.paths.all_suspended();
    for name in orphans(&directory, &kept) {
        tracing::info!(name, "removing the memory of a vm that is not suspended");
        remove::tree(&directory.join(name)).await;
    }
    Ok(())
}
