//! The image tools.

use nexus_schema::access::Scope;
use nexus_schema::id::{ImageId, ImageKind};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::image::{
    BUILT_IN, ImageCreateParams, ImageDetails, ImageInspectParams, ImageListOutput, ImageListParams,
};
use nexus_schema::tools::plan::Creation;
use nexus_schema::{Arch, ErrorCode, Name, Reference, ToolError};

use super::drive::sees_drive;
use super::source::may_use;
use super::{CallContext, Nexus, Shared, number_cursor, page, patience};
use crate::access::Caller;
use crate::context::Registry;
use crate::op::{Begun, did_you_mean, once, store_error, summary};
use crate::store::idempotency::Once;
use crate::store::images::ImageRecord;
use crate::store::{Connection, StoreError, drives, images};
use crate::vm::defaults;

impl Nexus {
    /// The tool `image_list`.
    pub async fn image_list(
        &self,
        ctx: &CallContext,
        params: ImageListParams,
    ) -> Result<ImageListOutput, ToolError> {
        let limit = page(params.limit)? as usize;
        let (caller, vms) = (ctx.caller.clone(), self.shared.vms.clone());
        let rows = self
            .shared
            .store
            .read(move |db| -> Result<_, StoreError> {
                images::all(db)?
                    .into_iter()
                    .filter(|image| image.ready)
                    .map(|image| Ok((seen_drives(db, &vms, &caller, image.id)?, image)))
                    .collect::<Result<Vec<_>, StoreError>>()
            })
            .await
            .map_err(store_error)?;
        let default = defaults::read(&self.shared.store).await?.image;
        let mut all: Vec<ImageDetails> = rows
            .into_iter()
            .map(|(used_by, image)| {
                self.shared.image_details(shown_to(&ctx.caller, image), used_by, &default)
            })
            .collect();
        for name in BUILT_IN {
            if !all.iter().any(|image| image.name.as_str() == name) {
                all.push(not_made_yet(name, &default)?);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        let (images, next_cursor) = cut(all, params.cursor.as_deref(), limit)?;
        Ok(ImageListOutput { images, next_cursor })
    }

    /// The tool `image_inspect`.
    pub async fn image_inspect(
        &self,
        ctx: &CallContext,
        params: ImageInspectParams,
    ) -> Result<ImageDetails, ToolError> {
        let default = defaults::read(&self.shared.store).await?.image;
        let wanted = params.image.clone();
        let (caller, vms) = (ctx.caller.clone(), self.shared.vms.clone());
        let found = self
            .shared
            .store
            .read(move |db| -> Result<_, StoreError> {
                match images::get(db, &wanted)?.filter(|image| image.ready) {
                    Some(image) => Ok(Some((seen_drives(db, &vms, &caller, image.id)?, image))),
                    None => Ok(None),
                }
            })
            .await
            .map_err(store_error)?;
        match (found, &params.image) {
            (Some((used_by, image)), _) => {
                Ok(self.shared.image_details(shown_to(&ctx.caller, image), used_by, &default))
            }
            (None, Reference::Name(name)) if BUILT_IN.contains(&name.as_str()) => {
                not_made_yet(name.as_str(), &default)
            }
            (None, reference) => Err(self.shared.no_image(reference).await?),
        }
    }

    /// Refuses to tokens names under which images are made by themselves: VMs of others would start from what they put there.
    async fn may_name(&self, caller: &Caller, name: &Name, from: &str) -> Result<(), ToolError> {
        let is_reserved = BUILT_IN.contains(&name.as_str())
            || ["oci-", "file-", "rootfs-"].iter().any(|word| name.as_str().starts_with(word));
        if !is_reserved || caller.has(Scope::Admin) {
            return Ok(());
        }
        if !from.starts_with("template:")
            && !from.starts_with("vm:")
            && self.shared.provision.image_name(from).await? == *name
        {
            return Ok(());
        }
        let message = format!("the name {name} is reserved for images that are made by themselves");
        Err(ToolError::new(ErrorCode::Forbidden, message).hint("choose another name"))
    }

    /// The tool `image_create`.
    pub async fn image_create(
        &self,
        ctx: &CallContext,
        params: ImageCreateParams,
    ) -> Result<Creation<ImageDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let same = ImageCreateParams { idempotency_key: None, dry_run: None, wait_s: None, ..params.clone() };
        let once = once(&ctx.caller.owner, "image_create", params.idempotency_key.clone(), &same)?;
        if let Some(op) = self.shared.ops.earlier(once.as_ref()).await? {
            return self.shared.ops.wait(ctx, op, wait).await.map(Creation::from);
        }
        let of_vm = self.shared.vm_as_source(&ctx.caller, &params.from)?;
        match &of_vm {
            Some(of_vm) => of_vm.check()?,
            None => {
                may_use(&ctx.caller, Some(&params.from)).await?;
                self.shared.provision.check_image(&params.from).await?;
            }
        }
        if params.dry_run == Some(true) {
            let plan = match &of_vm {
                Some(of_vm) => self.shared.plan_image_of_vm(of_vm, &params).await,
                None => self.shared.plan_image(&params).await,
            };
            return plan.map(Creation::from);
        }
        let name = match params.name {
            Some(name) => name,
            // A build names its image.
            None if params.from.starts_with("template:") => {
                return self.image_of_template(ctx, params, once, wait).await.map(Creation::from);
            }
            None => match &of_vm {
                Some(of_vm) => of_vm.name.clone(),
                None => self.shared.provision.image_name(&params.from).await?,
            },
        };
        self.may_name(&ctx.caller, &name, &params.from).await?;
        let subject = Some((name.to_string(), name.to_string()));
        let op = summary("image_create", &ctx.caller.owner, subject);
        let id = op.op_id;
        // Here and not before: a call that repeats an earlier one is answered as that one, and its image may have the name by now.
        let taken = name.clone();
        let begun = self.shared.ops.begin(op, once, move |tx| {
            match images::get(tx, &Reference::Name(taken.clone()))? {
                Some(_) => Err(StoreError::NameTaken { kind: "image", name: taken.to_string() }),
                None => Ok(()),
            }
        });
        if let Begun::Known(op) = begun.await? {
            return self.shared.ops.wait(ctx, op, wait).await.map(Creation::from);
        }
        let (shared, owner) = (self.shared.clone(), ctx.caller.owner.clone());
        let init = params.init.unwrap_or_default();
        self.shared.ops.run(id, move |progress| async move {
            let image = match of_vm {
                Some(of_vm) => {
                    Box::pin(shared.image_of_vm(of_vm, name, params.init, &owner, &progress)).await?
                }
                None if params.from.starts_with("template:") => {
                    let built = shared.provision.image(&params.from, &owner, &progress).await?;
                    let (from, init) = (format!("image:{}", built.id), params.init.unwrap_or(built.init));
                    shared.provision.create_image(&from, name, init, &owner, &progress).await?
                }
                None => shared.provision.create_image(&params.from, name, init, &owner, &progress).await?,
            };
            let default = defaults::read(&shared.store).await?.image;
            Ok(shared.image_details(image, 0, &default))
        });
        self.shared.ops.wait(ctx, id, wait).await.map(Creation::from)
    }

    /// `image_create` from a template without a `name`: returns the image of the template's build, which is started if needed.
    async fn image_of_template(
        &self,
        ctx: &CallContext,
        params: ImageCreateParams,
        once: Option<Once>,
        wait: std::time::Duration,
    ) -> Result<OpOutcome<ImageDetails>, ToolError> {
        if params.init.is_some() {
            return Err(ToolError::invalid(
                "init cannot be changed for a template's image: give a name to create an image of its own",
            ));
        }
        let name = params.from.trim_start_matches("template:").to_owned();
        let op = summary("image_create", &ctx.caller.owner, Some((name.clone(), name)));
        let id = op.op_id;
        if let Begun::Known(op) = self.shared.ops.begin(op, once, |_| Ok(())).await? {
            return self.shared.ops.wait(ctx, op, wait).await;
        }
        let (shared, caller) = (self.shared.clone(), ctx.caller.clone());
        self.shared.ops.run(id, move |progress| async move {
            let image = shared.provision.image(&params.from, &caller.owner, &progress).await?;
            let (of, vms, image_id) = (caller.clone(), shared.vms.clone(), image.id);
            let used = shared.store.read(move |db| seen_drives(db, &vms, &of, image_id)).await;
            let default = defaults::read(&shared.store).await?.image;
            Ok(shared.image_details(shown_to(&caller, image), used.map_err(store_error)?, &default))
        });
        self.shared.ops.wait(ctx, id, wait).await
    }
}

impl Shared {
    /// Returns the error for an unknown image; it suggests one with a similar name.
    pub(super) async fn no_image(&self, image: &Reference<ImageKind>) -> Result<ToolError, ToolError> {
        let all = self.store.read(images::all).await.map_err(store_error)?;
        let error = ToolError::new(ErrorCode::ImageNotFound, format!("there is no image {image}"))
            .hint("call image_list to see the images");
        let names = all.iter().map(|image| image.name.as_str()).chain(BUILT_IN);
        Ok(did_you_mean(error, &image.to_string(), names))
    }

    pub(super) fn image_details(&self, image: ImageRecord, used_by: u64, default: &str) -> ImageDetails {
        let path = self.paths.image(image.id).join(crate::image::ROOTFS).display().to_string();
        ImageDetails {
            id: Some(image.id),
            default: image.name.as_str() == default,
            name: image.name,
            source: image.source,
            installed: true,
            distro: image.distro,
            init: image.init,
            config: image.config,
            arch: image.arch,
            size: Some(image.size),
            used_bytes: Some(image.used_bytes),
            sha256: Some(image.sha256),
            used_by,
            path: Some(path),
            created_at: Some(image.created_at),
        }
    }
}

/// An image as a caller may see it.
fn shown_to(caller: &Caller, mut image: ImageRecord) -> ImageRecord {
    image.source = image.origin(caller.made(&image.owner)).to_owned();
    image
}

/// How many drives of an image exist for a caller: who else uses the image is none of a token's business.
fn seen_drives(db: &Connection, vms: &Registry, caller: &Caller, image: ImageId) -> Result<u64, StoreError> {
    let drives = drives::of_image(db, image)?;
    Ok(drives.iter().filter(|drive| sees_drive(vms, caller, drive)).count() as u64)
}

/// The details of a built-in image before its first use.
fn not_made_yet(name: &str, default: &str) -> Result<ImageDetails, ToolError> {
    let parsed: Name = name.parse().map_err(|e| ToolError::internal(format!("{e}")))?;
    Ok(ImageDetails {
        id: None,
        name: parsed,
        source: name.into(),
        installed: false,
        default: name == default,
        distro: None,
        init: nexus_schema::link::InitMode::Agent,
        config: None,
        arch: Arch::HOST.as_str().into(),
        size: None,
        used_bytes: None,
        sha256: None,
        used_by: 0,
        path: None,
        created_at: None,
    })
}

/// Returns one page of a list in memory; the cursor is a position.
pub(super) fn cut<T>(
    mut all: Vec<T>,
    cursor: Option<&str>,
    limit: usize,
) -> Result<(Vec<T>, Option<String>), ToolError> {
    let from = number_cursor(cursor)?.unwrap_or(0);
    let from = usize::try_from(from).unwrap_or(0).min(all.len());
    let mut rest = all.split_off(from);
    let more = rest.len() > limit;
    rest.truncate(limit);
    Ok((rest, more.then(|| (from + limit).to_string())))
}
