//! The checkpoint that is taken before a command.

use std::time::Duration;

use nexus_schema::id::{BootId, VmId};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::checkpoint::CheckpointDetails;
use nexus_schema::{ErrorCode, Reference, TimeSpan, ToolError};

use super::checkpoint::Given;
use super::{CallContext, Nexus};
use crate::vm::checkpoint::{self, Wanted};
use crate::vm::policy;

/// Timeout for it to be taken: clients wait a minute for a call, and the command needs its part.
const TAKE_MAX: Duration = Duration::from_secs(25);
/// How long it is kept.
const KEPT: TimeSpan = TimeSpan::seconds(60 * 60);

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
        let record = handle.view.borrow().record.clone();
        policy::checkpointable(&record)?;
        policy::checkpoint(record.name.as_str(), record.state)?;
        policy::same_boot(record.name.as_str(), record.boot_id, Some(boot))?;
        let wanted = self.shared.wanted(&ctx.caller, Given::As("before-run"), Some(KEPT))?;
        let wanted = Wanted { if_boot: Some(boot), ..wanted };
        let about = Some((wanted.id.to_string(), wanted.name.to_string()));
        let op = self.shared.begin_op("vm_checkpoint", ctx, about).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(op, move |progress| async move {
            let _busy = handle.activity.begin();
            let row = checkpoint::take(&shared, &handle, wanted, &progress).await?;
            shared.checkpoint_details(row).await
        });
        let outcome: OpOutcome<CheckpointDetails> = self.shared.ops.wait(ctx, op, TAKE_MAX).await?;
        outcome.result.ok_or_else(|| {
            let message = format!("its checkpoint was not taken within {} s", TAKE_MAX.as_secs());
            ToolError::new(ErrorCode::Timeout, message).hint(format!(
                "call op_get with op_id {op} until it is done, then run the command without checkpoint"
            ))
        })
    }
}
