//! Takes a checkpoint: the VM's task saves, this puts what it saved in order.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_schema::id::{BootId, CheckpointId};
use nexus_schema::{ErrorCode, Name, Timestamp, ToolError};
use tokio::task::spawn_blocking;

use super::caps;
use super::check::facts_of;
use crate::access::Charge;
use crate::context::{Command, Handle, Shared, Take, Taken};
use crate::drive::{DISK, KEEP_FREE};
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::{disk, failpoint, process, remove};
use crate::progress::Progress;
use crate::store::checkpoints::{
    self, CheckpointDrive, CheckpointRecord, HostFacts, MANIFEST_VERSION, Manifest,
};
use crate::store::drives::DriveRecord;
use crate::store::tokens::Usage;
use crate::store::vms::VmProcesses;
use crate::store::{Connection, StoreError, now};
use crate::vm::policy;
use crate::vm::wait::ask;
use crate::vmm::{SavedKind, occupied};

/// The work on a checkpoint's files.
const WRITE: &str = "write a checkpoint";

/// A checkpoint to take.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) id: CheckpointId,
    pub(crate) name: Name,
    pub(crate) owner: String,
    pub(crate) tags: std::collections::BTreeMap<String, String>,
    pub(crate) expires_at: Option<Timestamp>,
    /// Only if this is the VM's boot.
    pub(crate) if_boot: Option<BootId>,
    /// The quotas that it counts for.
    pub(crate) charges: Vec<Charge>,
}

/// Takes a checkpoint of a VM, and returns its row. If that fails, nothing of it is left, and the VM goes on.
pub(crate) async fn take(
    shared: &Arc<Shared>,
    handle: &Handle,
    wanted: Wanted,
    progress: &Progress,
) -> Result<CheckpointRecord, ToolError> {
    let (vm, drives) = {
        let view = handle.view.borrow();
        (view.record.clone(), view.drives.clone())
    };
    policy::checkpoint(vm.name.as_str(), vm.state)?;
    policy::checkpointable(&vm)?;
    let (memory_bytes, disk_bytes) = estimate(shared, &drives, vm.processes).await?;
    let sizes = format!("up to {} MiB of memory and {} MiB of drives", memory_bytes >> 20, disk_bytes >> 20);
    progress.step(format!("taking a checkpoint: {sizes}"));
    let row = CheckpointRecord {
        seq: 0,
        id: wanted.id,
        vm: vm.id,
        vm_name: vm.name.clone(),
        parent: vm.lineage.checkpoint,
        name: wanted.name,
        owner: wanted.owner,
        tags: wanted.tags,
        ready: false,
        token: None,
        manifest: None,
        memory_bytes,
        disk_bytes,
        pause_ms: 0,
        created_at: now(),
        expires_at: wanted.expires_at,
    };
    let (charges, begun) = (wanted.charges.clone(), row.clone());
    let inserted = shared.store.write(move |tx| -> Result<(), StoreError> {
        let more = Usage { disk: begun.memory_bytes.saturating_add(begun.disk_bytes), ..Usage::default() };
        charges.iter().try_for_each(|charge| charge.check(tx, more, None))?;
        checkpoints::insert(tx, &begun)
    });
    inserted.await.map_err(store_error)?;
    failpoint::reach("checkpoint-begun");
    let part = shared.paths.checkpoint_part(row.id);
    match make(shared, handle, row.clone(), &part, (wanted.if_boot, wanted.charges), progress).await {
        Ok(row) => {
            // The tree's next checkpoint hangs from this one.
            let checkpoint = row.id;
            if let Err(error) = ask(handle, |reply| Command::Checkpointed { checkpoint, reply }).await {
                tracing::info!(vm = %row.vm_name, %error, "a vm does not know that a checkpoint of it was taken");
            }
            caps::begin(shared, row.vm);
            Ok(row)
        }
        Err(error) => {
            remove::tree(&part).await;
            remove::tree(&shared.paths.checkpoint(row.id)).await;
            let id = row.id;
            shared.store.write(move |tx| checkpoints::delete(tx, id)).await.map_err(store_error)?;
            Err(error)
        }
    }
}

/// Returns how much memory of a guest there is to save, in bytes. Blocks.
pub(in crate::vm) fn memory_of(processes: VmProcesses) -> u64 {
    // What the VMM of a restored guest has not touched yet is not resident in it.
    let resident = || process::usage(processes.vmm_pid).ok().flatten().map(|used| used.memory_bytes);
    occupied(processes.shim_pid).or_else(resident).unwrap_or(0)
}

/// What a checkpoint may occupy, of memory and of drives, in bytes. Fails if the disk has no room for that.
async fn estimate(
    shared: &Shared,
    drives: &[DriveRecord],
    processes: Option<VmProcesses>,
) -> Result<(u64, u64), ToolError> {
    let files: Vec<PathBuf> = drives.iter().map(|drive| shared.paths.drive(drive.id).join(DISK)).collect();
    let (root, is_copied) = (shared.paths.checkpoints(), shared.drives.backend() == "copy");
    let looked = spawn_blocking(move || {
        let disks: u64 = files.iter().filter_map(|file| disk::allocated_bytes(file).ok()).sum();
        (processes.map_or(0, memory_of), disks, disk::free_bytes(&root).ok())
    });
    let (memory, disks, free) =
        looked.await.map_err(|e| ToolError::internal(format!("look at the drives: {e}")))?;
    let needed = memory.saturating_add(if is_copied { disks } else { 0 }).saturating_add(KEEP_FREE);
    match free {
        Some(free) if free < needed => {
            let mib = |bytes: u64| bytes >> 20;
            let message = format!(
                "a checkpoint needs up to {} MiB, and the disk of the state directory has {} MiB free",
                mib(needed),
                mib(free)
            );
            Err(ToolError::new(ErrorCode::DiskFull, message)
                .hint("free space, for example with checkpoint_delete or prune; checkpoint_list shows sizes"))
        }
        _ => Ok((memory, disks)),
    }
}

/// Makes the files of a checkpoint, and records that they are whole.
async fn make(
    shared: &Arc<Shared>,
    handle: &Handle,
    mut row: CheckpointRecord,
    part: &Path,
    (if_boot, charges): (Option<BootId>, Vec<Charge>),
    progress: &Progress,
) -> Result<CheckpointRecord, ToolError> {
    let (made, below) = (part.to_owned(), part.join(checkpoint_files::DRIVES));
    in_background(WRITE, move || {
        let mut directory = std::fs::DirBuilder::new();
        directory.mode(0o700);
        directory.create(&made)?;
        directory.create(&below)
    })
    .await?;
    let take = Box::new(Take { directory: part.to_owned(), if_boot, progress: progress.clone() });
    let taken = ask(handle, |reply| Command::Checkpoint { take, reply }).await?;
    progress.step("writing the checkpoint to the disk");
    let facts = host_facts(shared, &taken).await?;
    let Taken { saved, record, drives, interface, quiesced, processes, pause_ms } = *taken;
    let (Some(boot_id), Some(token), Some(guest)) =
        (record.boot_id, record.token.clone(), record.guest.clone())
    else {
        return Err(ToolError::internal(format!("{} is ready, but has no boot", record.name)));
    };
    let own = part.to_owned();
    let ids: Vec<String> = drives.iter().map(|drive| format!("{}.ext4", drive.id)).collect();
    let (drive_bytes, disk_bytes) = in_background(WRITE, move || sync_drives(&own, &ids)).await?;
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        checkpoint: row.id,
        vm: record.id,
        boot_id,
        spec: record.spec.clone(),
        image_id: record.image_id,
        image_name: record.image_name.clone(),
        kernel_id: record.kernel_id,
        arch: record.arch.clone(),
        guest,
        host: facts,
        private: saved.kind == SavedKind::Private,
        interface,
        state_sha256: saved.state_sha256,
        ram_sha256: saved.ram_sha256,
        quiesced,
        drive_bytes,
        processes,
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|e| ToolError::internal(format!("encode a manifest: {e}")))?;
    let (own, whole) = (part.to_owned(), shared.paths.checkpoint(row.id));
    let memory_bytes = in_background(WRITE, move || publish(&own, &whole, &text)).await?;
    let estimated = row.memory_bytes.saturating_add(row.disk_bytes);
    row.token = Some(token);
    row.manifest = Some(manifest);
    row.memory_bytes = memory_bytes;
    row.disk_bytes = disk_bytes;
    row.pause_ms = pause_ms;
    row.parent = record.lineage.checkpoint;
    row.ready = true;
    let copies = copies(&drives);
    let ready = row.clone();
    let recorded = shared.store.write(move |tx| record_made(tx, &ready, &copies, (estimated, &charges)));
    recorded.await.map_err(store_error)?;
    failpoint::reach("checkpoint-ready");
    Ok(row)
}

/// Records that the files of a checkpoint are whole. The guest ran on since the estimate that its quotas allowed, so they are asked again if it takes more.
fn record_made(
    tx: &Connection,
    ready: &CheckpointRecord,
    copies: &[CheckpointDrive],
    (estimated, charges): (u64, &[Charge]),
) -> Result<(), StoreError> {
    checkpoints::made(tx, ready, copies)?;
    if ready.memory_bytes.saturating_add(ready.disk_bytes) <= estimated {
        return Ok(());
    }
    charges.iter().try_for_each(|charge| charge.check_held(tx))
}

/// The drives as rows of the checkpoint.
fn copies(drives: &[DriveRecord]) -> Vec<CheckpointDrive> {
    let numbered = (0..).zip(drives);
    let copy = |(position, drive): (u32, &DriveRecord)| CheckpointDrive {
        position,
        drive: drive.id,
        name: drive.name.clone(),
        mount: drive.attachment.as_ref().and_then(|at| at.mount.clone()),
        size: drive.size,
        read_only: drive.read_only,
        image_id: drive.image_id,
    };
    numbered.map(copy).collect()
}

/// What the VM ran on: of its VMM what its shim says, of the host what is so now.
pub(in crate::vm) async fn host_facts(shared: &Shared, taken: &Taken) -> Result<HostFacts, ToolError> {
    let record = &taken.record;
    let choice = shared.choose_driver_of(record).await?;
    let facts = spawn_blocking(move || facts_of(&choice)).await;
    let facts = facts.map_err(|e| ToolError::internal(format!("look at the host: {e}")))?;
    Ok(HostFacts {
        driver: record.driver.clone().unwrap_or_default(),
        driver_version: record.driver_version.clone().unwrap_or_default(),
        binary_sha256: taken.saved.qemu.binary_sha256.clone(),
        accel: record.accel.clone().unwrap_or_default(),
        ..facts
    })
}

/// Syncs the copies of drives; returns their lengths, and what they occupy. Blocks.
fn sync_drives(part: &Path, drives: &[String]) -> std::io::Result<(Vec<u64>, u64)> {
    let (mut lengths, mut occupied) = (Vec::new(), 0_u64);
    for name in drives {
        let path = part.join(checkpoint_files::DRIVES).join(name);
        let file = fs_err::File::open(&path)?;
        file.sync_all()?;
        lengths.push(file.metadata()?.len());
        occupied = occupied.saturating_add(disk::allocated_bytes(&path)?);
    }
    Ok((lengths, occupied))
}

/// Writes the manifest, and gives the directory its name once all of it is on the disk. Returns what the memory occupies. Blocks.
pub(in crate::vm) fn publish(part: &Path, whole: &Path, manifest: &[u8]) -> std::io::Result<u64> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let path = part.join(checkpoint_files::MANIFEST);
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(manifest)?;
    file.sync_all()?;
    let memory = disk::allocated_bytes(&part.join(checkpoint_files::RAM))?;
    for name in [checkpoint_files::STATE, checkpoint_files::RAM, checkpoint_files::DRIVES, ""] {
        fs_err::File::open(part.join(name))?.sync_all()?;
    }
    failpoint::reach("checkpoint-written");
    fs_err::rename(part, whole)?;
    if let Some(parent) = whole.parent() {
        fs_err::File::open(parent)?.sync_all()?;
    }
    failpoint::reach("checkpoint-named");
    Ok(memory)
}

/// Does blocking work on files. `what` is what fails with it, such as `write a checkpoint`.
pub(in crate::vm) async fn in_background<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, ToolError> {
    let done = spawn_blocking(work).await;
    let done = done.map_err(|e| ToolError::internal(format!("{what}: {e}")))?;
    done.map_err(|error| {
        let code = if disk::is_full(&error) { ErrorCode::DiskFull } else { ErrorCode::Internal };
        ToolError::new(code, format!("{what}: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{self, Caller, Tokens};
    use crate::store::{Store, vms};

    #[tokio::test]
    async fn a_checkpoint_that_became_larger_than_its_estimate_is_asked_of_the_quota_again() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("nexus.db")).unwrap();
        let tokens = Tokens::default();
        let owner = access::promised::tests::caller(&tokens, &Caller::owner("uid:0"), 200).owner.to_string();
        let vm = crate::store::tests::vm("web", 3);
        // An estimate of 100 bytes of memory, and 20 of drives.
        let row = CheckpointRecord { owner, ..crate::store::tests::checkpoint(&vm, "clean", None) };
        let begun = row.clone();
        let inserted = store.write(move |tx| -> Result<(), StoreError> {
            vms::insert(tx, &vm)?;
            checkpoints::insert(tx, &begun)
        });
        inserted.await.unwrap();
        let record = async |memory_bytes: u64| {
            let (charges, ready) =
                (tokens.charges(&row.owner), CheckpointRecord { memory_bytes, ..row.clone() });
            store.write(move |tx| record_made(tx, &ready, &[], (120, &charges))).await
        };
        assert!(matches!(record(181).await, Err(StoreError::QuotaExceeded { .. })));
        let id = row.id;
        let found = store.read(move |db| checkpoints::get(db, id)).await.unwrap();
        assert_eq!(found, None, "nothing of that is kept");
        record(180).await.unwrap();
        let found = store.read(move |db| checkpoints::get(db, id)).await.unwrap();
        assert_eq!(found.map(|row| row.memory_bytes), Some(180));
    }

    #[test]
    fn a_checkpoint_has_its_name_once_it_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let (part, whole) = (root.path().join("a.part"), root.path().join("a"));
        std::fs::create_dir_all(part.join(checkpoint_files::DRIVES)).unwrap();
        std::fs::write(part.join(checkpoint_files::STATE), "state").unwrap();
        std::fs::write(part.join(checkpoint_files::RAM), "ram").unwrap();
        std::fs::write(part.join("drives/d.ext4"), "drive").unwrap();
        assert_eq!(sync_drives(&part, &["d.ext4".to_owned()]).unwrap().0, [5]);
        assert!(sync_drives(&part, &["e.ext4".to_owned()]).is_err());
        publish(&part, &whole, b"{}").unwrap();
        assert!(!part.exists());
        assert_eq!(std::fs::read(whole.join(checkpoint_files::RAM)).unwrap(), b"ram");
        assert_eq!(std::fs::read(whole.join(checkpoint_files::MANIFEST)).unwrap(), b"{}");
    }
}
