//! Assets that nothing refers to: no VM, image, template or setting.

use nexus_schema::id::{AssetId, ImageId};
use nexus_schema::tools::asset::AssetKind;
use nexus_schema::{Reference, ToolError};

use super::kernel::arch_of_version;
use super::rootfs::newest_of;
use super::{DEBIAN, Provision};
use crate::op::store_error;
use crate::store::assets::{self, AssetRecord, Referrers};
use crate::store::{StoreError, ops};

/// The defaults for new VMs, as in `vm_create`.
#[derive(Debug, Clone)]
pub(crate) struct Defaults {
    /// The kernel.
    pub(crate) kernel: String,
    /// The source of root drives.
    pub(crate) image: String,
}

/// What happened to an unused asset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// It was removed.
    Done,
    /// Something refers to it now.
    InUse,
    /// A running operation may be about to refer to it.
    NotNow,
}

impl Provision {
    /// The assets that nothing refers to, by name, after some images are removed.
    pub(crate) async fn unused(
        &self,
        defaults: &Defaults,
        going: Vec<ImageId>,
    ) -> Result<Vec<AssetRecord>, ToolError> {
        let referrers =
            self.store.read(move |db| assets::referrers(db, &going)).await.map_err(store_error)?;
        Ok(unused(&referrers, defaults).into_iter().cloned().collect())
    }

    /// Removes an asset if nothing refers to it and no running operation may start to: an operation that uses assets
    /// inserts its row before it looks for them.
    pub(crate) async fn remove_unused(
        &self,
        asset: &AssetRecord,
        defaults: &Defaults,
    ) -> Result<Removal, ToolError> {
        let (id, defaults) = (asset.id, defaults.clone());
        let removal = self
            .store
            .write(move |tx| -> Result<_, StoreError> {
                // This removal is one of them.
                if ops::count_running(tx)? > 1 {
                    return Ok(Removal::NotNow);
                }
                if !unused(&assets::referrers(tx, &[])?, &defaults).iter().any(|asset| asset.id == id) {
                    return Ok(Removal::InUse);
                }
                assets::delete(tx, id)?;
                Ok(Removal::Done)
            })
            .await
            .map_err(store_error)?;
        if removal == Removal::Done {
            crate::os::remove::tree(&self.paths.asset(id)).await;
            tracing::info!(asset = %asset.name, "asset removed: nothing refers to it");
        }
        Ok(removal)
    }
}

fn unused<'r>(referrers: &'r Referrers, defaults: &Defaults) -> Vec<&'r AssetRecord> {
    let Referrers { all, used, sources, default_vmm } = referrers;
    let mut kept: Vec<AssetId> = used.iter().copied().collect();
    kept.extend(meant_kernel(all, &defaults.kernel).map(|asset| asset.id));
    kept.extend(vmm_in_force(all, default_vmm.as_deref()).map(|asset| asset.id));
    for source in sources.iter().chain([&defaults.image]) {
        let Some(from) = source.strip_prefix("rootfs:") else { continue };
        kept.extend(newest_of(all, from).map(|asset| asset.id));
        kept.extend(named(all, from).map(|asset| asset.id));
    }
    all.iter().filter(|asset| !kept.contains(&asset.id)).collect()
}

/// The installed kernel that an argument means, if any.
pub(crate) fn meant_kernel<'a>(all: &'a [AssetRecord], kernel: &str) -> Option<&'a AssetRecord> {
    let version = match kernel.split_once('@') {
        None if kernel == DEBIAN => None,
        Some((DEBIAN, version)) => Some(version),
        _ => return named(all, kernel),
    };
    let arch = arch_of_version(version).unwrap_or_default();
    let is_it = |asset: &&AssetRecord| {
        asset.kind == AssetKind::Kernel
            && asset.provider == DEBIAN
            && asset.arch == arch.as_str()
            && version.is_none_or(|version| asset.version == version)
    };
    first(all.iter().filter(is_it))
}

/// The one that was installed first; later ones become the default only on request.
fn first<'a>(assets: impl Iterator<Item = &'a AssetRecord>) -> Option<&'a AssetRecord> {
    assets.min_by_key(|asset| asset.installed_at)
}

/// The VMM for new VMs: the chosen one, or else the first one installed.
pub(crate) fn vmm_in_force<'a>(all: &'a [AssetRecord], chosen: Option<&str>) -> Option<&'a AssetRecord> {
    let vmms = || all.iter().filter(|asset| asset.kind == AssetKind::Vmm);
    let chosen = vmms().find(|asset| chosen == Some(asset.name.as_str()));
    chosen.or_else(|| first(vmms()))
}

fn named<'a>(all: &'a [AssetRecord], text: &str) -> Option<&'a AssetRecord> {
    match text.parse().ok()? {
        Reference::Id(id) => all.iter().find(|asset| asset.id == id),
        Reference::Name(name) => all.iter().find(|asset| asset.name == name),
    }
}
