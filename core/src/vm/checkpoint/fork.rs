//! Forks VMs from a checkpoint: all of them, or none.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures::future::join_all;
use nexus_schema::id::{DriveId, OpId, VmId};
use nexus_schema::link::ResumeKind;
use nexus_schema::name::NAME_MAX;
use nexus_schema::network::NetworkPolicy;
use nexus_schema::tools::checkpoint::RestoredVm;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, Timestamp, ToolError};

use super::check::check;
use super::packed::begin_restore;
use super::restore::{error_of_restore, file_of, restored};
use crate::access::Charge;
use crate::context::{Command, Handle, RestoreFrom, Shared, drive_error};
use crate::op::store_error;
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::checkpoints::{self, CheckpointDrive, CheckpointRecord, Manifest};
use crate::store::drives::{Attachment, DriveRecord};
use crate::store::tokens::Usage;
use crate::store::vms::{Lineage, VmRecord, VmSpec};
use crate::store::{StoreError, Transaction, assets, drives, history, images, now, random_id, vms};
use crate::vm::actor;
use crate::vm::wait::{ask, until_ready};

/// The first line of a forked VM's history.
const REQUESTED: &str = "fork requested";

/// One VM to fork.
#[derive(Debug, Clone)]
pub(crate) struct Child {
    pub(crate) id: VmId,
    pub(crate) name: Name,
}

/// A fork to make.
#[derive(Debug)]
pub(crate) struct Forking {
    pub(crate) op: OpId,
    pub(crate) owner: String,
    pub(crate) children: Vec<Child>,
    pub(crate) tags: std::collections::BTreeMap<String, String>,
    pub(crate) expires_at: Option<Timestamp>,
    /// What they may reach.
    pub(crate) network: NetworkPolicy,
    /// The quotas that they count for.
    pub(crate) charges: Vec<Charge>,
}

/// Forks VMs from a checkpoint, and waits until all of them are ready. If one fails, all of them are removed.
pub(crate) async fn fork(
    shared: &Arc<Shared>,
    checkpoint: &CheckpointRecord,
    forking: Forking,
    progress: &Progress,
) -> Result<Vec<RestoredVm>, ToolError> {
    let _used = begin_restore(shared, checkpoint, progress).await?;
    progress.step("checking the checkpoint");
    let manifest = check(shared, checkpoint).await?;
    let id = checkpoint.id;
    let copies = shared.store.read(move |db| checkpoints::drives_of(db, id)).await.map_err(store_error)?;
    let op = forking.op;
    let made = insert(shared, checkpoint, &manifest, &copies, forking).await?;
    failpoint::reach("fork-begun");
    let mut handles = Vec::with_capacity(made.len());
    for (record, _) in &made {
        shared.events.vm(record, None, REQUESTED);
        handles.push(actor::spawn(shared, record.clone(), Vec::new(), None));
    }
    shared.lifetimes.notify_one();
    progress.step("restoring the VMs");
    let all = made.iter().zip(&handles).map(|((record, drives), handle)| {
        Box::pin(one(shared, checkpoint, &manifest, &copies, (record, drives), handle, progress))
    });
    let all = tokio::select! {
        all = join_all(all) => all,
        () = progress.cancelled() => vec![Err(ToolError::new(ErrorCode::Cancelled, "the fork was cancelled"))],
    };
    let restored: Result<Vec<RestoredVm>, ToolError> = all.into_iter().collect();
    let kept = match restored {
        Ok(vms) => {
            let kept = shared.store.write(move |tx| checkpoints::keep_forks(tx, op)).await;
            kept.map(|()| vms).map_err(store_error)
        }
        Err(error) => {
            Err(error_of_restore(error, "none of its VMs is kept; fork again, or use another checkpoint"))
        }
    };
    match kept {
        Ok(vms) => {
            failpoint::reach("fork-kept");
            Ok(vms)
        }
        Err(error) => {
            for ((record, drives), handle) in made.iter().zip(&handles) {
                let drives = drives.iter().map(|drive| drive.id).collect();
                undo(handle, &record.name, drives, &format!("the fork failed: {}", error.message)).await;
            }
            Err(error)
        }
    }
}

/// The row of a VM that is forked, and those of its drives.
type Made = (VmRecord, Vec<DriveRecord>);

/// Inserts the rows of all VMs and their drives.
async fn insert(
    shared: &Shared,
    checkpoint: &CheckpointRecord,
    manifest: &Manifest,
    copies: &[CheckpointDrive],
    forking: Forking,
) -> Result<Vec<Made>, ToolError> {
    let (checkpoint, manifest, copies) = (checkpoint.clone(), manifest.clone(), copies.to_vec());
    let inserted = shared.store.write(move |tx| -> Result<Vec<Made>, StoreError> {
        let disk = copies.iter().fold(0_u64, |sum, copy| sum.saturating_add(copy.size.as_bytes()));
        let count = forking.children.len() as u64;
        let taken = Usage {
            vms: count,
            vcpus: u64::from(manifest.spec.vcpus).saturating_mul(count),
            memory: manifest.spec.memory.as_bytes().saturating_mul(count),
            disk: disk.saturating_mul(count),
        };
        forking.charges.iter().try_for_each(|charge| charge.check(tx, taken, None))?;
        let made = forking.children.iter().map(|child| -> Result<Made, StoreError> {
            let record = child_of(tx, &checkpoint, &manifest, &forking, child)?;
            vms::insert(tx, &record)?;
            checkpoints::claim_fork(tx, forking.op, record.id)?;
            let state = Some(VmState::Creating);
            history::insert(tx, record.id, &record.name, None, state, REQUESTED, &forking.owner, None)?;
            let drives = copies.iter().map(|copy| -> Result<DriveRecord, StoreError> {
                let drive = drive_of(tx, copy, &record)?;
                drives::insert(tx, &drive)?;
                drive.attachment.iter().try_for_each(|to| drives::attach(tx, drive.id, to))?;
                Ok(drive)
            });
            let drives = drives.collect::<Result<Vec<_>, StoreError>>()?;
            Ok((record, drives))
        });
        made.collect()
    });
    inserted.await.map_err(store_error)
}

/// The row of a forked VM.
fn child_of(
    tx: &Transaction<'_>,
    checkpoint: &CheckpointRecord,
    manifest: &Manifest,
    forking: &Forking,
    child: &Child,
) -> Result<VmRecord, StoreError> {
    // What it came from may be deleted since.
    let image_id = match manifest.image_id {
        Some(id) => images::get(tx, &Reference::Id(id))?.map(|image| image.id),
        None => None,
    };
    let kernel_id = match manifest.kernel_id {
        Some(id) => assets::get(tx, &Reference::Id(id))?.map(|kernel| kernel.id),
        None => None,
    };
    let parent = vms::get(tx, &Reference::Id(checkpoint.vm))?.map(|vm| vm.id);
    let spec = VmSpec {
        hostname: child.name.to_string(),
        network: forking.network.clone(),
        files: std::collections::BTreeMap::new(),
        start: true,
        run: None,
        ..manifest.spec.clone()
    };
    let (owner, arch, cid) = (forking.owner.clone(), manifest.arch.clone(), vms::free_cid(tx)?);
    Ok(VmRecord {
        tags: forking.tags.clone(),
        image_id,
        image_name: manifest.image_name.clone(),
        kernel_id,
        expires_at: forking.expires_at,
        lineage: Lineage { parent, checkpoint: Some(checkpoint.id) },
        ..VmRecord::creating(child.id, child.name.clone(), owner, arch, cid, spec)
    })
}

/// The row of a forked VM's drive.
fn drive_of(tx: &Transaction<'_>, copy: &CheckpointDrive, vm: &VmRecord) -> Result<DriveRecord, StoreError> {
    let id: DriveId = random_id();
    let image_id = match copy.image_id {
        Some(image) => images::get(tx, &Reference::Id(image))?.map(|image| image.id),
        None => None,
    };
    let parent_id = drives::get(tx, &Reference::Id(copy.drive))?.map(|drive| drive.id);
    Ok(DriveRecord {
        id,
        name: drive_name(&vm.name, id, if copy.position == 0 { "root" } else { "data" }),
        image_id,
        parent_id,
        made_for: Some(vm.id),
        attachment: Some(Attachment { vm: vm.id, position: copy.position, mount: copy.mount.clone() }),
        ready: false,
        size: copy.size,
        read_only: copy.read_only,
        owner: vm.owner.clone(),
        created_at: now(),
    })
}

/// The name of a forked VM's drive: the VM's name, truncated if necessary, what it is, and a part of its id.
fn drive_name(vm: &Name, id: DriveId, what: &str) -> Name {
    let text = id.to_string();
    let head: String = vm.as_str().chars().take(NAME_MAX - 12).collect();
    let name = format!("{head}-{what}-{}", &text[text.len() - 6..]);
    // It begins as the VM's name does and has no other characters.
    name.parse().unwrap_or_else(|_| vm.clone())
}

/// Makes the drives of one VM, and restores it.
async fn one(
    shared: &Arc<Shared>,
    checkpoint: &CheckpointRecord,
    manifest: &Manifest,
    copies: &[CheckpointDrive],
    (record, drives): (&VmRecord, &[DriveRecord]),
    handle: &Handle,
    progress: &Progress,
) -> Result<RestoredVm, ToolError> {
    let directory = shared.paths.checkpoint(checkpoint.id);
    let mut ready = Vec::with_capacity(drives.len());
    for (copy, drive) in copies.iter().zip(drives) {
        let (file, size): (PathBuf, ByteSize) = (file_of(&directory, copy), copy.size);
        let path = shared.paths.drive(drive.id);
        shared.drives.copy_exactly(&file, &path, size, progress).await.map_err(drive_error)?;
        let made = DriveRecord { ready: true, ..drive.clone() };
        let row = made.clone();
        shared.store.write(move |tx| drives::made(tx, &row)).await.map_err(store_error)?;
        ready.push(made);
    }
    failpoint::reach("fork-drives");
    let created = Box::new(record.clone());
    ask(handle, |reply| Command::Created { record: created, drives: ready, reply }).await?;
    let restore = Box::new(RestoreFrom {
        who: record.owner.clone(),
        kind: ResumeKind::Fork,
        directory,
        manifest: manifest.clone(),
        token: checkpoint.token.clone().unwrap_or_default(),
        drives: Vec::new(),
        if_boot: None,
        progress: progress.clone(),
    });
    let begun = Instant::now();
    let boot = ask(handle, |reply| Command::Restore { restore, reply }).await?;
    failpoint::reach("fork-launched");
    until_ready(&mut handle.view.clone(), boot, progress).await?;
    restored(handle, boot, ResumeKind::Fork, manifest.quiesced, begun)
}

/// Removes a VM of a fork that did not end well, whatever was set on it meanwhile. `drives` are those that were made for it.
async fn undo(handle: &Handle, name: &Name, drives: Vec<DriveId>, reason: &str) {
    let reason = reason.to_owned();
    if let Err(error) = ask(handle, |reply| Command::Undo { reason, drives, reply }).await
        && error.code != ErrorCode::VmNotFound
    {
        tracing::error!(vm = %name, %error, "cannot remove a vm of a fork that failed; it is removed at the next start");
    }
}

/// For the start of the daemon: removes the VMs of forks that an earlier one did not finish, or could not undo. One that cannot be removed keeps no daemon
/// from starting.
pub(crate) async fn undo_forks(shared: &Shared) -> Result<(), ToolError> {
    for vm in shared.store.read(checkpoints::unfinished_forks).await.map_err(store_error)? {
        let Ok(handle) = shared.vms.of_daemon(&Reference::Id(vm)) else { continue };
        let name = handle.view.borrow().record.name.clone();
        undo(&handle, &name, Vec::new(), "deleted: its fork did not end well").await;
    }
    Ok(())
}
