//! Rolls a VM back to one of its checkpoints. Nothing changes before the checkpoint was checked.

use std::sync::Arc;
use std::time::Instant;

use nexus_schema::id::{BootId, DriveId};
use nexus_schema::link::ResumeKind;
use nexus_schema::tools::checkpoint::RestoredVm;
use nexus_schema::{ErrorCode, Name, ToolError};

use super::check::{check, is_there};
use super::packed::begin_restore;
use super::restore::{error_of_restore, file_of, restored, same_card};
use crate::context::{Command, Handle, RestoreFrom, Shared, Used};
use crate::op::store_error;
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::checkpoints::{self, CheckpointDrive, CheckpointRecord, Manifest};
use crate::store::vms::VmRecord;
use crate::vm::policy;
use crate::vm::wait::{ask, until_ready};

/// A checkpoint that a VM can be rolled back to. It is not removed meanwhile.
#[derive(Debug)]
pub(crate) struct Target {
    checkpoint: CheckpointRecord,
    manifest: Manifest,
    copies: Vec<CheckpointDrive>,
    _used: Used,
}

/// Checks that a VM can be rolled back to one of its checkpoints. Reads all of its memory.
pub(crate) async fn target(
    shared: &Arc<Shared>,
    handle: &Handle,
    checkpoint: CheckpointRecord,
    progress: &Progress,
) -> Result<Target, ToolError> {
    let used = begin_restore(shared, &checkpoint, progress).await?;
    progress.step("checking the checkpoint");
    let manifest = check(shared, &checkpoint).await?;
    let id = checkpoint.id;
    let copies = shared.store.read(move |db| checkpoints::drives_of(db, id)).await.map_err(store_error)?;
    let target = Target { checkpoint, manifest, copies, _used: used };
    fits(handle, &target)?;
    Ok(target)
}

/// Refuses to roll a VM back whose end would be taken for that of its command; and one that is falling asleep or waking: its saved memory would be left
/// beside drives of another time.
pub(crate) fn restorable(vm: &VmRecord) -> Result<(), ToolError> {
    if vm.spec.run.is_some() {
        let message = format!("{} exists for one command, so it cannot be rolled back", vm.name);
        return Err(ToolError::new(ErrorCode::VmWrongState, message)
            .hint("call vm_fork with checkpoint: ID to make another VM of it"));
    }
    if !(policy::is_asleep(vm) && vm.state.may_run()) {
        return Ok(());
    }
    let message = format!(
        "{} is {}: it is falling asleep or waking, and has a present of its own on the disk",
        vm.name, vm.state
    );
    Err(ToolError::new(ErrorCode::VmWrongState, message)
        .hint("try again once it is ready, or call vm_stop, which gives its memory up"))
}

/// Refuses a VM that is not as it was at the checkpoint.
fn fits(handle: &Handle, target: &Target) -> Result<(), ToolError> {
    let view = handle.view.borrow();
    let own: Vec<DriveId> = view.drives.iter().map(|drive| drive.id).collect();
    same_drives(&view.record.name, &target.checkpoint, &own, &target.copies)?;
    same_card(&target.manifest, view.record.spec.network.mode)
}

/// Rolls a VM back to a checkpoint that was checked, and waits until it is ready.
pub(crate) async fn rollback(
    shared: &Arc<Shared>,
    handle: &Handle,
    target: &Target,
    who: &str,
    if_boot: Option<BootId>,
    progress: &Progress,
) -> Result<RestoredVm, ToolError> {
    // Its present may have been saved since it was checked.
    fits(handle, target)?;
    let checkpoint = &target.checkpoint;
    is_there(shared, checkpoint).await?;
    let directory = shared.paths.checkpoint(checkpoint.id);
    let files = target.copies.iter().map(|copy| (copy.drive, file_of(&directory, copy), copy.size));
    let restore = Box::new(RestoreFrom {
        who: who.to_owned(),
        kind: ResumeKind::Rollback,
        drives: files.collect(),
        directory: directory.clone(),
        token: checkpoint.token.clone().unwrap_or_default(),
        manifest: target.manifest.clone(),
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
    Err(ToolError::new(ErrorCode::Changed, message).hint(format!(
        "attach and detach drives until it has those, or call vm_fork with checkpoint: {} to make another VM of it",
        checkpoint.id
    )))
}

#[cfg(test)]
mod tests {
    use nexus_schema::ByteSize;
    use nexus_schema::tools::vm::VmState;

    use super::*;
    use crate::store::tests::vm;

    #[test]
    fn a_vm_that_falls_asleep_or_wakes_is_not_rolled_back() {
        let mut web = vm("web", 3);
        let saved = crate::store::tests::suspended(&web);
        for state in [VmState::Stopping, VmState::Starting, VmState::Running] {
            (web.state, web.suspended) = (state, None);
            restorable(&web).unwrap();
            web.suspended = Some(Box::new(saved.clone()));
            assert_eq!(restorable(&web).unwrap_err().code, ErrorCode::VmWrongState, "{state}");
        }
        (web.state, web.suspended, web.spec.run) = (VmState::Ready, None, Some("make test".into()));
        assert!(restorable(&web).unwrap_err().message.contains("one command"));
    }

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
}
