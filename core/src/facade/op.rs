//! The operation tools.

use nexus_schema::id::{OpId, VmId};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::op::{OpCancelParams, OpGetParams, OpListOutput, OpListParams, OpSummary};

use nexus_schema::{ErrorCode, Reference, Timestamp, ToolError};

use super::vm::AnyResult;
use super::{CallContext, Nexus, cut_page, number_cursor, page, patience};
use crate::access::Caller;
use crate::event::vm_of;
use crate::op::no_op;

/// A page of operations when not told otherwise: what was done last matters.
const OPS_DEFAULT: u32 = 20;

impl Nexus {
    /// The tool `op_get`.
    pub async fn op_get(
        &self,
        ctx: &CallContext,
        params: OpGetParams,
    ) -> Result<OpOutcome<AnyResult>, ToolError> {
        let wait = patience(params.wait_s)?;
        self.seen_op(&ctx.caller, params.op_id).await?;
        self.shared.ops.outcome(ctx, params.op_id, wait).await
    }

    /// The tool `op_list`.
    pub async fn op_list(&self, ctx: &CallContext, params: OpListParams) -> Result<OpListOutput, ToolError> {
        let limit = page(Some(params.limit.unwrap_or(OPS_DEFAULT)))?;
        let mut before = number_cursor(params.cursor.as_deref())?;
        let mut rows = Vec::new();
        while rows.len() <= limit as usize {
            let page = self.shared.ops.list(params.state, before, limit + 1).await?;
            let is_last = page.len() <= limit as usize;
            before = page.last().map(|row| row.seq);
            rows.extend(page.into_iter().filter(|row| self.sees_op(&ctx.caller, &row.summary)));
            if is_last {
                break;
            }
        }
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.seq.to_string());
        Ok(OpListOutput { ops: rows.into_iter().map(|row| row.summary).collect(), next_cursor })
    }

    /// The tool `op_cancel`.
    pub async fn op_cancel(&self, ctx: &CallContext, params: OpCancelParams) -> Result<OpSummary, ToolError> {
        let op = self.seen_op(&ctx.caller, params.op_id).await?;
        if !ctx.caller.made(&op.owner) {
            let message = format!("operation {} was started by another caller", op.op_id);
            return Err(ToolError::new(ErrorCode::Forbidden, message)
                .hint("wait for it with op_get, or ask for a token with the scope admin"));
        }
        self.shared.ops.cancel(params.op_id).await
    }

    /// When an operation that a caller sees began, and when it ended.
    pub async fn op_times(
        &self,
        caller: &Caller,
        op: OpId,
    ) -> Result<(Timestamp, Option<Timestamp>), ToolError> {
        self.seen_op(caller, op).await.map(|op| (op.started_at, op.ended_at))
    }

    /// Whether an operation exists for a caller: its own ones do, and those on VMs that it sees.
    pub(super) fn sees_op(&self, caller: &Caller, op: &OpSummary) -> bool {
        if caller.made(&op.owner) {
            return true;
        }
        vm_of(op).is_some_and(|vm| self.shared.vms.resolve(caller, &Reference::Id(vm)).is_ok())
    }

    async fn seen_op(&self, caller: &Caller, op: OpId) -> Result<OpSummary, ToolError> {
        match self.shared.ops.record(op).await {
            Ok(record) if self.sees_op(caller, &record.summary) => Ok(record.summary),
            Ok(_) => Err(self.unknown_op(caller, op)),
            Err(error) if error.code == ErrorCode::OpNotFound => Err(self.unknown_op(caller, op)),
            Err(error) => Err(error),
        }
    }

    /// There is no such operation; but perhaps the caller gave the id of a VM that it sees.
    fn unknown_op(&self, caller: &Caller, op: OpId) -> ToolError {
        let vm =
            VmId::from_i64(op.as_i64()).and_then(|id| self.shared.vms.get(caller, &Reference::Id(id)).ok());
        match vm {
            Some(vm) => {
                let message = format!(
                    "there is no operation {op}: that is the id of the VM {}",
                    vm.view.borrow().record.name
                );
                ToolError::new(ErrorCode::OpNotFound, message)
                    .hint("give the op_id of an operation: op_list shows them; vm_inspect shows the VM")
            }
            None => no_op(op),
        }
    }
}
