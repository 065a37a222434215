//! Memories that are packed as what differs from another one: that of another checkpoint of the same boot, their base.
//!
//! ```text
//! pack    the last whole packed memory before it is its base, if half of the pages are the same; otherwise it is packed whole, and may be a base
//! unpack  the base is read, too, whichever form it has by then; it is not removed meanwhile
//! remove  of a base: first the memories that hang from it are packed whole, each written beside and renamed
//! ```
//! A base has none itself, and few hang from it, so that an unpacking reads two memories at most, and a removal rewrites few.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Seek as _};
use std::path::{Path, PathBuf};

use nexus_schema::id::CheckpointId;
use nexus_schema::{ErrorCode, ToolError};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::packed::{Files, NotPacked, ROOM, is_damage, make, remove_if_there, stopped, sync};
use crate::context::{Shared, Used};
use crate::drive::KEEP_FREE;
use crate::op::store_error;
use crate::os::{disk, failpoint};
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::vmm::{self, Memory};

#[cfg(test)]
mod tests;

/// How many memories hang from one base, at most: its removal rewrites them, and somebody waits for it.
const HANGING_MAX: usize = 7;

/// A base in use: it is neither removed nor packed meanwhile.
#[derive(Debug)]
pub(super) struct Base {
    id: CheckpointId,
    /// Its checkpoint's directory.
    pub(super) directory: PathBuf,
    _used: Option<Used>,
}

/// The base of a checkpoint's memory, if that is packed and has one. A damaged one has none. Blocks.
fn base_in(directory: &Path) -> io::Result<Option<CheckpointId>> {
    let files = Files::of(directory);
    if !files.is_packed() {
        return Ok(None);
    }
    match fs_err::File::open(&files.packed).and_then(|file| vmm::packed_header(file.file())) {
        Ok(header) => Ok(header.base),
        Err(error) if is_damage(&error) => Ok(None),
        // It may have one, which is not to be removed then.
        Err(error) => Err(error),
    }
}

/// Chooses the base for a checkpoint's memory that is to be packed, and begins to use it until `stop` is cancelled, which others do that need it. `None` if
/// the memory is to be packed whole.
pub(super) async fn choose(
    shared: &Shared,
    checkpoint: &CheckpointRecord,
    stop: &CancellationToken,
) -> Result<Option<Base>, NotPacked> {
    let vm = checkpoint.vm;
    let rows = shared.store.read(move |db| checkpoints::list(db, Some(vm), None, u32::MAX)).await?;
    let (paths, own) = (shared.paths.clone(), checkpoint.clone());
    let chosen = spawn_blocking(move || {
        let mut hanging: HashMap<CheckpointId, usize> = HashMap::new();
        let mut whole: HashSet<CheckpointId> = HashSet::new();
        for row in &rows {
            let directory = paths.checkpoint(row.id);
            match base_in(&directory) {
                Ok(Some(base)) => *hanging.entry(base).or_default() += 1,
                Ok(None) if !Files::of(&directory).is_packed() => {}
                Ok(None) => {
                    whole.insert(row.id);
                }
                // It may hang from any.
                Err(_) => return None,
            }
        }
        // What others hang from has no base itself.
        if hanging.contains_key(&own.id) {
            return None;
        }
        let has_room = |id: CheckpointId| hanging.get(&id).is_none_or(|count| *count < HANGING_MAX);
        let fits =
            |row: &&CheckpointRecord| may_be_base(row, &own) && has_room(row.id) && whole.contains(&row.id);
        rows.iter().rev().find(fits).map(|row| row.id)
    });
    let Some(id) = chosen.await.map_err(io::Error::other)? else { return Ok(None) };
    let used = shared.checkpoints.pack(id, stop.clone());
    Ok(used.map(|used| Base { id, directory: shared.paths.checkpoint(id), _used: Some(used) }))
}

/// Whether the memory of a checkpoint may be told by that of another one, an earlier one of the same boot that is not about to be removed by itself.
fn may_be_base(other: &CheckpointRecord, own: &CheckpointRecord) -> bool {
    is_earlier(other, own) && other.expires_at.is_none()
}

/// Whether a checkpoint is an earlier one of the same boot than another one.
fn is_earlier(other: &CheckpointRecord, own: &CheckpointRecord) -> bool {
    let boot = |row: &CheckpointRecord| row.manifest.as_ref().map(|manifest| manifest.boot_id);
    other.seq < own.seq && boot(other).is_some() && boot(other) == boot(own)
}

/// Begins to use the base of a checkpoint's memory, if that is packed and has one.
pub(super) async fn of(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<Option<Base>, ToolError> {
    let directory = shared.paths.checkpoint(checkpoint.id);
    let found = spawn_blocking(move || base_in(&directory)).await.map_err(stopped)?;
    let unreadable =
        |e: io::Error| ToolError::internal(format!("read the packed memory of {}: {e}", checkpoint.name));
    let Some(id) = found.map_err(unreadable)? else { return Ok(None) };
    let Some(used) = shared.checkpoints.read(id).await else {
        let message =
            format!("checkpoint {} is being written anew, since another one is removed", checkpoint.name);
        return Err(ToolError::new(ErrorCode::Busy, message).hint("try again in a moment"));
    };
    Ok(Some(Base { id, directory: shared.paths.checkpoint(id), _used: Some(used) }))
}

/// Writes what differs between a memory and its base to `to`, a new file; returns the digest of the memory. `None`, and nothing is written, if that is
/// too much, or the base cannot be read. Blocks.
pub(super) fn write_changes(
    from: &File,
    base: &Base,
    mut to: &File,
    is_wanted: &dyn Fn(u64) -> bool,
) -> io::Result<Option<String>> {
    let written = open_whole(&base.directory)
        .and_then(|memory| vmm::pack_changes(from, (base.id, &memory), to, is_wanted));
    match written {
        Err(error) if error.kind() != io::ErrorKind::Interrupted && !disk::is_full(&error) => {
            tracing::warn!(checkpoint = %base.id, %error, "cannot read a memory that another one is compared with");
            to.set_len(0)?;
            to.rewind()?;
            Ok(None)
        }
        written => written,
    }
}

/// Opens a packed memory, with that of its base if it has one.
pub(super) fn open_packed(packed: &Path, base: Option<&Path>) -> io::Result<Memory> {
    let (file, _) = fs_err::File::open(packed)?.into_parts();
    let base = match (vmm::packed_header(&file)?.base, base) {
        (Some(_), Some(directory)) => Some(Box::new(open_whole(directory)?)),
        (Some(_), None) | (None, _) => None,
    };
    Ok(Memory::Packed(file, base))
}

/// Opens a memory that has no base.
fn open_whole(directory: &Path) -> io::Result<Memory> {
    let files = Files::of(directory);
    match fs_err::File::open(&files.ram) {
        Ok(file) => Ok(Memory::Plain(file.into_parts().0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => open_packed(&files.packed, None),
        Err(error) => Err(error),
    }
}

/// Packs the memories whole that hang from that of a checkpoint, which is being removed.
pub(super) async fn release(shared: &Shared, base: &CheckpointRecord) -> Result<(), ToolError> {
    let (vm, id, paths) = (base.vm, base.id, shared.paths.clone());
    let rows = shared.store.read(move |db| checkpoints::list(db, Some(vm), None, u32::MAX));
    let rows = rows.await.map_err(store_error)?;
    let earlier = base.clone();
    let hanging = spawn_blocking(move || -> Result<Vec<CheckpointRecord>, ToolError> {
        let mut hanging = Vec::new();
        for row in rows.into_iter().filter(|row| is_earlier(&earlier, row)) {
            match base_in(&paths.checkpoint(row.id)) {
                Ok(Some(base)) if base == id => hanging.push(row),
                Ok(_) => {}
                Err(error) => return Err(not_released(&earlier, &row, &error)),
            }
        }
        Ok(hanging)
    });
    for row in hanging.await.map_err(stopped)?? {
        let Some(used) = shared.checkpoints.pack_anew(row.id, CancellationToken::new()).await else {
            let message = format!("checkpoint {} is needed for {}, which is in use", base.name, row.name);
            return Err(ToolError::new(ErrorCode::Busy, message).hint("try again in a moment"));
        };
        let (own, of) = (shared.paths.checkpoint(row.id), shared.paths.checkpoint(id));
        let sha256 = row.manifest.as_ref().map(|manifest| manifest.ram_sha256.clone()).unwrap_or_default();
        let work = spawn_blocking(move || (used, write_whole(&own, &of, &sha256)));
        let (_used, written) = work.await.map_err(stopped)?;
        match written {
            Ok(Some(bytes)) => {
                let own = row.id;
                let recorded = shared.store.write(move |tx| checkpoints::set_memory_bytes(tx, own, bytes));
                recorded.await.map_err(store_error)?;
            }
            Err(error) if disk::is_full(&error) => {
                let message = format!(
                    "checkpoint {} is needed for {}, and the disk has no room to write that anew: {error}",
                    base.name, row.name
                );
                return Err(ToolError::new(ErrorCode::DiskFull, message)
                    .hint(format!("delete {} first, or {ROOM}", row.name)));
            }
            // It could not be restored either.
            Ok(None) => {
                tracing::warn!(checkpoint = %row.name, vm = %row.vm_name, "a damaged memory is lost with its base")
            }
            Err(error) => return Err(not_released(base, &row, &error)),
        }
    }
    Ok(())
}

fn not_released(base: &CheckpointRecord, hanging: &CheckpointRecord, error: &io::Error) -> ToolError {
    let message = format!(
        "checkpoint {} may be needed for {}, whose memory cannot be read or written now: {error}",
        base.name, hanging.name
    );
    ToolError::internal(message).hint(format!("try again, or delete {} first", hanging.name))
}

/// Replaces a packed memory with this digest that has a base by one that has none; returns what it occupies, in bytes. `None`, and it stays, if the two
/// are not what was saved. Blocks.
fn write_whole(directory: &Path, base: &Path, sha256: &str) -> io::Result<Option<u64>> {
    let files = Files::of(directory);
    let written = || -> io::Result<Option<u64>> {
        remove_if_there(&files.packed_part)?;
        let from = match open_packed(&files.packed, Some(base)) {
            Ok(from) => from,
            Err(error) if is_damage(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Others write to this disk as well.
        if disk::free_bytes(directory)? < whole_max(&files, base)?.saturating_add(KEEP_FREE) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let to = make(&files.packed_part)?;
        match vmm::pack(&from, &to, &|_| true) {
            Ok(digest) if digest == sha256 => {}
            Ok(_) => return Ok(None),
            Err(error) if is_damage(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        to.sync_all()?;
        if open_packed(&files.packed_part, None)?.sha256(&|_| true)? != sha256 {
            return Err(io::Error::other("what was written is read as something else"));
        }
        failpoint::reach("checkpoint-made-whole");
        fs_err::rename(&files.packed_part, &files.packed)?;
        sync(directory)?;
        disk::allocated_bytes(&files.packed).map(Some)
    };
    let written = written();
    if !matches!(written, Ok(Some(_)))
        && let Err(error) = remove_if_there(&files.packed_part)
    {
        tracing::warn!(%error, "cannot remove a part of a packed memory; nexusd retries");
    }
    written
}

/// What a packed memory that has a base may occupy once it has none, in bytes: what the two do, but no more than before it was packed.
fn whole_max(files: &Files, base: &Path) -> io::Result<u64> {
    let occupied = vmm::packed_header(fs_err::File::open(&files.packed)?.file())?.occupied;
    let of_base = Files::of(base);
    let of_base = if of_base.is_packed() { of_base.packed } else { of_base.ram };
    let both = disk::allocated_bytes(&files.packed)?.saturating_add(disk::allocated_bytes(&of_base)?);
    Ok(both.min(occupied))
}
