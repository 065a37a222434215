//! Builds of templates: each is an operation with a row and a log; callers who want the same image join it.

use nexus_schema::id::{BuildId, BuildKind, TemplateKind};
use nexus_schema::tools::build::{BuildDetails, BuildImage, BuildStatus};
use nexus_schema::tools::template::TemplateSpec;
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

use super::{Provision, template_argument};
use crate::op::{did_you_mean, store_error, summary};
use crate::os::failpoint;
use crate::progress::{Log, Progress};
use crate::store::builds::BuildRecord;
use crate::store::images::ImageRecord;
use crate::store::templates::TemplateRecord;
use crate::store::{StoreError, builds, images, now, ops, random_id, templates};

impl Provision {
    /// A template.
    pub(crate) async fn template(
        &self,
        template: &Reference<TemplateKind>,
    ) -> Result<TemplateRecord, ToolError> {
        let wanted = template.clone();
        let found = self.store.read(move |db| templates::get(db, &wanted)).await.map_err(store_error)?;
        match found {
            Some(found) => Ok(found),
            None => Err(self.no_template(template).await?),
        }
    }

    /// The template that a source of VMs names; `None` if it is another source.
    pub(crate) async fn template_of(&self, from: &str) -> Result<Option<TemplateRecord>, ToolError> {
        match template_argument(from) {
            Some(template) => self.template(&template?).await.map(Some),
            None => Ok(None),
        }
    }

    /// The error for an unknown template, with a similar name if there is one.
    pub(crate) async fn no_template(
        &self,
        template: &Reference<TemplateKind>,
    ) -> Result<ToolError, ToolError> {
        let all = self.store.read(|db| templates::list(db, None, u32::MAX)).await.map_err(store_error)?;
        let error = ToolError::new(ErrorCode::TemplateNotFound, format!("there is no template {template}"))
            .hint("call template_list to see the templates");
        Ok(did_you_mean(error, &template.to_string(), all.iter().map(|template| template.name.as_str())))
    }

    /// The definition of a template in one version.
    pub(crate) async fn template_spec(
        &self,
        template: &TemplateRecord,
        version: u32,
    ) -> Result<TemplateSpec, ToolError> {
        let id = template.id;
        let found = self.store.read(move |db| templates::spec(db, id, version)).await.map_err(store_error)?;
        found.ok_or_else(|| {
            ToolError::new(
                ErrorCode::TemplateNotFound,
                format!("the template {} has no version {version}", template.name),
            )
            .hint("call template_inspect to see its versions")
        })
    }

    pub(crate) async fn build(&self, build: &Reference<BuildKind>) -> Result<BuildRecord, ToolError> {
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

    pub(crate) fn build_details(&self, row: BuildRecord) -> BuildDetails {
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

    /// The image that `from` means, which is made if it does not exist.
    pub(crate) async fn image(
        &self,
        from: &str,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        match template_argument(from) {
            Some(template) => self.build_image(&template?, owner, progress).await,
            None => self.source_image(from, owner, progress).await,
        }
    }

    /// The image of a template's current version, which is built if it was not built before.
    async fn build_image(
        &self,
        template: &Reference<TemplateKind>,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let template = self.template(template).await?;
        let called = called(&template.name, template.version);
        let prepared = self.prepare_build(&template.spec, &called, owner, progress).await?;
        if let Some(image) = self.built_before(&prepared.digest).await? {
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

    /// Starts a build of a template as an independent operation.
    pub(crate) async fn begin_build(
        &self,
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
        let (this, row) = (self.clone(), build.clone());
        self.ops.run(build.op_id, move |progress| async move { this.run_build(row, cached, progress).await });
        Ok(build)
    }

    /// The operation itself.
    async fn run_build(
        self,
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
            made = self.make_image(&build, cached, &progress) => made,
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

    async fn make_image(
        &self,
        build: &BuildRecord,
        cached: bool,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let called = called(&build.template_name, build.version);
        let prepared = self.prepare_build(&build.spec, &called, &build.owner, progress).await?;
        progress.log(&format!("the inputs are {}", prepared.digest));
        let (id, digest) = (build.id, prepared.digest.clone());
        self.store.write(move |tx| builds::set_digest(tx, id, &digest)).await.map_err(store_error)?;
        failpoint::reach("build-prepared");
        let name = image_name(&build.template_name, build)?;
        self.make_build(build.id, prepared, name, cached, &build.owner, progress).await
    }
}

/// The source that an image names.
pub(crate) fn called(template: &Name, version: u32) -> String {
    format!("template:{template}@{version}")
}

/// The template's name if it is short enough, with a part of the build's id.
fn image_name(template: &Name, build: &BuildRecord) -> Result<Name, ToolError> {
    let id = build.id.to_string();
    let head: String = template.as_str().chars().take(nexus_schema::name::NAME_MAX - 7).collect();
    format!("{}-{}", head.trim_end_matches('-'), &id[id.len() - 6..])
        .parse()
        .map_err(|e| ToolError::internal(format!("{e}")))
}
