//! The tools of builds.

use std::sync::Arc;

use nexus_schema::id::{BuildId, BuildKind, TemplateKind};
use nexus_schema::limits::{OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::build::{
    BuildDetails, BuildImage, BuildInspectParams, BuildListOutput, BuildListParams, BuildLogsOutput,
    BuildLogsParams, BuildStartParams, BuildStatus, BuildSummary,
};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

use super::{CallContext, Nexus, Shared, cut_page, number_cursor, page, patience};
use crate::op::{Log, Progress, store_error, summary};
use crate::os::failpoint;
use crate::store::builds::BuildRecord;
use crate::store::images::ImageRecord;
use crate::store::templates::TemplateRecord;
use crate::store::{StoreError, builds, images, now, ops, random_id};

impl Nexus {
    /// The tool `build_start`.
    pub async fn build_start(
        &self,
        ctx: &CallContext,
        params: BuildStartParams,
    ) -> Result<OpOutcome<BuildDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let mut template = self.shared.template(&params.template).await?;
        if let Some(version) = params.version {
            template.spec = self.shared.template_spec(&template, version).await?;
            template.version = version;
        }
        let cached = !params.no_cache.unwrap_or(false);
        let build = self.shared.begin_build(&template, cached, &ctx.caller.owner).await?;
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
            Some(template) => Some(self.shared.template(template).await?.id),
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
        let build = self.shared.build(&params.build).await?;
        Ok(self.shared.build_details(build))
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
            return Err(ToolError::invalid(format!("max_bytes is {max}, not 1 to {OUTPUT_MAX}")));
        }
        let from = number_cursor(params.cursor.as_deref())?.unwrap_or(0);
        let from = u64::try_from(from).map_err(|_| ToolError::invalid("cursor is below 0"))?;
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            // The status first: what is read after the end is all there is.
            let build = self.shared.build(&params.build).await?;
            let path = self.shared.paths.build_log(build.id);
            let (text, end) =
                tokio::task::spawn_blocking(move || crate::op::read_log(&path, from, max as usize))
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

impl Shared {
    async fn build(&self, build: &Reference<BuildKind>) -> Result<BuildRecord, ToolError> {
        let wanted = build.clone();
        let found = self
            .store
            .read(move |db| match &wanted {
                Reference::Id(id) => builds::get(db, *id),
                Reference::Name(template) => builds::newest(db, template),
            })
            .await
            .map_err(store_error)?;
        found.ok_or_else(|| {
            let message = match build {
                Reference::Id(id) => format!("there is no build {id}"),
                Reference::Name(template) => format!("there is no build of a template {template}"),
            };
            ToolError::new(ErrorCode::BuildNotFound, message).hint("call build_list to see the builds")
        })
    }

    pub(super) fn build_details(&self, row: BuildRecord) -> BuildDetails {
        let image = row.image_id.zip(row.image_name).map(|(id, name)| BuildImage { id, name });
        BuildDetails {
            id: row.id,
            template: row.template_name,
            template_id: row.template_id,
            version: row.version,
            status: row.status,
            cached: row.cached,
            digest: row.digest,
            image: image.filter(|_| row.status == BuildStatus::Success),
            op_id: row.op_id,
            error: row.error,
            spec: row.spec,
            log: self.paths.build_log(row.id).display().to_string(),
            owner: row.owner,
            created_at: row.created_at,
            ended_at: row.ended_at,
        }
    }

    /// The image that `from` means, made if it is not here.
    pub(crate) async fn image(
        self: &Arc<Self>,
        from: &str,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        match crate::stock::template_argument(from) {
            Some(template) => self.build_image(&template?, owner, progress).await,
            None => self.stock.image(from, owner, progress).await,
        }
    }

    /// The image of a template as it is now, built if that was not done before.
    async fn build_image(
        self: &Arc<Self>,
        template: &Reference<TemplateKind>,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let template = self.template(template).await?;
        let called = called(&template.name, template.version);
        let prepared = self.stock.prepare_build(&template.spec, &called, owner, progress).await?;
        if let Some(image) = self.stock.built_before(&prepared.digest).await? {
            return Ok(image);
        }
        let build = self.begin_build(&template, true, owner).await?;
        self.ops.join(build.op_id, progress).await?;
        let id = build.id;
        let found = self
            .store
            .read(move |db| -> Result<_, StoreError> {
                match builds::get(db, id)?.and_then(|build| build.image_id) {
                    Some(image) => images::get(db, &Reference::Id(image)),
                    None => Ok(None),
                }
            })
            .await
            .map_err(store_error)?;
        found.ok_or_else(|| {
            ToolError::new(ErrorCode::Changed, format!("the image of the build {id} was deleted at once"))
        })
    }

    /// Begins a build of a template; the operation goes on by itself.
    async fn begin_build(
        self: &Arc<Self>,
        template: &TemplateRecord,
        cached: bool,
        owner: &str,
    ) -> Result<BuildRecord, ToolError> {
        let id: BuildId = random_id();
        let op = summary("build_start", owner, Some((id.to_string(), template.name.to_string())));
        let build = BuildRecord {
            id,
            seq: 0,
            template_id: Some(template.id),
            template_name: template.name.clone(),
            version: template.version,
            spec: template.spec.clone(),
            status: BuildStatus::Building,
            cached: false,
            digest: None,
            image_id: None,
            image_name: None,
            op_id: op.op_id,
            error: None,
            owner: owner.into(),
            created_at: now(),
            ended_at: None,
        };
        let row = build.clone();
        self.store
            .write(move |tx| -> Result<(), StoreError> {
                ops::insert(tx, &op)?;
                builds::insert(tx, &row)
            })
            .await
            .map_err(store_error)?;
        failpoint::reach("build-begun");
        let (shared, row) = (self.clone(), build.clone());
        self.ops
            .run(build.op_id, move |progress| async move { shared.run_build(row, cached, progress).await });
        Ok(build)
    }

    /// The operation itself.
    async fn run_build(
        self: Arc<Self>,
        build: BuildRecord,
        cached: bool,
        progress: Progress,
    ) -> Result<BuildDetails, ToolError> {
        let id = build.id;
        let progress = match Log::open(&self.paths.build_log(id)) {
            Ok(log) => progress.logged(log),
            Err(error) => {
                tracing::warn!(build = %id, %error, "the build has no log");
                progress
            }
        };
        progress.log(&format!("build of {}", called(&build.template_name, build.version)));
        let made = tokio::select! {
            made = self.make(&build, cached, &progress) => made,
            () = progress.cancelled() => Err(ToolError::new(ErrorCode::Cancelled, "the build was cancelled")),
        };
        match &made {
            Ok(image) => progress.log(&format!("done: image {}", image.name)),
            Err(error) => progress.log(&error.to_string().replace('\n', "; ")),
        }
        if let Err(error) = made {
            let status = match error.code {
                ErrorCode::Cancelled => BuildStatus::Cancelled,
                _ => BuildStatus::Failed,
            };
            let why = error.clone();
            self.store
                .write(move |tx| builds::finish(tx, id, status, false, None, Some(&why)))
                .await
                .map_err(store_error)?;
            return Err(error);
        }
        let build = self.build(&Reference::Id(id)).await?;
        Ok(self.build_details(build))
    }

    async fn make(
        &self,
        build: &BuildRecord,
        cached: bool,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let called = called(&build.template_name, build.version);
        let prepared = self.stock.prepare_build(&build.spec, &called, &build.owner, progress).await?;
        progress.log(&format!("the inputs are {}", prepared.digest));
        let (id, digest) = (build.id, prepared.digest.clone());
        self.store.write(move |tx| builds::set_digest(tx, id, &digest)).await.map_err(store_error)?;
        failpoint::reach("build-prepared");
        let name = image_name(&build.template_name, build)?;
        self.stock.make_build(build.id, prepared, name, cached, &build.owner, progress).await
    }
}

/// What an image says it was made from.
pub(super) fn called(template: &Name, version: u32) -> String {
    format!("template:{template}@{version}")
}

/// The template's name where that is short enough, and a part of the build's id.
fn image_name(template: &Name, build: &BuildRecord) -> Result<Name, ToolError> {
    let id = build.id.to_string();
    let head: String = template.as_str().chars().take(nexus_schema::name::NAME_MAX - 7).collect();
    format!("{}-{}", head.trim_end_matches('-'), &id[id.len() - 6..])
        .parse()
        .map_err(|e| ToolError::internal(format!("{e}")))
}
