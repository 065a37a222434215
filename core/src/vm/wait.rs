//! What a caller of a VM's task waits for: its answer, and the state that follows from it.

use std::time::Duration;

use nexus_schema::id::BootId;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, Reference, ToolError};
use tokio::sync::{oneshot, watch};

use crate::context::{Command, Handle, View, not_found};
use crate::progress::Progress;

/// Waits until this boot is ready or has ended.
pub(crate) async fn until_ready(
    view: &mut watch::Receiver<View>,
    boot: BootId,
    progress: &Progress,
) -> Result<(), ToolError> {
    loop {
        {
            let now = view.borrow_and_update();
            let record = &now.record;
            let name = &record.name;
            if now.deleted {
                return Err(ToolError::new(
                    ErrorCode::VmNotFound,
                    format!("{name} was deleted while it started"),
                ));
            }
            match record.state {
                VmState::Ready | VmState::Unreachable if record.boot_id == Some(boot) => return Ok(()),
                // A reboot replaced the boot: it is enough that the VM is ready.
                VmState::Ready => return Ok(()),
                // It was ready, and somebody paused it.
                VmState::Paused => return Ok(()),
                VmState::Suspended => {
                    let reason = record.reason.clone().unwrap_or_else(|| "it was not woken".into());
                    return Err(ToolError::new(
                        ErrorCode::BootFailed,
                        format!("{name} is suspended: {reason}"),
                    )
                    .hint("check vm_logs; try again, or give its memory up with vm_start, cold: true"));
                }
                VmState::Running => progress.step("configuring the guest"),
                VmState::Starting => progress.step("booting"),
                VmState::Failed | VmState::Crashed => {
                    let reason = record.reason.clone().unwrap_or_else(|| "for an unknown reason".into());
                    let code = match record.state {
                        VmState::Crashed => ErrorCode::VmGone,
                        _ => ErrorCode::BootFailed,
                    };
                    return Err(ToolError::new(code, format!("{name} {}: {reason}", record.state))
                        .hint("check vm_logs; vm_start retries, vm_delete removes it"));
                }
                VmState::Stopping | VmState::Stopped => {
                    return Err(ToolError::new(
                        ErrorCode::Changed,
                        format!("{name} was stopped while it started"),
                    )
                    .hint("call vm_start if it is to run"));
                }
                VmState::Creating | VmState::Created | VmState::Unreachable => {}
            }
        }
        if view.changed().await.is_err() {
            return Err(ToolError::new(ErrorCode::ShuttingDown, "the daemon is shutting down"));
        }
    }
}

/// Waits until the VM is stopped or deleted. Returns whether that happened within the limit.
pub(crate) async fn until_down(view: &mut watch::Receiver<View>, limit: Duration) -> bool {
    let down = view.wait_for(|now| now.deleted || !now.record.state.may_run());
    matches!(tokio::time::timeout(limit, down).await, Ok(Ok(_)))
}

/// Sends a command to a VM's task and waits for its reply.
pub(crate) async fn ask<T>(
    handle: &Handle,
    command: impl FnOnce(oneshot::Sender<Result<T, ToolError>>) -> Command,
) -> Result<T, ToolError> {
    let (reply, answer) = oneshot::channel();
    if handle.commands.send(command(reply)).await.is_err() {
        return Err(gone(handle));
    }
    answer.await.unwrap_or_else(|_| Err(gone(handle)))
}

fn gone(handle: &Handle) -> ToolError {
    let view = handle.view.borrow();
    if view.deleted {
        not_found(&Reference::Id(view.record.id))
    } else if !handle.commands.is_closed() {
        ToolError::internal(format!(
            "the task of {} crashed because of a bug in nexusd; it is being restarted",
            view.record.name
        ))
        .hint("try again; vm_inspect shows the state of the VM")
    } else {
        ToolError::new(ErrorCode::ShuttingDown, "the daemon is shutting down")
    }
}
