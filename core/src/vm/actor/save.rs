//! A VM's part in a checkpoint: its commands stand still, its VMM saves the memory, and the drives are copied while the guest is paused. All of that is
//! one moment for the guest.
//!
//! ```text
//! quiesce ─> save: paused, memory and devices written ─> drives copied, the hold renewed ─> release ─> thaw
//! ```
//! The shim lets the guest go on by itself if this daemon does not renew the hold, and the guest lets its commands go on if it is not told to.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nexus_schema::link::{ClockParams, QUIESCE_REQUEST, QUIET_MAX, Quiesced, THAW_REQUEST};
use nexus_schema::{ErrorCode, ToolError};
use serde_json::value::{RawValue, to_raw_value};

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
pub(super) const HOLD: Duration = Duration::from_secs(30);
/// The interval in which it hears of it.
pub(super) const RENEW: Duration = Duration::from_secs(5);

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
pub(super) async fn quiesce(link: &Link) -> Quiesced {
    let Ok(none) = RawValue::from_string("{}".into()) else { return Quiesced::default() };
    match link.request(QUIESCE_REQUEST, &none, QUIESCE_MAX).await {
        Ok(answer) => serde_json::from_str(answer.get()).unwrap_or_default(),
        Err(error) => {
            tracing::info!(%error, "a guest does not stand still for a copy of its drives");
            Quiesced::default()
        }
    }
}

/// Sets the guest's clock and lets its commands go on. If that fails, the guest does it by itself after a while.
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
    let saved = shim.save(&take.directory, HOLD).await.map_err(|error| save_failed(&error))?;
    let saved_at = Instant::now();
    failpoint::reach("checkpoint-saved");
    take.progress.step("copying the drives");
    let copies = take.directory.join(checkpoint_files::DRIVES);
    let files: Vec<(PathBuf, PathBuf)> = drives
        .iter()
        .map(|drive| (shared.paths.drive(drive.id).join(DISK), copies.join(format!("{}.ext4", drive.id))))
        .collect();
    copy_held(shim, files, &take.progress, "checkpoint").await?;
    failpoint::reach("checkpoint-copied");
    Ok((saved, saved_at))
}

/// Copies files of drives while the shim holds the guest, which the caller lets go on afterwards. The hold is renewed until the copies are made; `work`
/// is the step that it is for, such as `checkpoint`.
pub(super) async fn copy_held(
    shim: &ShimClient,
    files: Vec<(PathBuf, PathBuf)>,
    progress: &Progress,
    work: &str,
) -> Result<(), ToolError> {
    // Cancelled if the copies are not waited for any more.
    let watched = Progress::default();
    let stop = watched.token().clone().drop_guard();
    let copying = tokio::task::spawn_blocking(move || -> Result<(), DriveError> {
        files.iter().try_for_each(|(from, to)| copy_file(from, to, &watched))
    });
    tokio::pin!(copying);
    let renew = async || {
        let asked = Instant::now();
        shim.hold_guest(HOLD).await.map_err(|error| hold_failed(&error))?;
        Ok::<_, ToolError>(asked + HOLD)
    };
    // The hold began before the answer came, so it is renewed at once, also if the copies are quicker than that.
    let mut held_until = renew().await?;
    let mut renewals = tokio::time::interval_at((Instant::now() + RENEW).into(), RENEW);
    let copied = loop {
        tokio::select! {
            copied = &mut copying => break copied,
            _ = renewals.tick() => held_until = renew().await?,
            () = progress.cancelled() => {
                return Err(ToolError::new(ErrorCode::Cancelled, format!("the {work} was cancelled")));
            }
        }
    };
    drop(stop);
    copied
        .map_err(|e| ToolError::internal(format!("copy drives for a {work}: {e}")))?
        .map_err(drive_error)?;
    // Copies of drives to which the guest wrote meanwhile would be of no moment at all.
    match Instant::now() < held_until {
        true => Ok(()),
        false => Err(ToolError::new(ErrorCode::Timeout, "the guest ran on while its drives were copied")
            .hint(format!("the host is too busy for a {work}: try again later"))),
    }
}

/// The shim could not pause the guest, or not keep it paused.
pub(super) fn hold_failed(error: &VmmError) -> ToolError {
    let message = format!("pause the VM for a copy of its drives: {}", nexus_schema::error::chain(error));
    ToolError::new(ErrorCode::HostUnsuitable, message)
        .hint("the VM runs on; look at it with vm_inspect, then try again")
}

/// Returns the error of a save that failed.
pub(super) fn save_failed(error: &VmmError) -> ToolError {
    let message = format!("save the VM's memory: {}", nexus_schema::error::chain(error));
    let is_full = message.contains("No space left") || message.contains("Disk quota exceeded");
    match is_full {
        true => ToolError::new(ErrorCode::DiskFull, message)
            .hint("free space on the host, for example with checkpoint_delete or prune; the VM runs on"),
        false => ToolError::new(ErrorCode::HostUnsuitable, message)
            .hint("the VM runs on; look at it with vm_inspect, then try again"),
    }
}
