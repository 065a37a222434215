//! The checkpoint before a command, with which it can be undone.

use nexus_core::{CallContext, Caller, Nexus};
use nexus_schema::ToolError;
use nexus_schema::access::Scope;
use nexus_schema::id::{BootId, VmId};
use nexus_schema::tool::{self, Tool};
use nexus_schema::tools::checkpoint::{CheckpointDetails, VmCheckpoint, VmRollback};
use nexus_schema::tools::op::OpProgress;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::host::View;
use crate::tools::Toolset;

/// The argument that asks for it.
pub(super) const ARGUMENT: &str = "checkpoint";

/// Refuses a caller that may not take checkpoints.
pub(super) fn authorise(caller: &Caller) -> Result<(), ToolError> {
    let allowed = caller.authorise(VmCheckpoint::NAME, Scope::Lifecycle);
    allowed.map(|_| ()).map_err(|(error, _)| error)
}

/// A checkpoint to take.
pub(super) struct Before {
    nexus: Nexus,
    caller: Caller,
    vm: VmId,
    boot: BootId,
}

impl std::fmt::Debug for Before {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Before").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl Before {
    /// A checkpoint of a VM that a caller wants, who [may take one](authorise).
    pub(super) fn of(nexus: &Nexus, caller: &Caller, vm: VmId, boot: BootId) -> Self {
        Self { nexus: nexus.clone(), caller: caller.clone(), vm, boot }
    }

    /// Takes it.
    pub(super) async fn take(self) -> Result<TakenBefore, ToolError> {
        let (progress, _watched) = watch::channel(OpProgress::default());
        let ended = self.caller.ended();
        let ctx = CallContext { caller: self.caller, progress };
        let taken = Box::pin(self.nexus.checkpoint_before_run(&ctx, self.vm, self.boot)).await;
        // The token may have been revoked meanwhile.
        let taken = if ended.is_cancelled() { Err(Caller::ended_error()) } else { taken };
        taken.map(TakenBefore).map_err(|mut error| {
            error.message = format!("the command was not run: {}", error.message);
            error
        })
    }
}

/// The checkpoint that was taken.
#[derive(Debug)]
pub(super) struct TakenBefore(CheckpointDetails);

impl TakenBefore {
    /// For programs.
    pub(super) fn facts(&self) -> Value {
        json!({ "id": self.0.id, "name": self.0.name, "expires_at": self.0.expires_at })
    }

    /// For readers of a view. Where that lacks the tool that goes back to it, they learn who has it.
    pub(super) fn told(&self, view: View) -> String {
        let (name, vm, rollback) = (&self.0.name, &self.0.vm_name, VmRollback::NAME);
        let until = self.0.expires_at.map_or_else(String::new, |at| format!(", kept until {at}"));
        let undo = match view {
            View::Whole(set) => {
                let info = tool::info::<VmRollback>();
                if set.offers(&info) {
                    format!("{rollback} with it undoes the command")
                } else {
                    let word = Toolset::with(&info);
                    format!(
                        "{rollback} at /mcp?tools={word}, or `nexusctl vm rollback {vm} {name}`, undoes the command"
                    )
                }
            }
            View::Vm(_) | View::Own(_) => format!("ask for {rollback} with it to undo the command"),
        };
        format!("checkpoint {name} of {vm} was taken before the command{until}; {undo}")
    }
}

#[cfg(test)]
impl TakenBefore {
    pub(super) fn sample() -> Self {
        let details = json!({
            "id": "aaaaaaaaaaaac", "name": "before-run-abcdef", "vm_id": "aaaaaaaaaaaac", "vm_name": "web-1", "current": true,
            "owner": "uid:0", "tags": {}, "restored_by": "qemu 7.2", "memory": "256MiB", "memory_bytes": 1, "disk_bytes": 1,
            "quiesced": true, "pause_ms": 1, "created_at": "2026-01-01T00:00:00Z",
        });
        Self(serde_json::from_value(details).expect("a checkpoint"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_learn_where_the_command_can_be_undone() {
        let before = "checkpoint before-run-abcdef of web-1 was taken before the command; ";
        for (view, said) in [
            (View::Whole(Toolset::ALL), "vm_rollback with it undoes the command"),
            (View::Whole(Toolset::DRIVES), "vm_rollback with it undoes the command"),
            (
                View::Whole(Toolset::WORK),
                "vm_rollback at /mcp?tools=drives, or `nexusctl vm rollback web-1 before-run-abcdef`, undoes the command",
            ),
            (View::Vm(VmId::from_i64(1).unwrap()), "ask for vm_rollback with it to undo the command"),
        ] {
            assert_eq!(TakenBefore::sample().told(view), format!("{before}{said}"));
        }
    }
}
