//! The checkpoint that is taken before a command.

use std::time::Duration;

use nexus_schema::id::{BootId, VmId};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::checkpoint::CheckpointDetails;
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::checkpoint::{Given, KEPT};
use super::{CallContext, Nexus};
use crate::vm::checkpoint::Wanted;

/// Timeout for it to be taken: clients wait a minute for a call, and the command needs its part.
const TAKE_MAX: Duration = Duration::from_secs(25);

impl Nexus {
    /// Takes a checkpoint of a VM before a command runs in it, with which `vm_rollback` undoes the command; it is kept for an hour. Returns when it
    /// is taken.
    ///
    /// # Errors
    /// The VM cannot be saved, is another boot by now, or the checkpoint is not taken in time: it goes on as an operation then.
    pub async fn checkpoint_before_run(
        &self,
        ctx: &CallContext,
        vm: VmId,
        boot: BootId,
    ) -> Result<CheckpointDetails, ToolError> {
        let handle = self.shared.vms.get(&ctx.caller, &Reference::Id(vm))?;
        let wanted = self.shared.wanted(&ctx.caller, Given::As("before-run"), Some(KEPT))?;
        let wanted = Wanted { if_boot: Some(boot), ..wanted };
        let op = self.begin_checkpoint(ctx, handle, wanted).await?;
        let outcome: OpOutcome<CheckpointDetails> = self.shared.ops.wait(ctx, op, TAKE_MAX).await?;
        outcome.result.ok_or_else(|| {
            let message = format!("its checkpoint was not taken within {} s", TAKE_MAX.as_secs());
            ToolError::new(ErrorCode::Timeout, message).hint(format!(
                "call op_get with op_id {op} until it is done, then run the command without checkpoint"
            ))
        })
    }
}
