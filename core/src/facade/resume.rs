//! Operations that were under way when the daemon ended. Those that a running VM can still finish continue. Those whose work was
//! complete succeed. All others fail.

use std::sync::Arc;

use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::op::{OpState, OpSummary};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};
use serde::Serialize;

use super::Shared;
use crate::op::{StoredResult, store_error};
use crate::store::ops::OpRecord;
use crate::store::{builds, drives, images, ops};
use crate::vm::actor::DAEMON;
use crate::vm::create::Old;
use crate::vm::{checkpoint, create, defaults, details};

/// Resumes or ends the operations that were under way when the daemon ended.
pub(super) async fn resume_ops(shared: &Arc<Shared>) -> Result<(), ToolError> {
    checkpoint::undo_forks(shared).await?;
    let running = shared.store.read(ops::running).await.map_err(store_error)?;
    for OpRecord { summary, .. } in running {
        let vm = summary.subject_id.as_deref().and_then(|id| id.parse().ok()).map(Reference::Id);
        let handle = vm.and_then(|vm| shared.vms.of_daemon(&vm).ok().map(|handle| (vm, handle)));
        let op = summary.op_id;
        match (summary.tool.as_str(), handle) {
            ("vm_create" | "vm_start", Some((_, handle))) => {
                let (shared, is_creation) = (shared.clone(), summary.tool == "vm_create");
                shared.clone().ops.run(op, move |progress| async move {
                    create::go_on(&shared, &handle, op, is_creation, &progress).await
                });
            }
            ("vm_restart", Some((vm, handle))) => {
                let (shared, since) = (shared.clone(), summary.started_at);
                shared.clone().ops.run(op, move |progress| async move {
                    create::restart_and_wait(&handle, DAEMON, false, None, Old::Since(since), &progress)
                        .await?;
                    details(&shared, &vm).await
                });
            }
            ("vm_stop", Some((vm, handle))) => {
                let (shared, since) = (shared.clone(), summary.started_at);
                shared.clone().ops.run(op, move |progress| async move {
                    // It may not have begun: behind a suspension, for example, which was cut off or is whole. One that was started later is not meant.
                    let is_meant = handle.view.borrow().record.started_at.is_none_or(|at| at <= since);
                    if is_meant {
                        create::stop_and_wait(&handle, DAEMON, false, None, &progress).await?;
                    }
                    details(&shared, &vm).await
                });
            }
            (tool, _) => {
                let result = finished_already(shared, &summary).await?;
                let error =
                    ToolError::new(ErrorCode::ShuttingDown, format!("{tool} was interrupted: nexusd ended"))
                        .hint("call it again");
                let (state, error) = match result {
                    Some(_) => (OpState::Succeeded, None),
                    None => (OpState::Failed, Some(error)),
                };
                shared.events.op(&summary, state, error.as_ref().map(|error| error.code));
                let written = shared.store.write(move |tx| {
                    ops::finish(tx, op, state, &summary.progress, result.as_ref(), error.as_ref())
                });
                match written.await {
                    Err(error) if error.is_disk_full() => {
                        tracing::warn!(%op, "the disk is full: the end of the operation is recorded at the next start");
                    }
                    written => written.map_err(store_error)?,
                }
            }
        }
    }
    Ok(())
}

/// Returns the result of an operation whose object is complete; `None` if it is not complete, or if that cannot be known.
async fn finished_already(shared: &Shared, op: &OpSummary) -> Result<Option<StoredResult>, ToolError> {
    match op.tool.as_str() {
        "drive_create" => {
            let Some(Ok(id)) = op.subject_id.as_deref().map(str::parse) else { return Ok(None) };
            let reference = Reference::Id(id);
            let drive =
                shared.store.read(move |db| drives::get(db, &reference)).await.map_err(store_error)?;
            match drive {
                Some(drive) => as_result(&shared.drive_details(drive).await?).map(Some),
                None => Ok(None),
            }
        }
        "build_start" => {
            let Some(Ok(id)) = op.subject_id.as_deref().map(str::parse) else { return Ok(None) };
            let build = shared.store.read(move |db| builds::get(db, id)).await.map_err(store_error)?;
            match build.filter(|build| build.status == BuildStatus::Success) {
                Some(build) => as_result(&shared.provision.build_details(build)).map(Some),
                None => Ok(None),
            }
        }
        "image_create" => {
            let Some(Ok(name)) = op.subject_name.as_deref().map(str::parse::<Name>) else {
                return Ok(None);
            };
            let reference = Reference::Name(name);
            let image =
                shared.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
            // With a template's name, this may be an older image of the same name.
            let Some(image) = image.filter(|image| image.ready && image.created_at >= op.started_at) else {
                return Ok(None);
            };
            let default = defaults::read(&shared.store).await?.image;
            as_result(&shared.image_details(image, 0, &default)).map(Some)
        }
        _ => Ok(None),
    }
}

fn as_result(value: &impl Serialize) -> Result<StoredResult, ToolError> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::Object(result)) => Ok(result),
        Ok(_) => Err(ToolError::internal("the result of an operation is not an object")),
        Err(error) => Err(ToolError::internal(format!("encode the result: {error}"))),
    }
}
