//! The operation tools.

use nexus_schema::ToolError;
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::op::{OpCancelParams, OpGetParams, OpListOutput, OpListParams, OpSummary};

use super::vm::AnyResult;
use super::{CallContext, Nexus, cut_page, number_cursor, page, patience};

impl Nexus {
    /// The tool `op_get`.
    pub async fn op_get(
        &self,
        ctx: &CallContext,
        params: OpGetParams,
    ) -> Result<OpOutcome<AnyResult>, ToolError> {
        let wait = patience(params.wait_s)?;
        self.shared.ops.outcome(ctx, params.op_id, wait).await
    }

    /// The tool `op_list`.
    pub async fn op_list(&self, _: &CallContext, params: OpListParams) -> Result<OpListOutput, ToolError> {
        let limit = page(params.limit)?;
        let before = number_cursor(params.cursor.as_deref())?;
        let rows = self.shared.ops.list(params.state, before, limit + 1).await?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.seq.to_string());
        Ok(OpListOutput { ops: rows.into_iter().map(|row| row.summary).collect(), next_cursor })
    }

    /// The tool `op_cancel`.
    pub async fn op_cancel(&self, _: &CallContext, params: OpCancelParams) -> Result<OpSummary, ToolError> {
        self.shared.ops.cancel(params.op_id).await
    }
}
