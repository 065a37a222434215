//! The tool of the audit log.

use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::tools::audit::{AuditListOutput, AuditListParams};
use tokio::time::{Instant, sleep_until};

use super::{CallContext, Nexus, number_cursor, page, patience};
use crate::op::store_error;
use crate::store::calls::{self, Wanted};

/// How often it is looked for a new call.
const LOOK: Duration = Duration::from_millis(200);

impl Nexus {
    /// The tool `audit_list`.
    pub async fn audit_list(
        &self,
        ctx: &CallContext,
        params: AuditListParams,
    ) -> Result<AuditListOutput, ToolError> {
        let limit = page(params.limit)?;
        let wait = params.wait_s.map_or(Ok(Duration::ZERO), |_| patience(params.wait_s))?;
        if params.after.is_some() && params.cursor.is_some() {
            return Err(ToolError::invalid("after and cursor exclude each other").hint("give one of them"));
        }
        let vm = match &params.vm {
            Some(nexus_schema::Reference::Id(id)) => Some(*id),
            Some(vm) => Some(self.shared.past_vm(&ctx.caller, vm).await?),
            None => None,
        };
        let wanted = Wanted {
            vm,
            owner: params.caller,
            // Calls in VMs are recorded by the name that the guest knows.
            tool: params.tool.map(|tool| tool.strip_prefix("guest_").map(str::to_owned).unwrap_or(tool)),
            outcome: params.outcome,
            since: params.since,
            until: params.until,
            after: params.after.map(|after| i64::try_from(after).unwrap_or(i64::MAX)),
            before: number_cursor(params.cursor.as_deref())?,
            within: None,
        };
        let deadline = Instant::now() + if wanted.after.is_some() { wait } else { Duration::ZERO };
        loop {
            let found = calls::search(&self.shared.store, &wanted, limit + 1).await;
            let (mut calls, newest) = found.map_err(store_error)?;
            if calls.is_empty() && Instant::now() < deadline {
                sleep_until((Instant::now() + LOOK).min(deadline)).await;
                continue;
            }
            let has_more = calls.len() > limit as usize;
            calls.truncate(limit as usize);
            let shown = calls.last().map(|call| call.seq).filter(|_| has_more);
            let newest = newest.unsigned_abs();
            return Ok(match wanted.after {
                Some(_) => AuditListOutput { last: shown.unwrap_or(newest), calls, next_cursor: None },
                None => {
                    AuditListOutput { calls, last: newest, next_cursor: shown.map(|seq| seq.to_string()) }
                }
            });
        }
    }
}
