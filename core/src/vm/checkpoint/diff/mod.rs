//! What is different in two checkpoints, or in one and its VM as it is now: files of each drive, and processes. The drives are read without being
//! mounted, as they were synced; what a guest had only in its memory is not seen, which a checkpoint with `quiesced` has none of.

mod compare;
mod content;
mod processes;
mod scan;
mod shown;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nexus_schema::id::CheckpointKind;
use nexus_schema::link::{GuestProcess, GuestProcesses, PROCESSES_REQUEST};
use nexus_schema::tools::checkpoint::{ChangedPath, ProcessChanges};
use nexus_schema::{ErrorCode, Timestamp, ToolError};
use serde_json::value::RawValue;
use tempfile::TempDir;
use tokio::sync::Semaphore;

use crate::context::{CopyDrives, Handle, Shared};
use crate::drive::{DISK, KEEP_FREE};
use crate::guest::Link;
use crate::op::store_error;
use crate::os::disk;
use crate::os::paths::checkpoint_files;
use crate::progress::Progress;
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::store::drives::DriveRecord;
use crate::store::{now, random_id};
use crate::vm::checkpoint::restore::begin_use;
use crate::vm::copies::copy_drives;
use compare::Differences;
pub(crate) use processes::bounded;

/// Timeout of a comparison, and of the copies that it is made with.
const COMPARE_MAX: Duration = Duration::from_secs(20);
const COPY_MAX: Duration = Duration::from_secs(30);
/// How many comparisons there are at a time, each with all names of two filesystems in memory, and how long others wait for them.
static COMPARISONS: Semaphore = Semaphore::const_new(3);
const TURN_MAX: Duration = Duration::from_secs(10);
/// Timeout of a guest to list its processes.
const LIST_MAX: Duration = Duration::from_secs(5);
/// How many bytes of the reply are used for the list of files, and for diffs of texts.
const FILES_BYTES: usize = 16 << 10;
const DIFF_BYTES: usize = 12 << 10;

/// What a caller wants to see.
#[derive(Debug)]
pub(crate) struct Wish {
    /// Only what is at or below this path: without a slash at its end, so empty for all.
    pub(crate) path: String,
    /// How many files are listed.
    pub(crate) limit: usize,
    /// Whether diffs of text files are shown.
    pub(crate) text: bool,
}

/// What is compared with a checkpoint.
pub(crate) enum With<'a> {
    /// Another checkpoint.
    Checkpoint(&'a CheckpointRecord),
    /// A VM as it is now.
    Now(&'a Handle),
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Found {
    /// When the other side was taken.
    pub(crate) to_at: Timestamp,
    pub(crate) added: u64,
    pub(crate) changed: u64,
    pub(crate) removed: u64,
    pub(crate) files: Vec<ChangedPath>,
    pub(crate) is_cut: bool,
    pub(crate) diff: Option<String>,
    pub(crate) diff_is_cut: bool,
    pub(crate) processes: Option<ProcessChanges>,
    pub(crate) notes: Vec<String>,
}

/// One of the two sides.
#[derive(Debug)]
struct Side {
    at: Timestamp,
    drives: Vec<Drive>,
    processes: Vec<GuestProcess>,
    /// Where the drives are, if they are copies that nobody else needs.
    #[expect(dead_code, reason = "held, not used")]
    copies: Option<TempDir>,
}

/// A drive of a side.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Drive {
    /// Where its files are: its mount point, empty for the root drive; `NAME:` of one that is not mounted.
    place: String,
    file: PathBuf,
}

/// Compares a checkpoint with another one, or with a VM as it is now.
pub(crate) async fn diff(
    shared: &Shared,
    from: &CheckpointRecord,
    with: With<'_>,
    wish: Wish,
) -> Result<Found, ToolError> {
    // None of them is removed meanwhile.
    let _used = begin_use(shared, from).await?;
    let _other = match &with {
        With::Checkpoint(to) => Some(begin_use(shared, to).await?),
        With::Now(_) => None,
    };
    let turn = match tokio::time::timeout(TURN_MAX, COMPARISONS.acquire()).await {
        Ok(Ok(turn)) => turn,
        Ok(Err(_)) | Err(_) => {
            return Err(ToolError::new(ErrorCode::Busy, "other checkpoints are being compared")
                .hint("try again in a minute"));
        }
    };
    let old = saved(shared, from).await?;
    // Of copies that are made, so that no prune takes them away.
    let name = format!("diff-{}", random_id::<CheckpointKind>());
    let _claim = shared.provision.scratch().claim(&name);
    let new = match with {
        With::Checkpoint(to) => saved(shared, to).await?,
        With::Now(handle) => present(shared, handle, name).await?,
    };
    let until = Instant::now() + COMPARE_MAX;
    let compared = tokio::task::spawn_blocking(move || -> Result<Found, ToolError> {
        // The next one begins when this one has ended, also if nobody waits for it any more.
        let _turn = turn;
        let processes = processes::changes(&old.processes, &new.processes);
        let found = files(&old, &new, &wish, until)?;
        let diff = wish.text.then_some(found.diff);
        Ok(Found {
            to_at: new.at,
            added: found.added,
            changed: found.changed,
            removed: found.removed,
            files: found.files,
            is_cut: found.is_cut,
            diff,
            diff_is_cut: found.diff_is_cut,
            processes,
            notes: found.notes,
        })
    });
    compared.await.map_err(|e| ToolError::internal(format!("compare checkpoints: {e}")))?
}

/// The side of a checkpoint.
async fn saved(shared: &Shared, row: &CheckpointRecord) -> Result<Side, ToolError> {
    let id = row.id;
    let copies = shared.store.read(move |db| checkpoints::drives_of(db, id)).await.map_err(store_error)?;
    let directory = shared.paths.checkpoint(id).join(checkpoint_files::DRIVES);
    let drives = copies.into_iter().map(|copy| Drive {
        place: place(copy.position == 0, copy.mount.as_deref(), copy.name.as_str()),
        file: directory.join(format!("{}.ext4", copy.drive)),
    });
    let processes = row.manifest.as_ref().map(|manifest| manifest.processes.clone()).unwrap_or_default();
    Ok(Side { at: row.created_at, drives: drives.collect(), processes, copies: None })
}

/// The side of a VM as it is now: copies of its drives, which are removed with it.
async fn present(shared: &Shared, handle: &Handle, directory: String) -> Result<Side, ToolError> {
    let (name, rows, link) = {
        let view = handle.view.borrow();
        (view.record.name.clone(), view.drives.clone(), view.link.clone())
    };
    let copies = make_room(shared, &rows, directory).await?;
    let mut drives = Vec::new();
    let mut wanted = Vec::new();
    for row in rows {
        let file = copies.path().join(format!("{}.ext4", row.id));
        let mount = row.attachment.as_ref().and_then(|attachment| attachment.mount.as_deref());
        drives.push(Drive { place: place(row.is_root(), mount, row.name.as_str()), file: file.clone() });
        wanted.push((row.id, file));
    }
    let at = now();
    let progress = Progress::default();
    // Nobody waits for copies whose time is over.
    let stop = progress.token().clone().drop_guard();
    let copied = copy_drives(handle, CopyDrives { drives: wanted, progress });
    match tokio::time::timeout(COPY_MAX, copied).await {
        Ok(copied) => copied?,
        Err(_) => {
            let message = format!("the drives of {name} were not copied within {} s", COPY_MAX.as_secs());
            return Err(ToolError::new(ErrorCode::Timeout, message)
                .hint("take a checkpoint with vm_checkpoint, and compare with that one"));
        }
    }
    drop(stop);
    let processes = match link {
        Some(link) => listed(&link).await,
        None => Vec::new(),
    };
    Ok(Side { at, drives, processes, copies: Some(copies) })
}

/// Makes the directory for copies of drives, if there is room for them.
async fn make_room(shared: &Shared, rows: &[DriveRecord], directory: String) -> Result<TempDir, ToolError> {
    let scratch = shared.paths.scratch();
    let is_copied = shared.drives.backend() == "copy";
    let files: Vec<PathBuf> = rows.iter().map(|row| shared.paths.drive(row.id).join(DISK)).collect();
    let made = tokio::task::spawn_blocking(move || -> io::Result<(TempDir, bool)> {
        let copies = tempfile::Builder::new().prefix(&directory).rand_bytes(0).tempdir_in(scratch)?;
        if !is_copied {
            return Ok((copies, true));
        }
        let mut needed = KEEP_FREE;
        for file in &files {
            needed = needed.saturating_add(disk::allocated_bytes(file)?);
        }
        let has_room = disk::free_bytes(copies.path())? >= needed;
        Ok((copies, has_room))
    });
    let made = made.await.map_err(|e| ToolError::internal(format!("make a directory: {e}")))?;
    match made {
        Ok((copies, true)) => Ok(copies),
        Ok((_, false)) => {
            let message = "the disk of the state directory has no room for copies of the VM's drives";
            Err(ToolError::new(ErrorCode::DiskFull, message).hint(
                "free space on the host, for example with prune; two checkpoints are compared without copies",
            ))
        }
        Err(error) => Err(ToolError::internal(format!("make a directory for copies of drives: {error}"))),
    }
}

/// The processes of a guest; none if it does not say.
async fn listed(link: &Link) -> Vec<GuestProcess> {
    let Ok(none) = RawValue::from_string("{}".into()) else { return Vec::new() };
    match link.request(PROCESSES_REQUEST, &none, LIST_MAX).await {
        Ok(answer) => {
            let said: GuestProcesses = serde_json::from_str(answer.get()).unwrap_or_default();
            bounded(said.processes)
        }
        Err(error) => {
            tracing::info!(%error, "a guest does not list its processes");
            Vec::new()
        }
    }
}

fn place(is_root: bool, mount: Option<&str>, name: &str) -> String {
    match (is_root, mount) {
        (true, _) => String::new(),
        (false, Some(mount)) => mount.trim_end_matches('/').to_owned(),
        (false, None) => format!("{name}:"),
    }
}

/// Compares the drives of two sides, by the places of their files. Blocks.
fn files<'w>(old: &Side, new: &Side, wish: &'w Wish, until: Instant) -> Result<Differences<'w>, ToolError> {
    let mut found = Differences::new(wish, until);
    for drive in &old.drives {
        let Some(other) = new.drives.iter().find(|other| other.place == drive.place) else {
            found.note(format!("the drive at {} is only in `from`", shown_place(drive)));
            continue;
        };
        match found.compare(&drive.place, &drive.file, &other.file) {
            Ok(()) => {}
            Err(compare::Stopped::Late) => {
                let message = format!("the comparison took more than {} s", COMPARE_MAX.as_secs());
                return Err(ToolError::new(ErrorCode::Timeout, message)
                    .hint("narrow it with path, for example to /etc"));
            }
            Err(compare::Stopped::Missing { path, source }) => {
                let message = format!("read a copy of a drive, {}: {source}", file_name(&path));
                return Err(ToolError::new(ErrorCode::VerificationFailed, message)
                    .hint("the checkpoint is damaged: checkpoint_delete removes it"));
            }
            Err(compare::Stopped::Read(error)) => {
                let why = nexus_schema::error::chain(&error);
                found.note(format!("the drive at {} was not compared to its end: {why}", shown_place(drive)));
            }
        }
    }
    for drive in new.drives.iter().filter(|drive| old.drives.iter().all(|other| other.place != drive.place)) {
        found.note(format!("the drive at {} is only in `to`", shown_place(drive)));
    }
    found.finish();
    Ok(found)
}

fn shown_place(drive: &Drive) -> String {
    if drive.place.is_empty() { "/".to_owned() } else { shown::path(drive.place.as_bytes()) }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
