//! Rolls a VM back to a checkpoint, and forks VMs from one. Nothing changes before the checkpoint was checked; a fork makes all of its VMs, or none.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures::future::join_all;
use nexus_schema::id::{BootId, DriveId, OpId, VmId};
use nexus_schema::link::ResumeKind;
use nexus_schema::name::NAME_MAX;
use nexus_schema::network::{NetworkMode, NetworkPolicy};
use nexus_schema::tools::checkpoint::{RestoreContract, RestoredVm};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, Timestamp, ToolError};

use super::check::check;
use crate::access::Charge;
use crate::context::{Command, Handle, RestoreFrom, Shared, drive_error};
use crate::op::store_error;
use crate::os::failpoint;
use crate::os::paths::checkpoint_files;
use crate::progress::Progress;
use crate::store::checkpoints::{self, CheckpointDrive, CheckpointRecord, Manifest};
use crate::store::drives::{Attachment, DriveRecord};
use crate::store::tokens::Usage;
use crate::store::vms::{GuestRecord, Lineage, VmRecord, VmSpec};
use crate::store::{StoreError, Transaction, assets, drives, history, images, now, random_id, vms};
use crate::vm::actor::{self, DAEMON};
use crate::vm::create::{ask, until_ready};

/// The first line of a forked VM's history.
const REQUESTED: &str = "fork requested";

/// Rolls a VM back to one of its checkpoints, and waits until it is ready.
pub(crate) async fn rollback(
    shared: &Arc<Shared>,
    handle: &Handle,
    checkpoint: &CheckpointRecord,
    who: &str,
    if_boot: Option<BootId>,
    progress: &Progress,
) -> Result<RestoredVm, ToolError> {
    let _used = shared.checkpoints.read().await;
    progress.step("checking the checkpoint");
    let manifest = check(shared, checkpoint).await?;
    let id = checkpoint.id;
    let copies = shared.store.read(move |db| checkpoints::drives_of(db, id)).await.map_err(store_error)?;
    let (name, own, mode) = {
        let view = handle.view.borrow();
        let own: Vec<DriveId> = view.drives.iter().map(|drive| drive.id).collect();
        (view.record.name.clone(), own, view.record.spec.network.mode)
    };
    same_drives(&name, checkpoint, &own, &copies)?;
    same_card(&manifest, mode)?;
    let directory = shared.paths.checkpoint(id);
    let files = copies.iter().map(|copy| (copy.drive, file_of(&directory, copy), copy.size));
    let restore = Box::new(RestoreFrom {
        who: who.to_owned(),
        kind: ResumeKind::Rollback,
        drives: files.collect(),
        directory: directory.clone(),
        token: checkpoint.token.clone().unwrap_or_default(),
        manifest,
        if_boot,
        progress: progress.clone(),
    });
    let quiesced = restore.manifest.quiesced;
    let begun = Instant::now();
    let boot = ask(handle, |reply| Command::Restore { restore, reply }).await?;
    failpoint::reach("rollback-launched");
    let ready = until_ready(&mut handle.view.clone(), boot, progress).await;
    ready.map_err(|error| {
        error_of_restore(error, "vm_start starts it from its disk, which is that of the checkpoint")
    })?;
    restored(handle, boot, ResumeKind::Rollback, quiesced, begun)
}

/// Refuses to roll back a VM that has other drives than then.
fn same_drives(
    vm: &Name,
    checkpoint: &CheckpointRecord,
    own: &[DriveId],
    copies: &[CheckpointDrive],
) -> Result<(), ToolError> {
    let then: Vec<DriveId> = copies.iter().map(|copy| copy.drive).collect();
    if own == then {
        return Ok(());
    }
    let names: Vec<&str> = copies.iter().map(|copy| copy.name.as_str()).collect();
    let message = format!(
        "{vm} has other drives than at checkpoint {}, when it had {}",
        checkpoint.name,
        names.join(", ")
    );
    Err(ToolError::new(ErrorCode::Changed, message).hint(
        "attach and detach drives until it has those, or make another VM of the checkpoint with vm_fork",
    ))
}

/// Refuses a network mode that needs a network card where the saved machine has none, or the other way round.
pub(crate) fn same_card(manifest: &Manifest, mode: NetworkMode) -> Result<(), ToolError> {
    let message = match (manifest.interface, mode == NetworkMode::Nat) {
        (true, true) | (false, false) => return Ok(()),
        (true, false) => "the saved machine has a network card, which only network nat has",
        (false, true) => "the saved machine has no network card, which network nat needs",
    };
    Err(ToolError::invalid(message)
        .hint("use the network mode that the VM had when the checkpoint was taken"))
}

fn file_of(directory: &std::path::Path, copy: &CheckpointDrive) -> PathBuf {
    directory.join(checkpoint_files::DRIVES).join(format!("{}.ext4", copy.drive))
}

/// A guest that did not prove what it renewed has failed, with the reason of its VM.
fn error_of_restore(error: ToolError, hint: &str) -> ToolError {
    match error.code {
        ErrorCode::BootFailed | ErrorCode::VmGone => {
            ToolError::new(error.code, format!("the restored guest did not go on: {}", error.message))
                .hint(format!("check vm_logs; {hint}"))
        }
        _ => error,
    }
}

/// What became of a VM that is ready after its restore.
fn restored(
    handle: &Handle,
    boot: BootId,
    kind: ResumeKind,
    quiesced: bool,
    begun: Instant,
) -> Result<RestoredVm, ToolError> {
    let view = handle.view.borrow();
    let record = &view.record;
    if record.boot_id != Some(boot) {
        return Err(ToolError::new(
            ErrorCode::Changed,
            format!("{} was started anew meanwhile", record.name),
        ));
    }
    Ok(RestoredVm {
        id: record.id,
        name: record.name.clone(),
        boot_id: boot,
        contract: contract(kind, quiesced, record.guest.as_ref()),
        ready_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

/// What a restore kept, renewed, closed, and cannot renew.
fn contract(kind: ResumeKind, quiesced: bool, guest: Option<&GuestRecord>) -> RestoreContract {
    let resumed = guest.and_then(|guest| guest.resumed.clone()).unwrap_or_default();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut not_renewed = words(&["random state that programs keep in their memory"]);
    if kind == ResumeKind::Fork {
        not_renewed.push("keys and tokens that programs keep in their memory or in files".into());
    }
    RestoreContract {
        kept: words(&["memory", "processes", "disk, with what was not synced"]),
        renewed: resumed.renewed,
        closed: words(&["connections into the VM and out of it"]),
        not_renewed,
        quiesced,
        clock_behind_ms: resumed.clock_behind_ms,
    }
}

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
    let _used = shared.checkpoints.read().await;
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
    match restored {
        Ok(vms) => {
            shared.store.write(move |tx| checkpoints::keep_forks(tx, op)).await.map_err(store_error)?;
            failpoint::reach("fork-kept");
            Ok(vms)
        }
        Err(error) => {
            for ((record, drives), handle) in made.iter().zip(&handles) {
                undo(handle, record, drives.iter().map(|drive| drive.id).collect(), &error).await;
            }
            Err(error_of_restore(error, "none of its VMs is kept; fork again, or use another checkpoint"))
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
    Ok(VmRecord {
        id: child.id,
        name: child.name.clone(),
        state: VmState::Creating,
        reason: None,
        generation: 1,
        owner: forking.owner.clone(),
        tags: forking.tags.clone(),
        protected: false,
        arch: manifest.arch.clone(),
        cid: vms::free_cid(tx)?,
        spec: VmSpec {
            hostname: child.name.to_string(),
            network: forking.network.clone(),
            files: std::collections::BTreeMap::new(),
            start: true,
            run: None,
            ..manifest.spec.clone()
        },
        image_id,
        image_name: manifest.image_name.clone(),
        kernel_id,
        driver: None,
        driver_version: None,
        accel: None,
        boot_id: None,
        token: None,
        guest: None,
        timings: None,
        processes: None,
        created_at: now(),
        started_at: None,
        expires_at: forking.expires_at,
        lineage: Lineage { parent, checkpoint: Some(checkpoint.id) },
        suspended: None,
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

/// Removes a VM of a fork that failed.
async fn undo(handle: &Handle, record: &VmRecord, drives: Vec<DriveId>, why: &ToolError) {
    let state = handle.view.borrow().record.state;
    let removed = match state {
        VmState::Creating => {
            let reason = format!("the fork failed: {}", why.message);
            ask(handle, |reply| Command::Undo { reason, drives, reply }).await
        }
        _ => delete(handle).await,
    };
    if let Err(error) = removed
        && error.code != ErrorCode::VmNotFound
    {
        tracing::error!(vm = %record.name, %error, "cannot remove a vm of a fork that failed");
    }
}

async fn delete(handle: &Handle) -> Result<(), ToolError> {
    let (who, why) = (DAEMON.to_owned(), "deleted: its fork did not end well");
    ask(handle, |reply| Command::Delete { who, force: true, if_boot: None, why, reply }).await.map(drop)
}

/// Removes the VMs of a fork that an earlier daemon did not finish.
pub(crate) async fn undo_forks(shared: &Shared, op: OpId) -> Result<(), ToolError> {
    let forks = shared.store.read(move |db| checkpoints::forks_of(db, op)).await.map_err(store_error)?;
    for vm in forks {
        let Ok(handle) = shared.vms.of_daemon(&Reference::Id(vm)) else { continue };
        // One that cannot be deleted, because it was protected meanwhile, keeps no daemon from starting.
        if let Err(error) = delete(&handle).await {
            tracing::error!(%vm, %error, "cannot remove a vm of a fork that did not end; delete it with vm_delete");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nexus_schema::link::Resumed;

    use super::*;
    use crate::store::tests::vm;

    #[test]
    fn other_drives_than_then_are_refused_by_name() {
        let web = vm("web", 3);
        let checkpoint = crate::store::tests::checkpoint(&web, "clean", None);
        let [root, data] = [1, 2].map(|id| DriveId::from_i64(id).unwrap());
        let copy = CheckpointDrive {
            position: 0,
            drive: root,
            name: "web-root".parse().unwrap(),
            mount: None,
            size: ByteSize::gib(1),
            read_only: false,
            image_id: None,
        };
        same_drives(&web.name, &checkpoint, &[root], std::slice::from_ref(&copy)).unwrap();
        for own in [&[][..], &[data], &[root, data]] {
            let error = same_drives(&web.name, &checkpoint, own, std::slice::from_ref(&copy)).unwrap_err();
            assert!(error.message.contains("clean, when it had web-root"), "{error}");
            assert!(error.hint.unwrap().contains("vm_fork"));
        }
    }

    #[test]
    fn the_contract_says_what_the_guest_renewed_and_what_nobody_can() {
        let resumed = Resumed { renewed: vec!["clock".into()], failed: Vec::new(), clock_behind_ms: 14_000 };
        let mut guest: GuestRecord = serde_json::from_value(serde_json::json!({
            "hello": { "protocol": 1, "min_protocol": 1, "build": "", "kernel": "", "arch": "", "kernel_boot_id": "", "uptime_ms": 1,
                "init": "agent" },
            "protocol": 1,
        }))
        .unwrap();
        guest.resumed = Some(resumed);
        let fork = contract(ResumeKind::Fork, true, Some(&guest));
        assert_eq!(
            (fork.renewed, fork.clock_behind_ms, fork.quiesced),
            (vec!["clock".to_owned()], 14_000, true)
        );
        assert_eq!((fork.not_renewed.len(), fork.kept.len()), (2, 3));
        assert_eq!(contract(ResumeKind::Rollback, false, None).not_renewed.len(), 1);
    }
}
