//! A VM's part in a checkpoint: its commands stand still, its VMM saves the memory, and the drives are copied while the guest is paused. All of that is
//! one moment for the guest.
//!
//! ```text
//! quiesce ─> save: paused, memory and devices written ─> drives copied, the hold renewed ─> release ─> thaw
//! ```
//! The shim lets the guest go on by itself if this daemon does not renew the hold. A guest that is not told to let its commands go on asks for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use nexus_schema::link::{ClockParams, QUIESCE_REQUEST, QUIET_MAX, Quiesced, THAW_REQUEST};
use nexus_schema::{ErrorCode, ToolError};
use serde_json::value::{RawValue, to_raw_value};
use tokio::task::JoinHandle;

use super::Actor;
use crate::context::{Shared, Take, Taken, drive_error};
use crate::drive::{DISK, DriveError, copy_file};
use crate::guest::Link;
use crate::os::failpoint;
use crate::os::paths::checkpoint_files;
use crate::progress::Progress;
use crate::store::drives::DriveRecord;
use crate::vm::checkpoint::bounded;
use crate::vm::policy;
use crate::vmm::{Saved, ShimClient, VmmError};

/// Timeout of a guest to stop its commands and to sync.
const QUIESCE_MAX: Duration = Duration::from_secs(8);
/// Timeout of a guest to let its commands go on.
const THAW_MAX: Duration = Duration::from_secs(10);
/// How long the shim keeps the guest paused after it last heard of this daemon.
pub(in crate::vm) const HOLD: Duration = Duration::from_secs(30);
/// The interval in which it hears of it.
pub(super) const RENEW: Duration = Duration::from_secs(5);
/// How long a guest stands still at most while its drives are copied.
pub(super) const COPY_MAX: Duration = Duration::from_secs(60);
/// Timeout for a copy to end that nobody wants any more.
const STOP_MAX: Duration = Duration::from_secs(20);

impl Actor {
    /// Saves the memory of the VM and copies its drives. Whatever happens, the VM goes on afterwards.
    pub(super) async fn checkpoint(&mut self, take: &Take) -> Result<Taken, ToolError> {
        let name = self.record.name.clone();
        self.same_boot(take.if_boot)?;
        policy::checkpoint(name.as_str(), self.record.state)?;
        policy::checkpointable(&self.record)?;
        // Nobody resizes or copies them meanwhile.
        let _locked = self.lock_drives().await?;
        let Some(boot) = &mut self.boot else {
            return Err(ToolError::internal(format!("{name} is ready, but has no boot")));
        };
        if boot.bye.is_some() {
            let message = format!("{name} is going down: its guest has said goodbye");
            return Err(ToolError::new(ErrorCode::VmWrongState, message).hint("wait until it is stopped"));
        }
        take.progress.step("stopping the guest's commands");
        let quiet_since = Instant::now();
        let quiesced = match &boot.link {
            Some(link) => quiesce(link).await,
            None => Quiesced::default(),
        };
        failpoint::reach("checkpoint-quiet");
        boot.hold();
        take.progress.step("saving the memory");
        let paused = Instant::now();
        let saved = save_all(&self.shared, &boot.shim, &self.drives, take).await;
        if let Err(error) = boot.shim.release_guest().await {
            tracing::warn!(vm = %name, %error, "cannot resume a vm after its checkpoint; its shim does it");
        }
        let pause_ms = u64::try_from(paused.elapsed().as_millis()).unwrap_or(u64::MAX);
        failpoint::reach("checkpoint-released");
        boot.let_go(&self.shared, &self.record);
        let interface = boot.has_interface;
        if let Some(link) = &boot.link {
            thaw(link).await;
        }
        let (saved, saved_at) = saved?;
        // The guest's own lease must not end in a restored VM before that VM has to have renewed everything.
        let written = Duration::from_millis(saved.state_ms.saturating_add(saved.ram_ms));
        let ran_quiet = saved_at.duration_since(quiet_since).saturating_sub(written);
        let processes = bounded(quiesced.processes);
        let quiesced = quiesced.frozen && quiesced.synced && ran_quiet < QUIET_MAX / 2;
        let (record, drives) = (self.record.clone(), self.drives.clone());
        Ok(Taken { saved, record, drives, interface, quiesced, processes, pause_ms })
    }
}

/// Has the guest stop its commands and sync, as far as it does that in time. One that does not is copied as it is.
pub(in crate::vm) async fn quiesce(link: &Link) -> Quiesced {
    let Ok(none) = RawValue::from_string("{}".into()) else { return Quiesced::default() };
    match link.request(QUIESCE_REQUEST, &none, QUIESCE_MAX).await {
        Ok(answer) => serde_json::from_str(answer.get()).unwrap_or_default(),
        Err(error) => {
            tracing::info!(%error, "a guest does not stand still for a copy of its drives");
            Quiesced::default()
        }
    }
}

/// Sets the guest's clock and lets its commands go on. If that fails, the guest asks for it after a while.
pub(in crate::vm) async fn thaw(link: &Link) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time_unix_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    let Ok(params) = to_raw_value(&ClockParams { time_unix_ns, add_ns: None }) else { return };
    if let Err(error) = link.request(THAW_REQUEST, &params, THAW_MAX).await {
        tracing::warn!(%error, "a guest was not told to go on after a copy of its drives");
    }
}

/// Has the VMM save the memory, then copies the drives, while the guest is paused. Also returns when the memory was saved.
async fn save_all(
    shared: &Shared,
    shim: &Arc<ShimClient>,
    drives: &[DriveRecord],
    take: &Take,
) -> Result<(Saved, Instant), ToolError> {
    let (saved, held_until) = save_held(shim, &take.directory).await?;
    let saved_at = Instant::now();
    failpoint::reach("checkpoint-saved");
    take.progress.step("copying the drives");
    let copies = take.directory.join(checkpoint_files::DRIVES);
    let files: Vec<(PathBuf, PathBuf)> = drives
        .iter()
        .map(|drive| (shared.paths.drive(drive.id).join(DISK), copies.join(format!("{}.ext4", drive.id))))
        .collect();
    copy_held(files, held_by(shim), held_until, COPY_MAX, &take.progress).await?;
    failpoint::reach("checkpoint-copied");
    Ok((saved, saved_at))
}

/// Has the VMM save the memory. Also returns until when the guest is held at least: this daemon may hear of the save long after it was made.
pub(super) async fn save_held(shim: &ShimClient, directory: &Path) -> Result<(Saved, Instant), ToolError> {
    let asked = Instant::now();
    let saved = shim.save(directory, HOLD).await.map_err(|error| save_failed(&error))?;
    // The time of the hold begins anew once all is written.
    let written = Duration::from_millis(saved.state_ms.saturating_add(saved.ram_ms));
    Ok((saved, asked + written + HOLD))
}

/// Has a shim keep its guest paused for another [`HOLD`], each time that it is called.
pub(super) fn held_by(shim: &Arc<ShimClient>) -> impl Fn() -> BoxFuture<'static, Result<(), ToolError>> {
    let shim = shim.clone();
    move || -> BoxFuture<'static, Result<(), ToolError>> {
        let shim = shim.clone();
        Box::pin(async move { shim.hold_guest(HOLD).await.map_err(|error| hold_failed(&error)) })
    }
}

/// Copies files while a guest is paused, until then: `renew` makes its shim pause it for another [`HOLD`]. Takes at most `most`, and ends once nothing
/// writes to the copies any more, also if it fails.
pub(super) async fn copy_held(
    files: Vec<(PathBuf, PathBuf)>,
    renew: impl Fn() -> BoxFuture<'static, Result<(), ToolError>>,
    held_until: Instant,
    most: Duration,
    progress: &Progress,
) -> Result<(), ToolError> {
    let deadline = tokio::time::Instant::now() + most;
    let watched = Progress::default();
    // Cancelled, too, if this is not waited for any more.
    let stop = watched.token().clone().drop_guard();
    let mut copying = tokio::task::spawn_blocking(move || -> Result<(), DriveError> {
        files.iter().try_for_each(|(from, to)| copy_file(from, to, &watched))
    });
    let copied = until_copied(&mut copying, renew, held_until, deadline, progress).await;
    drop(stop);
    if !copying.is_finished() && tokio::time::timeout(STOP_MAX, &mut copying).await.is_err() {
        tracing::error!("a copy of a drive does not end though nobody waits for it");
    }
    copied.map_err(|error| match error.code {
        ErrorCode::Timeout => error.hint(
            "put the state directory on a filesystem with reflinks (btrfs, XFS), which copies at once; drives of a stopped VM can be cloned with drive_create",
        ),
        _ => error,
    })
}

async fn until_copied(
    copying: &mut JoinHandle<Result<(), DriveError>>,
    renew: impl Fn() -> BoxFuture<'static, Result<(), ToolError>>,
    held_until: Instant,
    deadline: tokio::time::Instant,
    progress: &Progress,
) -> Result<(), ToolError> {
    // The hold began before the answer came, so it is renewed at once, also if the copies are quicker than that. If that is too late, the guest ran on.
    let mut held_until = renewed(renew(), held_until).await?;
    let mut renewals = tokio::time::interval_at((Instant::now() + RENEW).into(), RENEW);
    loop {
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => return Err(late("its drives could not be copied in time")),
            () = progress.cancelled() => {
                return Err(ToolError::new(ErrorCode::Cancelled, "the copies of the drives were cancelled"));
            }
            copied = &mut *copying => {
                copied.map_err(|e| ToolError::internal(format!("copy drives: {e}")))?.map_err(drive_error)?;
                break;
            }
            _ = renewals.tick() => held_until = renewed(renew(), held_until).await?,
        }
    }
    // Copies of drives to which the guest wrote meanwhile would be of no moment at all.
    in_time(held_until)
}

/// Waits for a renewal of a hold that lasts until then, and returns until when the new one does. One that comes too late fails: the guest ran in between.
pub(super) async fn renewed(
    renewal: impl Future<Output = Result<(), ToolError>>,
    held_until: Instant,
) -> Result<Instant, ToolError> {
    let asked = Instant::now();
    renewal.await?;
    in_time(held_until).map(|()| asked + HOLD)
}

/// Fails if a guest may have run since, which was held until then.
fn in_time(held_until: Instant) -> Result<(), ToolError> {
    match Instant::now() < held_until {
        true => Ok(()),
        false => Err(late("it could not be held for as long as necessary, because the host is too busy")),
    }
}

fn late(why: &str) -> ToolError {
    ToolError::new(ErrorCode::Timeout, format!("the guest runs on: {why}"))
}

/// The shim could not pause the guest, or not keep it paused.
pub(super) fn hold_failed(error: &VmmError) -> ToolError {
    let message = format!("pause the VM for a copy of its drives: {}", nexus_schema::error::chain(error));
    ToolError::new(ErrorCode::HostUnsuitable, message)
        .hint("the VM runs on; look at it with vm_inspect, then try again")
}

/// Returns the error of a save that failed.
pub(in crate::vm) fn save_failed(error: &VmmError) -> ToolError {
    let message = format!("save the VM's memory: {}", nexus_schema::error::chain(error));
    let is_full = message.contains("No space left") || message.contains("Disk quota exceeded");
    match is_full {
        true => ToolError::new(ErrorCode::DiskFull, message)
            .hint("free space on the host, for example with checkpoint_delete or prune; the VM runs on"),
        false => ToolError::new(ErrorCode::HostUnsuitable, message)
            .hint("the VM runs on; look at it with vm_inspect, then try again"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A file that takes some time to copy, and where its copy is to be.
    fn drive() -> (tempfile::TempDir, Vec<(PathBuf, PathBuf)>) {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        std::fs::write(&from, vec![7; 32 << 20]).unwrap();
        (directory, vec![(from, to)])
    }

    fn held(count: &Arc<AtomicU32>, works: bool) -> impl Fn() -> BoxFuture<'static, Result<(), ToolError>> {
        let count = count.clone();
        move || -> BoxFuture<'static, Result<(), ToolError>> {
            count.fetch_add(1, Ordering::Relaxed);
            let held = if works { Ok(()) } else { Err(ToolError::internal("the shim is gone")) };
            Box::pin(async move { held })
        }
    }

    #[tokio::test]
    async fn drives_are_copied_while_the_guest_is_held() {
        let (count, (_directory, files)) = (Arc::default(), drive());
        let to = files[0].1.clone();
        let until = Instant::now() + HOLD;
        copy_held(files, held(&count, true), until, COPY_MAX, &Progress::default()).await.unwrap();
        assert_eq!(std::fs::metadata(to).unwrap().len(), 32 << 20);
        assert!(count.load(Ordering::Relaxed) >= 1);
    }

    #[tokio::test]
    async fn a_first_renewal_that_comes_after_the_hold_fails_the_copies() {
        let (count, (_directory, files)) = (Arc::default(), drive());
        let past = Instant::now();
        let copied = copy_held(files, held(&count, true), past, COPY_MAX, &Progress::default()).await;
        assert!(copied.unwrap_err().message.contains("the guest runs on"));
    }

    #[tokio::test]
    async fn a_hold_that_is_renewed_too_late_has_let_the_guest_run() {
        let soon = Instant::now() + HOLD;
        assert!(renewed(async { Ok(()) }, soon).await.unwrap() >= soon);
        let past = Instant::now();
        assert_eq!(renewed(async { Ok(()) }, past).await.unwrap_err().code, ErrorCode::Timeout);
        let gone = async { Err(ToolError::internal("the shim is gone")) };
        assert_eq!(renewed(gone, soon).await.unwrap_err().code, ErrorCode::Internal);
    }

    #[tokio::test]
    async fn a_copy_that_is_not_wanted_any_more_has_ended_when_that_is_told() {
        let cancelled = Progress::default();
        cancelled.token().cancel();
        let cases = [
            (true, Duration::ZERO, Progress::default(), ErrorCode::Timeout),
            (true, COPY_MAX, cancelled, ErrorCode::Cancelled),
            (false, COPY_MAX, Progress::default(), ErrorCode::Internal),
        ];
        for (works, most, progress, code) in cases {
            let (count, (_directory, files)) = (Arc::default(), drive());
            let to = files[0].1.clone();
            let until = Instant::now() + HOLD;
            let error = copy_held(files, held(&count, works), until, most, &progress).await.unwrap_err();
            assert_eq!(error.code, code, "{error}");
            assert_eq!(error.hint.is_some_and(|hint| hint.contains("reflinks")), code == ErrorCode::Timeout);
            // Nothing writes to it any more.
            let length = std::fs::metadata(&to).map_or(0, |found| found.len());
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(std::fs::metadata(&to).map_or(0, |found| found.len()), length);
        }
    }
}
