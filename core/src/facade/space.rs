//! Disk space: what takes it, what is in use, and what can be removed.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nexus_schema::id::{CheckpointId, ImageId};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::asset::AssetKind;
use nexus_schema::tools::image::{ImageDeleteOutput, ImageDeleteParams};
use nexus_schema::tools::prune::{PruneOutput, PruneParams, Pruned, PrunedKind};
use nexus_schema::tools::system::DiskUse;
use nexus_schema::{ErrorCode, ToolError};

use super::{CallContext, Nexus, Shared, patience};
use crate::access::Deed;
use crate::op::store_error;
use crate::os::paths::vm_files;
use crate::os::remove;
use crate::progress::Progress;
use crate::provision::{Defaults, Removal};
use crate::store::assets::AssetRecord;
use crate::store::images::ImageRecord;
use crate::store::{StoreError, builds, images};
use crate::vm::{defaults, warm};

/// Minimum age of cache files that are removed: younger ones may be needed by a start that is under way.
const CACHE_AGE: Duration = Duration::from_secs(600);

/// Something that nothing refers to.
struct Leftover {
    shown: Pruned,
    what: What,
}

enum What {
    Image(Box<ImageRecord>),
    Asset(Box<AssetRecord>),
    File(PathBuf),
    Build(nexus_schema::id::BuildId),
    /// A machine that VMs are started from.
    Prepared(CheckpointId),
}

impl Nexus {
    /// The tool `image_delete`.
    pub async fn image_delete(
        &self,
        ctx: &CallContext,
        params: ImageDeleteParams,
    ) -> Result<ImageDeleteOutput, ToolError> {
        self.shared.make_room().await;
        let wanted = params.image.clone();
        let found = self.shared.store.read(move |db| images::get(db, &wanted)).await.map_err(store_error)?;
        let Some(image) = found else { return Err(self.shared.no_image(&params.image).await?) };
        if !image.ready {
            return Err(ToolError::new(
                ErrorCode::InUse,
                format!("the image {} is being created", image.name),
            )
            .hint("wait for it, or cancel it with op_cancel"));
        }
        let (id, name, freed_bytes) = (image.id, image.name.clone(), image.used_bytes);
        let users = self.shared.delete_image(image).await?;
        if users.is_empty() {
            warm::tidy(&self.shared).await;
            return Ok(ImageDeleteOutput { id, name, freed_bytes });
        }
        // Who uses it may be nobody that the caller sees.
        let by = match ctx.caller.grant() {
            None => users.join(", "),
            Some(_) => "VMs, drives, templates or settings".to_owned(),
        };
        Err(ToolError::new(ErrorCode::InUse, format!("the image {name} is in use by {by}"))
            .hint("delete or change these first"))
    }

    /// The tool `prune`.
    pub async fn prune(
        &self,
        ctx: &CallContext,
        params: PruneParams,
    ) -> Result<OpOutcome<PruneOutput>, ToolError> {
        let wait = patience(params.wait_s)?;
        let plan = self.shared.pruning(&params).await?;
        let deed = Deed { tool: "prune", plan };
        self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
        self.shared.make_room().await;
        let id = self.shared.begin_op("prune", ctx, None).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(id, move |progress| async move { shared.prune(params, &progress).await });
        self.shared.ops.wait(ctx, id, wait).await
    }
}

impl Shared {
    /// Deletes an image that nothing uses; otherwise returns its users.
    async fn delete_image(&self, image: ImageRecord) -> Result<Vec<String>, ToolError> {
        let id = image.id;
        // The row is deleted first, so that nothing new can refer to it. Files without a row are deleted at the daemon's next start at the latest.
        let users = self
            .store
            .write(move |tx| -> Result<_, StoreError> {
                let users = images::users(tx, &image)?;
                if users.is_empty() {
                    images::delete(tx, image.id)?;
                }
                Ok(users)
            })
            .await
            .map_err(store_error)?;
        if users.is_empty() {
            remove::tree(&self.paths.image(id)).await;
        }
        Ok(users)
    }

    /// What of a pruning needs a confirmation: images and assets that somebody made or downloaded on purpose.
    async fn pruning(self: &Arc<Self>, params: &PruneParams) -> Result<Vec<String>, ToolError> {
        let (images, assets) = (params.images == Some(true), params.assets == Some(true));
        if params.dry_run == Some(true) || !(images || assets) {
            return Ok(Vec::new());
        }
        let look = PruneParams { dry_run: Some(true), ..params.clone() };
        let found = self.prune(look, &Progress::default()).await?;
        let on_purpose = |kind| match kind {
            PrunedKind::Image => images,
            PrunedKind::Asset => assets,
            PrunedKind::BuildLog | PrunedKind::Cache | PrunedKind::Scratch | PrunedKind::History => false,
        };
        let removed = found.removed.into_iter().filter(|thing| on_purpose(thing.kind));
        let mut plan: Vec<_> =
            removed.map(|thing| format!("remove the {} {}", thing.kind.as_str(), thing.name)).collect();
        plan.sort_unstable();
        Ok(plan)
    }

    async fn prune(
        self: &Arc<Self>,
        params: PruneParams,
        progress: &Progress,
    ) -> Result<PruneOutput, ToolError> {
        let dry_run = params.dry_run.unwrap_or(false);
        progress.step("looking for unused objects");
        let mut leftovers = self.unused_images(params.images.unwrap_or(false)).await?;
        // What only these images refer to can be removed as well.
        let going = leftovers.iter().filter_map(|leftover| match &leftover.what {
            What::Image(image) => Some(image.id),
            What::Asset(_) | What::File(_) | What::Build(_) | What::Prepared(_) => None,
        });
        let going: Vec<ImageId> = going.collect();
        leftovers.extend(self.unused_files().await?);
        leftovers.extend(warm::removable(self, CACHE_AGE).await?.into_iter().map(prepared));
        let defaults = defaults::read(&self.store).await?;
        let defaults = Defaults { kernel: defaults.kernel, image: defaults.image };
        if params.assets.unwrap_or(false) {
            leftovers.extend(self.unused_assets(&defaults, going).await?);
        }
        let mut output = PruneOutput { dry_run, removed: Vec::new(), kept: Vec::new(), freed_bytes: 0 };
        let mut is_vmm_gone = false;
        for leftover in leftovers {
            progress.check().map_err(|_| ToolError::new(ErrorCode::Cancelled, "pruning was cancelled"))?;
            if !dry_run {
                progress.step(format!("removing {}", leftover.shown.name));
                let gone = match leftover.what {
                    // The objects may have come into use since.
                    What::Image(image) => self.delete_image(*image).await?.is_empty(),
                    What::Asset(asset) => match self.provision.remove_unused(&asset, &defaults).await? {
                        Removal::Done => {
                            is_vmm_gone |= asset.kind == AssetKind::Vmm;
                            true
                        }
                        Removal::InUse => false,
                        Removal::NotNow => {
                            let why = "other operations are under way: prune again once they have ended";
                            output.kept.push(Pruned { why: why.into(), ..leftover.shown.clone() });
                            false
                        }
                    },
                    What::File(path) => {
                        remove::path(&path).await;
                        true
                    }
                    What::Prepared(id) => warm::remove(self, id).await,
                    What::Build(id) => {
                        // The build stays if its image does.
                        let gone = self.store.write(move |tx| builds::forget(tx, id)).await;
                        let gone = gone.map_err(store_error)?;
                        if gone {
                            remove::path(&self.paths.build_log(id)).await;
                        }
                        gone
                    }
                };
                if !gone {
                    continue;
                }
            }
            output.freed_bytes += leftover.shown.bytes;
            output.removed.push(leftover.shown);
        }
        let rows = self.forget_old(dry_run).await?;
        if rows > 0 {
            output.removed.push(Pruned {
                kind: PrunedKind::History,
                name: format!("{rows} rows"),
                bytes: 0,
                why: "beyond the limits in the settings history.days and history.per_vm".into(),
            });
        }
        if is_vmm_gone {
            self.provision.link_programs().await?;
            self.host(true).await?;
        }
        Ok(output)
    }

    /// Finds unused images: those of builds other than a template's last one, or with `all` any.
    async fn unused_images(&self, all: bool) -> Result<Vec<Leftover>, ToolError> {
        let default = defaults::read(&self.store).await?.image;
        let found = self
            .store
            .read(move |db| -> Result<_, StoreError> {
                let mut found = Vec::new();
                let last = builds::last_images(db)?;
                for image in images::all(db)?.into_iter().filter(|image| image.ready) {
                    let of_build = builds::made(db, image.id)?;
                    let (unused, why) = match of_build {
                        true => (all || !last.contains(&image.id), "an unused image of an earlier build"),
                        false => (all && image.name.as_str() != default, "an unused image"),
                    };
                    if unused && images::users(db, &image)?.is_empty() {
                        found.push((image, why));
                    }
                }
                let going: Vec<ImageId> = found.iter().map(|(image, _)| image.id).collect();
                let forgotten = builds::forgotten(db, &going)?;
                Ok((found, forgotten))
            })
            .await
            .map_err(store_error)?;
        let (found, forgotten) = found;
        let mut leftovers: Vec<Leftover> = found
            .into_iter()
            .map(|(image, why)| Leftover {
                shown: Pruned {
                    kind: PrunedKind::Image,
                    name: image.name.to_string(),
                    bytes: image.used_bytes,
                    why: why.into(),
                },
                what: What::Image(Box::new(image)),
            })
            .collect();
        for id in forgotten {
            leftovers.push(Leftover {
                shown: Pruned {
                    kind: PrunedKind::BuildLog,
                    name: id.to_string(),
                    bytes: allocated(&self.paths.build_log(id)),
                    why: "a build without an image, of a deleted template".into(),
                },
                what: What::Build(id),
            });
        }
        Ok(leftovers)
    }

    /// Finds kernels, root filesystems and VMMs that nothing refers to.
    async fn unused_assets(
        &self,
        defaults: &Defaults,
        going: Vec<ImageId>,
    ) -> Result<Vec<Leftover>, ToolError> {
        let unused = self.provision.unused(defaults, going).await?;
        let leftover = |asset: AssetRecord| Leftover {
            shown: Pruned {
                kind: PrunedKind::Asset,
                name: asset.name.to_string(),
                bytes: allocated(&self.paths.asset(asset.id)),
                why: format!("an unused {}", asset.kind.as_str()),
            },
            what: What::Asset(Box::new(asset)),
        };
        Ok(unused.into_iter().map(leftover).collect())
    }

    /// Finds cache files, which can be recreated, and leftover files.
    async fn unused_files(&self) -> Result<Vec<Leftover>, ToolError> {
        let (paths, scratch) = (self.paths.clone(), self.provision.scratch().clone());
        let plans: Vec<PathBuf> = self
            .vms
            .all()
            .iter()
            .map(|handle| paths.vm(handle.view.borrow().record.id).join(vm_files::PLAN))
            .collect();
        tokio::task::spawn_blocking(move || {
            let planned: Vec<String> =
                plans.iter().filter_map(|plan| fs_err::read_to_string(plan).ok()).collect();
            let mut leftovers = Vec::new();
            for path in entries(&paths.cache()) {
                let name = name_of(&path);
                let is_planned = planned.iter().any(|plan| plan.contains(&name));
                if !is_planned && age(&path) > CACHE_AGE {
                    leftovers.push(file(PrunedKind::Cache, path, "recreated when it is needed"));
                }
            }
            for path in scratch.abandoned().unwrap_or_default() {
                leftovers.push(file(PrunedKind::Scratch, path, "left by an operation that ended"));
            }
            leftovers
        })
        .await
        .map_err(|e| ToolError::internal(format!("look for leftovers: {e}")))
    }

    /// Returns the disk space that each kind of object takes.
    pub(super) async fn disk_use(&self) -> Result<Vec<DiskUse>, ToolError> {
        let paths = self.paths.clone();
        tokio::task::spawn_blocking(move || {
            [
                ("images", paths.images()),
                ("drives", paths.drives()),
                ("checkpoints", paths.checkpoints()),
                ("assets", paths.assets()),
                ("vms", paths.vms()),
                ("builds", paths.builds()),
                ("cache", paths.cache()),
                ("scratch", paths.scratch()),
                ("suspended", paths.all_suspended()),
                ("prepared", paths.all_prepared()),
            ]
            .into_iter()
            .map(|(what, directory)| DiskUse {
                what: what.into(),
                items: entries(&directory).len() as u64,
                bytes: allocated(&directory),
            })
            .collect()
        })
        .await
        .map_err(|e| ToolError::internal(format!("read the disk usage: {e}")))
    }
}

fn file(kind: PrunedKind, path: PathBuf, why: &str) -> Leftover {
    let shown = Pruned { kind, name: name_of(&path), bytes: allocated(&path), why: why.into() };
    Leftover { shown, what: What::File(path) }
}

fn prepared((id, bytes): (CheckpointId, u64)) -> Leftover {
    let shown = Pruned {
        kind: PrunedKind::Cache,
        name: format!("prepared/{id}"),
        bytes,
        why: "a machine for warm starts; prepared again after a cold one".into(),
    };
    Leftover { shown, what: What::Prepared(id) }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs_err::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Returns the time since a file was written; zero if it cannot be read.
fn age(path: &Path) -> Duration {
    let written = fs_err::symlink_metadata(path).and_then(|meta| meta.modified());
    written.ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default()
}

/// Returns the disk space of a file or directory, in bytes. Blocks that files share count for each of them.
fn allocated(path: &Path) -> u64 {
    let Ok(meta) = fs_err::symlink_metadata(path) else { return 0 };
    let below: u64 = if meta.is_dir() { entries(path).iter().map(|path| allocated(path)).sum() } else { 0 };
    meta.blocks() * 512 + below
}
