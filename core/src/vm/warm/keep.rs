//! Which prepared machines are kept: those that may be used again, up to a number and a size.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nexus_schema::id::CheckpointId;
use nexus_schema::{Reference, ToolError};
use tokio::task::spawn_blocking;

use super::{Prepared, Sort, is_on, read};
use crate::context::Shared;
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::{disk, remove as files};
use crate::store::{StoreError, assets, images};

/// How long a machine is kept that no VM goes on from.
const UNUSED_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// The most machines that are kept.
const COUNT_MAX: usize = 8;
/// The most that they take on the disk together, in bytes, unless it is one only.
const BYTES_MAX: u64 = 16 << 30;

/// A machine, and what decides whether it is kept.
#[derive(Debug, Clone)]
struct Kept {
    id: CheckpointId,
    sort: Sort,
    bytes: u64,
    /// The time since it was last used.
    unused: Duration,
}

/// All prepared machines that can be read.
pub(super) async fn all(shared: &Shared) -> Result<Vec<Prepared>, ToolError> {
    let root = shared.paths.all_prepared();
    in_background(move || names(&root).iter().filter_map(|name| read(&root.join(name))).collect()).await
}

/// Sets the time of a machine's last use to now. Blocks.
pub(super) fn touch(directory: &Path) {
    let file = std::fs::File::options().write(true).open(directory.join(checkpoint_files::PREPARED));
    if let Err(error) = file.and_then(|file| file.set_modified(SystemTime::now())) {
        tracing::info!(%error, "the last use of a prepared machine is not noted");
    }
}

/// Removes a prepared machine, unless a VM is being started from it. Returns whether it is gone.
pub(crate) async fn remove(shared: &Shared, id: CheckpointId) -> bool {
    let Some(_removal) = shared.checkpoints.remove(id).await else { return false };
    let directory = shared.paths.prepared(id);
    // This file first: without it nobody finds the machine.
    files::path(&directory.join(checkpoint_files::PREPARED)).await;
    files::tree(&directory).await;
    true
}

/// Removes machines that no VM can go on from any more, that were not used for long, or that are too many.
pub(crate) async fn tidy(shared: &Arc<Shared>) {
    match surplus(shared).await {
        Ok(surplus) => {
            for id in surplus {
                if remove(shared, id).await {
                    tracing::info!(machine = %id, "removed a prepared machine");
                }
            }
        }
        Err(error) => tracing::warn!(%error, "cannot look for prepared machines that are not needed"),
    }
}

/// The machines that are not to be kept.
async fn surplus(shared: &Arc<Shared>) -> Result<Vec<CheckpointId>, ToolError> {
    let kept = look(shared).await?;
    if kept.is_empty() {
        return Ok(Vec::new());
    }
    if !is_on(shared).await? {
        return Ok(kept.iter().map(|kept| kept.id).collect());
    }
    let (mut usable, mut surplus) = (Vec::new(), Vec::new());
    for kept in kept {
        let (image, kernel) = (Reference::Id(kept.sort.image), Reference::Id(kept.sort.kernel));
        let found = shared.store.read(move |db| -> Result<bool, StoreError> {
            Ok(images::get(db, &image)?.is_some() && assets::get(db, &kernel)?.is_some())
        });
        let is_there = found.await.map_err(store_error)?;
        match is_there && kept.sort.nexus == env!("CARGO_PKG_VERSION") {
            true => usable.push(kept),
            false => surplus.push(kept.id),
        }
    }
    surplus.extend(beyond(usable));
    Ok(surplus)
}

/// Of machines that can be used, those that were not used for too long, or are too many or too large.
fn beyond(mut usable: Vec<Kept>) -> Vec<CheckpointId> {
    usable.sort_by_key(|kept| kept.unused);
    let (mut count, mut bytes, mut surplus) = (0_usize, 0_u64, Vec::new());
    for kept in usable {
        let all = bytes.saturating_add(kept.bytes);
        if kept.unused > UNUSED_MAX || count == COUNT_MAX || (count > 0 && all > BYTES_MAX) {
            surplus.push(kept.id);
        } else {
            (count, bytes) = (count + 1, all);
        }
    }
    surplus
}

/// The machines that can be removed now to free space, with what each takes on the disk: those that were not used for that long.
pub(crate) async fn removable(
    shared: &Shared,
    unused: Duration,
) -> Result<Vec<(CheckpointId, u64)>, ToolError> {
    let all = look(shared).await?.into_iter().filter(|kept| kept.unused > unused);
    Ok(all.map(|kept| (kept.id, kept.bytes)).collect())
}

async fn look(shared: &Shared) -> Result<Vec<Kept>, ToolError> {
    let root = shared.paths.all_prepared();
    let looked = move || {
        let directories: Vec<PathBuf> = names(&root).iter().map(|name| root.join(name)).collect();
        directories.iter().filter_map(|directory| kept(directory)).collect()
    };
    in_background(looked).await
}

fn kept(directory: &Path) -> Option<Kept> {
    let prepared = read(directory)?;
    let used = std::fs::metadata(directory.join(checkpoint_files::PREPARED)).and_then(|meta| meta.modified());
    let unused = SystemTime::now().duration_since(used.ok()?).unwrap_or_default();
    Some(Kept { id: prepared.id(), sort: prepared.sort, bytes: bytes_of(directory), unused })
}

/// What the files of a machine take on the disk.
fn bytes_of(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_of(&entry.path()),
        _ => disk::allocated_bytes(&entry.path()).unwrap_or(0),
    });
    sizes.sum()
}

/// The names of directories of machines.
fn names(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.parse::<CheckpointId>().is_ok()).collect()
}

/// For the start of the daemon: removes what an earlier one left half made or half removed.
pub(in crate::vm) async fn sweep(shared: &Shared) {
    let root = shared.paths.all_prepared();
    let entries = fs_err::read_dir(&root).into_iter().flatten().flatten();
    let all: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    for path in all {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // One with the name of another would be used and removed as that.
        let is_whole = read(&path).is_some_and(|prepared| prepared.id().to_string() == name);
        if !is_whole {
            tracing::info!(name, "removing a prepared machine that is not whole");
            files::path(&path).await;
        }
    }
}

async fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ToolError> {
    spawn_blocking(work).await.map_err(|e| ToolError::internal(format!("look at prepared machines: {e}")))
}

#[cfg(test)]
mod tests {
    use nexus_schema::ByteSize;

    use super::*;
    use crate::store::random_id;
    use crate::store::vms::TmpPlace;

    fn kept(unused: Duration, bytes: u64) -> Kept {
        let sort = Sort {
            nexus: "1".into(),
            image: random_id(),
            kernel: random_id(),
            initramfs: "a".into(),
            driver: "qemu".into(),
            driver_version: "7.2".into(),
            accel: "tcg".into(),
            vcpus: 1,
            memory: ByteSize::mib(256),
            tmp: TmpPlace::Disk,
        };
        Kept { id: random_id(), sort, bytes, unused }
    }

    #[test]
    fn what_was_used_last_is_kept_up_to_a_number_an_age_and_a_size() {
        let hour = Duration::from_secs(60 * 60);
        assert!(beyond(Vec::new()).is_empty());
        let many: Vec<Kept> = (0..10).map(|age| kept(hour * (10 - age), 1 << 20)).collect();
        assert_eq!(beyond(many.clone()), [many[1].id, many[0].id]);
        let old = kept(UNUSED_MAX + hour, 1);
        assert_eq!(beyond(vec![old.clone(), kept(hour, 1)]), [old.id]);
        // One that is too large alone is of use all the same.
        let (large, small) = (kept(hour, BYTES_MAX + 1), kept(hour * 2, 1));
        assert_eq!(beyond(vec![small.clone(), large]), [small.id]);
    }

    #[test]
    fn directories_that_are_no_machines_are_not_named() {
        let root = tempfile::tempdir().unwrap();
        let id: CheckpointId = random_id();
        for name in [id.to_string(), format!("{id}.part"), "other".to_owned()] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        assert_eq!(names(root.path()), [id.to_string()]);
        // It has no description, so nobody can use it.
        assert!(super::kept(&root.path().join(id.to_string())).is_none());
        assert!(names(&root.path().join("none")).is_empty());
    }
}
