//! The asset tools.

use nexus_schema::access::Scope;
use nexus_schema::id::{AssetId, AssetKindTag};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::asset::{
    AssetDetails, AssetDownloadParams, AssetInspectParams, AssetKind, AssetListOutput, AssetListParams,
    AssetRemoveOutput, AssetRemoveParams, AssetSummary, AssetVerifyOutput, AssetVerifyParams,
};
use nexus_schema::{Arch, ErrorCode, Reference, ToolError};

use super::image::cut;
use super::source::may_use;
use super::{CallContext, Nexus, Shared, page, patience};
use crate::op::{did_you_mean, store_error};
use crate::provision::{WantedAsset, asset_summary, files_of, main_file, meant_kernel, vmm_in_force};
use crate::store::assets::AssetRecord;
use crate::store::{StoreError, assets, settings};
use crate::vm::defaults;

/// The default assets of new VMs.
pub(super) struct Chosen {
    kernel: Option<AssetId>,
    vmm: Option<AssetId>,
}

impl Nexus {
    /// The tool `asset_list`.
    pub async fn asset_list(
        &self,
        _: &CallContext,
        params: AssetListParams,
    ) -> Result<AssetListOutput, ToolError> {
        let limit = page(params.limit)? as usize;
        let chosen = self.shared.chosen().await?;
        let rows = self.shared.store.read(assets::all).await.map_err(store_error)?;
        let former = self.shared.provision.former(&rows).await?;
        let mut all: Vec<AssetSummary> =
            rows.into_iter().map(|row| self.shared.asset_summary(row, &chosen)).collect();
        let mut problems = Vec::new();
        if params.available.unwrap_or(true) {
            let (available, unavailable) = self.shared.provision.available(params.kind).await?;
            problems = unavailable;
            for asset in available {
                let same = |a: &AssetSummary| {
                    let is_its_own = a.id.is_none_or(|id| !former.contains(&id));
                    is_its_own && a.provider == asset.provider && a.version == asset.version
                };
                if !all.iter().any(same) {
                    all.push(asset);
                }
            }
        }
        all.retain(|asset| params.kind.is_none_or(|kind| kind == asset.kind));
        let (assets, next_cursor) = cut(all, params.cursor.as_deref(), limit)?;
        Ok(AssetListOutput { assets, problems, next_cursor })
    }

    /// The tool `asset_download`.
    pub async fn asset_download(
        &self,
        ctx: &CallContext,
        params: AssetDownloadParams,
    ) -> Result<OpOutcome<AssetSummary>, ToolError> {
        let wait = patience(params.wait_s)?;
        let sha256 = match params.sha256.as_deref().map(str::parse) {
            None => None,
            Some(Ok(digest)) => Some(digest),
            Some(Err(_)) => return Err(ToolError::invalid("sha256 is not 64 hexadecimal digits")),
        };
        let default = params.make_default.unwrap_or(false);
        may_use(&ctx.caller, params.from.as_deref()).await?;
        // These run on the host, and what is made the default concerns all callers.
        let concerns_all = default || (params.kind == AssetKind::Vmm && params.check != Some(true));
        if concerns_all && !ctx.caller.has(Scope::Admin) {
            let message = "VMM programs and new defaults need the scope admin, which this token lacks";
            return Err(ToolError::new(ErrorCode::Forbidden, message)
                .hint("ask for a token with that scope, or name the kernel in vm_create"));
        }
        if default && params.kind == AssetKind::Rootfs {
            return Err(ToolError::invalid("make_default is only for kernels and VMMs")
                .hint("create an image from it with image_create"));
        }
        let wanted = WantedAsset {
            kind: params.kind,
            from: params.from,
            version: params.version,
            name: params.name,
            sha256,
            unverified: params.unverified.unwrap_or(false),
        };
        let named = wanted.name.as_ref().map(|name| (name.to_string(), name.to_string()));
        let id = self.shared.begin_op("asset_download", ctx, named).await?;
        let (shared, owner) = (self.shared.clone(), ctx.caller.owner.clone());
        let only_check = params.check.unwrap_or(false);
        self.shared.ops.run(id, move |progress| async move {
            if only_check {
                let found = shared.provision.look_up(wanted, &progress).await?;
                return match shared.provision.installed_of(&found).await? {
                    Some(record) => Ok(AssetSummary {
                        drivers: found.drivers,
                        unsuitable: found.unsuitable,
                        ..shared.asset_summary(record, &shared.chosen().await?)
                    }),
                    None => Ok(found),
                };
            }
            let asset = shared.provision.download(wanted, &owner, &progress).await?;
            if default {
                shared.make_default(&asset, &owner).await?;
            }
            if asset.kind == AssetKind::Vmm {
                shared.host(true).await?;
            }
            let chosen = shared.chosen().await?;
            Ok(shared.asset_summary(asset, &chosen))
        });
        self.shared.ops.wait(ctx, id, wait).await
    }

    /// The tool `asset_inspect`.
    pub async fn asset_inspect(
        &self,
        ctx: &CallContext,
        params: AssetInspectParams,
    ) -> Result<AssetDetails, ToolError> {
        let record = self.shared.asset(params.asset).await?;
        let of = record.clone();
        let used_by = self.shared.store.read(move |db| assets::users(db, &of)).await.map_err(store_error)?;
        let chosen = self.shared.chosen().await?;
        Ok(AssetDetails {
            origin: record.origin.clone(),
            download_sha256: record.download_sha256.clone(),
            files: files_of(&record),
            owner: record.owner.clone(),
            // How others use it is none of a token's business.
            used_by: if ctx.caller.has(Scope::Admin) { used_by } else { Vec::new() },
            asset: self.shared.asset_summary(record, &chosen),
        })
    }

    /// The tool `asset_verify`.
    pub async fn asset_verify(
        &self,
        ctx: &CallContext,
        params: AssetVerifyParams,
    ) -> Result<OpOutcome<AssetVerifyOutput>, ToolError> {
        let wait = patience(params.wait_s)?;
        let mut records = match params.asset {
            Some(asset) => vec![self.shared.asset(asset).await?],
            None => self.shared.store.read(assets::all).await.map_err(store_error)?,
        };
        records.retain(|record| params.kind.is_none_or(|kind| kind == record.kind));
        let id = self.shared.begin_op("asset_verify", ctx, None).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(id, move |progress| async move {
            let mut checks = Vec::new();
            for record in &records {
                checks.push(shared.provision.verify(record, &progress).await?);
            }
            checks.sort_by_key(|check| check.ok);
            Ok(AssetVerifyOutput { ok: checks.iter().all(|check| check.ok), assets: checks })
        });
        self.shared.ops.wait(ctx, id, wait).await
    }

    /// The tool `asset_remove`.
    pub async fn asset_remove(
        &self,
        ctx: &CallContext,
        params: AssetRemoveParams,
    ) -> Result<AssetRemoveOutput, ToolError> {
        let record = self.shared.asset(params.asset).await?;
        let was_default = self.shared.provision.remove(&record, &ctx.caller).await?;
        if record.kind == AssetKind::Vmm {
            self.shared.host(true).await?;
        }
        Ok(AssetRemoveOutput {
            id: record.id,
            kind: record.kind,
            was_default,
            freed_bytes: files_of(&record).iter().map(|file| file.size_bytes).sum(),
            name: record.name,
        })
    }
}

impl Shared {
    async fn asset(&self, asset: Reference<AssetKindTag>) -> Result<AssetRecord, ToolError> {
        let wanted = asset.clone();
        let found = self.store.read(move |db| assets::get(db, &wanted)).await.map_err(store_error)?;
        if let Some(found) = found {
            return Ok(found);
        }
        let all = self.store.read(assets::all).await.map_err(store_error)?;
        let error = ToolError::new(ErrorCode::AssetNotFound, format!("there is no asset {asset}"))
            .hint("call asset_list to see the assets");
        Err(did_you_mean(error, &asset.to_string(), all.iter().map(|asset| asset.name.as_str())))
    }

    pub(super) async fn chosen(&self) -> Result<Chosen, ToolError> {
        let kernel = defaults::read(&self.store).await?.kernel;
        let (all, vmm) = self
            .store
            .read(|db| -> Result<_, StoreError> {
                Ok((assets::all(db)?, settings::get(db, settings::DEFAULT_VMM)?))
            })
            .await
            .map_err(store_error)?;
        Ok(Chosen {
            kernel: meant_kernel(&all, &kernel).map(|asset| asset.id),
            vmm: vmm_in_force(&all, vmm.as_deref()).map(|asset| asset.id),
        })
    }

    pub(super) fn asset_summary(&self, record: AssetRecord, chosen: &Chosen) -> AssetSummary {
        let path = self.paths.asset(record.id).join(main_file(record.kind)).display().to_string();
        let default = match record.kind {
            AssetKind::Kernel => chosen.kernel,
            AssetKind::Vmm => chosen.vmm,
            AssetKind::Rootfs => None,
        };
        let default = default == Some(record.id);
        asset_summary(record, default, path)
    }

    /// Makes an asset the default for new VMs.
    pub(super) async fn make_default(&self, asset: &AssetRecord, who: &str) -> Result<(), ToolError> {
        if asset.arch != Arch::HOST.as_str() {
            let message =
                format!("{} is for {}, and the default is for VMs of {}", asset.name, asset.arch, Arch::HOST);
            return Err(ToolError::invalid(message).hint("name it when a VM is created"));
        }
        let (name, who) = (asset.name.to_string(), who.to_owned());
        let key = match asset.kind {
            AssetKind::Kernel => settings::DEFAULT_KERNEL,
            AssetKind::Vmm | AssetKind::Rootfs => settings::DEFAULT_VMM,
        };
        self.store.write(move |tx| settings::set(tx, key, &name, &who)).await.map_err(store_error)?;
        if asset.kind == AssetKind::Vmm { self.provision.link_programs().await } else { Ok(()) }
    }
}
