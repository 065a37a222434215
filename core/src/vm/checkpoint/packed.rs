//! The packed form of a checkpoint's memory: compressed once it was not used for a while, unpacked before something goes on from it.
//!
//! ```text
//! pack     ram ─> ram.packed.part, read again and compared ─> synced ─> renamed to ram.packed ─> ram removed ─> row
//! unpack   ram.packed ─> ram.part, compared ─> synced ─> renamed to ram ─> row ─> ram.packed removed
//! ```
//! A packed memory may be only what differs from that of another checkpoint of the same boot, its base, which has a whole one ([`base`]).
//! What is compared is the digest of the manifest, so both forms are that of one memory. As long as `ram` is there it is whole and what counts: the
//! start of the daemon removes what else an earlier one left ([`settle`]). When a memory was used last is the time of `ram`.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nexus_schema::id::CheckpointId;
use nexus_schema::{ErrorCode, ToolError};
use tokio::runtime;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::base::{self, Base};
use super::check::{CheckError, check_host};
use super::restore::begin_use;
use crate::access::{Promised, Tokens};
use crate::context::{Shared, Turn, Used};
use crate::drive::KEEP_FREE;
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::{disk, failpoint};
use crate::progress::Progress;
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::store::{Connection, StoreError};
use crate::vmm::{self, Memory};

#[cfg(test)]
pub(super) mod tests;

/// How long the work goes on without a rest, and the longest rest.
const REST_MIN: Duration = Duration::from_millis(5);
const REST_MAX: Duration = Duration::from_millis(500);

/// The files of a memory.
pub(super) struct Files {
    pub(super) ram: PathBuf,
    ram_part: PathBuf,
    pub(super) packed: PathBuf,
    pub(super) packed_part: PathBuf,
}

impl Files {
    pub(super) fn of(directory: &Path) -> Self {
        Self {
            ram: directory.join(checkpoint_files::RAM),
            ram_part: directory.join(checkpoint_files::RAM_PART),
            packed: directory.join(checkpoint_files::PACKED),
            packed_part: directory.join(checkpoint_files::PACKED_PART),
        }
    }

    pub(super) fn is_packed(&self) -> bool {
        !self.ram.exists() && self.packed.exists()
    }
}

/// Whether a checkpoint's directory has its memory, in one of its forms. Blocks.
pub(super) fn has_memory(directory: &Path) -> bool {
    let files = Files::of(directory);
    files.ram.exists() || files.packed.exists()
}

/// How large a packed memory is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedSize {
    /// What it occupies, in bytes.
    pub(crate) bytes: u64,
    /// What it occupies once it is unpacked, in bytes.
    pub(crate) unpacked: u64,
}

/// The size of a packed memory; `None` if it is not packed. Its row may not have that yet.
pub(crate) async fn packed_size(shared: &Shared, checkpoint: CheckpointId) -> Option<PackedSize> {
    let files = Files::of(&shared.paths.checkpoint(checkpoint));
    let looked = spawn_blocking(move || {
        if !files.is_packed() {
            return None;
        }
        let header = vmm::packed_header(&File::open(&files.packed).ok()?).ok()?;
        let bytes = disk::allocated_bytes(&files.packed).ok()?;
        Some(PackedSize { bytes, unpacked: header.occupied })
    });
    looked.await.ok()?
}

/// How long it is until a memory that is used no more is to be packed; `None` if it is packed, or not there. Blocks.
pub(super) fn due_in(directory: &Path, after: Duration) -> Option<Duration> {
    let used = std::fs::metadata(directory.join(checkpoint_files::RAM)).and_then(|found| found.modified());
    // The clock may have been set back since.
    let unused = SystemTime::now().duration_since(used.ok()?).unwrap_or_default();
    Some(after.saturating_sub(unused))
}

/// Why a memory was not packed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotPacked {
    /// Somebody else uses the checkpoint.
    #[error("it is in use")]
    InUse,
    /// It is not what was saved.
    #[error("its checksum is another one than that of its manifest")]
    Damaged,
    /// It would take as much.
    #[error("that would take as much space")]
    NoGain,
    /// There is no room for both forms.
    #[error("the disk has no room for it")]
    NoRoom,
    /// It cannot be read or written.
    #[error("read and write files")]
    File(#[from] io::Error),
    /// It cannot be recorded, or the others not be looked at.
    #[error("read and write rows")]
    Store(#[from] StoreError),
}

impl NotPacked {
    /// Whether another try would end as this one.
    pub(super) const fn is_final(&self) -> bool {
        matches!(self, Self::Damaged | Self::NoGain)
    }

    /// Whether it was, or may have been, ended because somebody needs the checkpoint.
    pub(super) fn gives_way(&self) -> bool {
        match self {
            Self::InUse => true,
            Self::File(error) => error.kind() == io::ErrorKind::Interrupted,
            Self::Damaged | Self::NoGain | Self::NoRoom | Self::Store(_) => false,
        }
    }
}

/// Packs the memory of a checkpoint; returns what it occupies then, in bytes. If that fails, nothing changes. It takes at most half of a processor's
/// time, and ends as soon as somebody else needs the checkpoint.
pub(super) async fn pack(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<u64, NotPacked> {
    let Some(sha256) = checkpoint.manifest.as_ref().map(|manifest| manifest.ram_sha256.clone()) else {
        return Err(NotPacked::Damaged);
    };
    let (id, stop) = (checkpoint.id, CancellationToken::new());
    let used = shared.checkpoints.pack(id, stop.clone()).ok_or(NotPacked::InUse)?;
    let directory = shared.paths.checkpoint(id);
    let base = base::choose(shared, checkpoint, &stop).await?;
    let work = spawn_blocking(move || {
        let pace = Pace { stop, since: Cell::new(Instant::now()), runtime: runtime::Handle::current() };
        // Both are in use until this has ended.
        (used, write_packed(&directory, &sha256, base.as_ref(), &make, &|_| pace.goes_on()))
    });
    let (_used, packed) = work.await.map_err(io::Error::other)?;
    let bytes = packed?;
    shared.store.write(move |tx| checkpoints::set_memory_bytes(tx, id, bytes)).await?;
    Ok(bytes)
}

/// Has work that looks at it after each piece rest for as long as it took since the last rest.
struct Pace {
    stop: CancellationToken,
    since: Cell<Instant>,
    runtime: runtime::Handle,
}

impl Pace {
    /// Rests, and returns whether the work goes on.
    fn goes_on(&self) -> bool {
        let rest = self.since.get().elapsed().min(REST_MAX);
        if rest < REST_MIN {
            return !self.stop.is_cancelled();
        }
        let stopped =
            self.runtime.block_on(async { tokio::time::timeout(rest, self.stop.cancelled()).await });
        self.since.set(Instant::now());
        stopped.is_err() && !self.stop.is_cancelled()
    }
}

/// Puts the packed form in the place of a memory with this digest; returns what it occupies, in bytes. `make` makes its file. Blocks.
pub(super) fn write_packed(
    directory: &Path,
    sha256: &str,
    base: Option<&Base>,
    make: &dyn Fn(&Path) -> io::Result<File>,
    is_wanted: &dyn Fn(u64) -> bool,
) -> Result<u64, NotPacked> {
    let files = Files::of(directory);
    let written = || -> Result<u64, NotPacked> {
        remove_if_there(&files.packed_part)?;
        remove_if_there(&files.packed)?;
        let from = fs_err::File::open(&files.ram)?;
        let before = disk::allocated_bytes(&files.ram)?;
        if disk::free_bytes(directory)? < before.saturating_add(KEEP_FREE) {
            return Err(NotPacked::NoRoom);
        }
        let to = make(&files.packed_part)?;
        failpoint::reach("checkpoint-packing");
        let (from, _) = from.into_parts();
        let changes = match base {
            Some(base) => base::write_changes(&from, base, &to, is_wanted)?,
            None => None,
        };
        let packed = match changes {
            Some(packed) => packed,
            None => vmm::pack(&Memory::Plain(from), &to, is_wanted)?,
        };
        if packed != sha256 {
            return Err(NotPacked::Damaged);
        }
        to.sync_all()?;
        let again = base::open_packed(&files.packed_part, base.map(|base| base.directory.as_path()))?;
        if again.sha256(is_wanted)? != sha256 {
            return Err(io::Error::other("what was written is read as something else").into());
        }
        let after = disk::allocated_bytes(&files.packed_part)?;
        if after.saturating_mul(10) > before.saturating_mul(9) {
            return Err(NotPacked::NoGain);
        }
        failpoint::reach("checkpoint-pack-written");
        fs_err::rename(&files.packed_part, &files.packed)?;
        sync(directory)?;
        failpoint::reach("checkpoint-pack-named");
        fs_err::remove_file(&files.ram)?;
        sync(directory)?;
        failpoint::reach("checkpoint-pack-alone");
        Ok(after)
    };
    written().inspect_err(|_| {
        if let Err(error) = remove_if_there(&files.packed_part) {
            tracing::warn!(%error, "cannot remove a part of a packed memory; nexusd retries");
        }
    })
}

/// Begins to use a checkpoint that something is to go on from: it is not removed meanwhile, and its memory is not packed.
pub(super) async fn begin_restore(
    shared: &Arc<Shared>,
    checkpoint: &CheckpointRecord,
    progress: &Progress,
) -> Result<Used, ToolError> {
    let used = begin_use(shared, checkpoint).await?;
    let directory = shared.paths.checkpoint(checkpoint.id);
    let is_packed = spawn_blocking(move || {
        mark_used(&directory);
        Files::of(&directory).is_packed()
    });
    if !is_packed.await.map_err(stopped)? {
        return Ok(used);
    }
    // Before work that may be in vain.
    check_host(shared, checkpoint).await?;
    progress.step("unpacking the checkpoint");
    let turn = tokio::select! {
        turn = shared.checkpoints.turn() => turn,
        () = progress.cancelled() => return Err(ToolError::new(ErrorCode::Cancelled, UNWANTED)),
    };
    // By itself, so that it is whole whether or not somebody waits for it.
    tokio::spawn(unpack(shared.clone(), checkpoint.clone(), progress.clone(), used, turn))
        .await
        .map_err(|e| ToolError::internal(format!("unpack a checkpoint: {e}")))?
}

const UNWANTED: &str = "the checkpoint was not unpacked, because nobody waits for it any more";

/// Unpacks the memory of a checkpoint, unless somebody did so meanwhile.
async fn unpack(
    shared: Arc<Shared>,
    checkpoint: CheckpointRecord,
    progress: Progress,
    used: Used,
    turn: Turn,
) -> Result<Used, ToolError> {
    let (id, directory) = (checkpoint.id, shared.paths.checkpoint(checkpoint.id));
    let promised = promise_rest(&shared, &checkpoint).await?;
    let base = base::of(&shared, &checkpoint).await?;
    let (own, row) = (directory.clone(), checkpoint.clone());
    let written = spawn_blocking(move || -> Result<Option<u64>, ToolError> {
        match Files::of(&own).is_packed() {
            true => write_unpacked(&own, base.as_ref(), &row, &progress).map(Some),
            false => Ok(None),
        }
    });
    if let Some(bytes) = written.await.map_err(stopped)?? {
        let recorded = shared.store.write(move |tx| checkpoints::set_memory_bytes(tx, id, bytes)).await;
        recorded.map_err(store_error)?;
        // The row counts from here on.
        drop(promised);
        let packed = Files::of(&directory).packed;
        let removed = spawn_blocking(move || remove_if_there(&packed)).await.map_err(stopped)?;
        if let Err(error) = removed {
            tracing::warn!(checkpoint = %checkpoint.name, %error, "cannot remove the packed form of a memory; nexusd retries at its next start");
        }
    }
    drop(turn);
    Ok(used)
}

/// Promises the room for what a memory takes more once it is unpacked, in the quota of who made the checkpoint. `None` if it is not packed, or damaged:
/// its unpacking says so then.
///
/// # Errors
/// `quota_exceeded` if that has none.
async fn promise_rest(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<Option<Promised>, ToolError> {
    let Some(PackedSize { unpacked, .. }) = packed_size(shared, checkpoint.id).await else { return Ok(None) };
    let (tokens, row) = (shared.tokens.clone(), checkpoint.clone());
    match shared.store.write(move |tx| rest_of(tx, &tokens, &row, unpacked)).await {
        Ok(promised) => Ok(Some(promised)),
        Err(StoreError::QuotaExceeded { what }) => {
            let message = format!("checkpoint {} is packed, and cannot be unpacked: {what}", checkpoint.name);
            Err(ToolError::new(ErrorCode::QuotaExceeded, message).hint(QUOTA))
        }
        Err(error) => Err(store_error(error)),
    }
}

/// Promises what a memory takes, in bytes, beyond what its row counts by now.
fn rest_of(
    tx: &Connection,
    tokens: &Tokens,
    checkpoint: &CheckpointRecord,
    unpacked: u64,
) -> Result<Promised, StoreError> {
    let counted = checkpoints::get(tx, checkpoint.id)?.map_or(0, |row| row.memory_bytes);
    tokens.promise(tx, &checkpoint.owner, unpacked.saturating_sub(counted))
}

/// What to do about a quota that has no room for an unpacked memory.
const QUOTA: &str =
    "delete checkpoints, VMs or drives that are no longer needed, or ask for a token with a larger quota";

/// Writes the memory of a checkpoint beside its packed form; returns what it occupies, in bytes. Blocks.
pub(super) fn write_unpacked(
    directory: &Path,
    base: Option<&Base>,
    checkpoint: &CheckpointRecord,
    progress: &Progress,
) -> Result<u64, ToolError> {
    let files = Files::of(directory);
    let sha256 = checkpoint.manifest.as_ref().map(|manifest| manifest.ram_sha256.as_str());
    let written = || -> io::Result<Result<u64, ToolError>> {
        remove_if_there(&files.ram_part)?;
        let occupied = vmm::packed_header(fs_err::File::open(&files.packed)?.file())?.occupied;
        let from = base::open_packed(&files.packed, base.map(|base| base.directory.as_path()))?;
        let (needed, free) = (occupied.saturating_add(KEEP_FREE), disk::free_bytes(directory)?);
        if free < needed {
            return Ok(Err(no_room(checkpoint, needed, free)));
        }
        let to = make(&files.ram_part)?;
        let digest = vmm::unpack(&from, &to, &|done| {
            // What is read of its base may be more.
            progress.advance(done.min(occupied), Some(occupied));
            progress.check().is_ok()
        })?;
        if Some(digest.as_str()) != sha256 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its checksum is another one"));
        }
        to.sync_all()?;
        failpoint::reach("checkpoint-unpacked");
        fs_err::rename(&files.ram_part, &files.ram)?;
        sync(directory)?;
        failpoint::reach("checkpoint-unpack-named");
        Ok(Ok(disk::allocated_bytes(&files.ram)?))
    };
    let written = match written() {
        Ok(written) => written,
        Err(error) if disk::is_full(&error) => {
            let message = format!("unpack checkpoint {}: {error}", checkpoint.name);
            Err(ToolError::new(ErrorCode::DiskFull, message).hint(ROOM))
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            Err(ToolError::new(ErrorCode::Cancelled, UNWANTED))
        }
        Err(source) if is_damage(&source) => {
            Err(CheckError::Read { path: files.packed.clone(), source }.told(checkpoint))
        }
        Err(error) => Err(ToolError::internal(format!("unpack checkpoint {}: {error}", checkpoint.name))),
    };
    if written.is_err()
        && let Err(error) = remove_if_there(&files.ram_part)
    {
        tracing::warn!(%error, "cannot remove a part of an unpacked memory; nexusd retries");
    }
    written
}

/// Whether an error of reading a packed memory means that it is damaged or gone, not that it cannot be read now.
pub(super) fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, Other, UnexpectedEof};
    // Errors of the compression are `Other`; those of the system never are.
    matches!(error.kind(), InvalidData | NotFound | Other | UnexpectedEof)
}

/// What to do about a disk that has no room for an unpacked memory.
pub(super) const ROOM: &str =
    "free space, for example with checkpoint_delete or prune; checkpoint_list shows sizes";

fn no_room(checkpoint: &CheckpointRecord, needed: u64, free: u64) -> ToolError {
    let message = format!(
        "checkpoint {} is packed and needs {} MiB to be unpacked, and the disk of the state directory has {} MiB free",
        checkpoint.name,
        needed >> 20,
        free >> 20
    );
    ToolError::new(ErrorCode::DiskFull, message).hint(ROOM)
}

/// For the start of the daemon: removes what an earlier one left of packing and unpacking the memories of these checkpoints, and records what they
/// occupy.
pub(super) async fn settle(shared: &Shared, checkpoints: Vec<CheckpointRecord>) -> Result<(), ToolError> {
    let paths = shared.paths.clone();
    let looked = spawn_blocking(move || {
        let mut other: Vec<(CheckpointId, u64)> = Vec::new();
        for row in checkpoints {
            match tidy(&paths.checkpoint(row.id)) {
                Ok(Some(bytes)) if bytes != row.memory_bytes => other.push((row.id, bytes)),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(checkpoint = %row.name, %error, "cannot remove what was left of packing it")
                }
            }
        }
        other
    });
    let other = looked.await.map_err(stopped)?;
    if other.is_empty() {
        return Ok(());
    }
    let written = shared.store.write(move |tx| -> Result<(), StoreError> {
        other.iter().try_for_each(|(id, bytes)| checkpoints::set_memory_bytes(tx, *id, *bytes))
    });
    written.await.map_err(store_error)
}

/// Removes what is left of packing and unpacking in a checkpoint's directory. Returns what its memory occupies, in bytes, if the row may say something
/// else. Blocks.
fn tidy(directory: &Path) -> io::Result<Option<u64>> {
    let files = Files::of(directory);
    let mut is_cut_off = remove_if_there(&files.packed_part)? | remove_if_there(&files.ram_part)?;
    if files.ram.exists() {
        is_cut_off |= remove_if_there(&files.packed)?;
        return is_cut_off.then(|| disk::allocated_bytes(&files.ram)).transpose();
    }
    files.packed.exists().then(|| disk::allocated_bytes(&files.packed)).transpose()
}

/// Marks a memory as used now. Blocks.
fn mark_used(directory: &Path) {
    let ram = directory.join(checkpoint_files::RAM);
    let marked = match File::open(ram) {
        Ok(file) => file.set_modified(SystemTime::now()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = marked {
        tracing::info!(%error, "a memory that is used now may be packed too early");
    }
}

/// Makes a new file that only this user can read.
pub(super) fn make(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Removes a file; returns whether it was there.
pub(super) fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs_err::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn sync(directory: &Path) -> io::Result<()> {
    fs_err::File::open(directory)?.sync_all()
}

pub(super) fn stopped(error: tokio::task::JoinError) -> ToolError {
    ToolError::internal(format!("work on a checkpoint's memory: {error}"))
}
