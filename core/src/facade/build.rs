//! The build tools.

use nexus_schema::ToolError;
use nexus_schema::limits::{OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::build::{
    BuildDetails, BuildInspectParams, BuildListOutput, BuildListParams, BuildLogsOutput, BuildLogsParams,
    BuildStartParams, BuildStatus, BuildSummary,
};

use super::{CallContext, Nexus, cut_page, number_cursor, page, patience};
use crate::op::store_error;
use crate::store::builds;

impl Nexus {
    /// The tool `build_start`.
    pub async fn build_start(
        &self,
        ctx: &CallContext,
        params: BuildStartParams,
    ) -> Result<OpOutcome<BuildDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let mut template = self.shared.provision.template(&params.template).await?;
        if let Some(version) = params.version {
            template.spec = self.shared.provision.template_spec(&template, version).await?;
            template.version = version;
        }
        let cached = !params.no_cache.unwrap_or(false);
        let build = self.shared.provision.begin_build(&template, cached, &ctx.caller.owner).await?;
        self.shared.ops.wait(ctx, build.op_id, wait).await
    }

    /// The tool `build_list`.
    pub async fn build_list(
        &self,
        _: &CallContext,
        params: BuildListParams,
    ) -> Result<BuildListOutput, ToolError> {
        let limit = page(params.limit)?;
        let before = number_cursor(params.cursor.as_deref())?;
        let template = match &params.template {
            Some(template) => Some(self.shared.provision.template(template).await?.id),
            None => None,
        };
        let rows = self
            .shared
            .store
            .read(move |db| builds::list(db, template, params.status, before, limit + 1))
            .await
            .map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.seq.to_string());
        let builds = rows
            .into_iter()
            .map(|row| BuildSummary {
                id: row.id,
                template: row.template_name,
                version: row.version,
                status: row.status,
                cached: row.cached,
                image: row.image_name.filter(|_| row.status == BuildStatus::Success),
                op_id: row.op_id,
                created_at: row.created_at,
                ended_at: row.ended_at,
            })
            .collect();
        Ok(BuildListOutput { builds, next_cursor })
    }

    /// The tool `build_inspect`.
    pub async fn build_inspect(
        &self,
        _: &CallContext,
        params: BuildInspectParams,
    ) -> Result<BuildDetails, ToolError> {
        let build = self.shared.provision.build(&params.build).await?;
        Ok(self.shared.provision.build_details(build))
    }

    /// The tool `build_logs`.
    pub async fn build_logs(
        &self,
        _: &CallContext,
        params: BuildLogsParams,
    ) -> Result<BuildLogsOutput, ToolError> {
        let wait = match params.wait_s {
            Some(_) => patience(params.wait_s)?,
            None => std::time::Duration::ZERO,
        };
        let max = u64::from(params.max_bytes.unwrap_or(OUTPUT_DEFAULT as u32));
        if !(1..=OUTPUT_MAX).contains(&max) {
            return Err(ToolError::invalid(format!("max_bytes must be 1 to {OUTPUT_MAX}, got {max}")));
        }
        let from = number_cursor(params.cursor.as_deref())?.unwrap_or(0);
        let from = u64::try_from(from).map_err(|_| ToolError::invalid("cursor must not be negative"))?;
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            // The status is read first: if the build has ended by then, the log is complete.
            let build = self.shared.provision.build(&params.build).await?;
            let path = self.shared.paths.build_log(build.id);
            let (text, end) =
                tokio::task::spawn_blocking(move || crate::progress::read_log(&path, from, max as usize))
                    .await
                    .map_err(|e| ToolError::internal(format!("read the log: {e}")))?
                    .map_err(|e| ToolError::internal(format!("read the log: {e}")))?;
            let ended = build.status != BuildStatus::Building;
            if !text.is_empty() || ended || tokio::time::Instant::now() >= deadline {
                let text = String::from_utf8_lossy(&text).into_owned();
                return Ok(BuildLogsOutput { text, cursor: end.to_string(), status: build.status });
            }
            let next = tokio::time::Instant::now() + std::time::Duration::from_millis(200);
            tokio::time::sleep_until(next.min(deadline)).await;
        }
    }
}
