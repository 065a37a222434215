//! Root filesystems to make images from: `rootfs:PROVIDER[@VERSION]`, or `rootfs:` with the name of an asset.

use nexus_schema::tools::asset::AssetKind;
use nexus_schema::{Name, Reference, ToolError};

use super::asset::main_file;
use super::wanted::WantedAsset;
use super::{Provision, slug};
use crate::asset::provider::compare;
use crate::image::Source;
use crate::op::store_error;
use crate::progress::Progress;
use crate::provision::kernel::asset_error;
use crate::store::assets;
use crate::store::assets::AssetRecord;

impl Provision {
    /// Checks what follows `rootfs:`; an error if it is known at once that it does not exist.
    pub(super) async fn check_rootfs(&self, from: &str) -> Result<(), ToolError> {
        match self.installed_rootfs(from).await? {
            Some(_) => Ok(()),
            None => self.order(&wanted_rootfs(from)).await.map(drop),
        }
    }

    /// The root filesystem, which is downloaded if none that fits is installed.
    pub(super) async fn rootfs(
        &self,
        from: &str,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        match self.installed_rootfs(from).await? {
            Some(asset) => Ok(asset),
            None => self.download(wanted_rootfs(from), owner, progress).await,
        }
    }

    /// The name of the image made from one; the same bytes give the same name.
    pub(super) fn image_of_rootfs(asset: &AssetRecord) -> Result<Name, ToolError> {
        slug("rootfs-", asset.name.as_str(), Some(&asset.sha256))
    }

    /// Its file, for the image builder.
    pub(super) fn rootfs_source(&self, asset: &AssetRecord) -> Result<Source, ToolError> {
        let file = self.paths.asset(asset.id).join(main_file(AssetKind::Rootfs));
        let failed = |error| asset_error(crate::asset::AssetError::io("read a root filesystem")(error));
        fs_err::metadata(&file).map_err(failed)?;
        Source::detect(&file).map_err(|error| crate::op::described(error.code(), &error, error.hint()))
    }

    /// The asset of that name; else the newest of that provider whose version equals the given one or begins with it.
    pub(super) async fn installed_rootfs(&self, from: &str) -> Result<Option<AssetRecord>, ToolError> {
        if let Ok(reference) = from.parse::<Reference<_>>() {
            let named = self.store.read(move |db| assets::get(db, &reference)).await.map_err(store_error)?;
            if let Some(asset) = named {
                return match asset.kind {
                    AssetKind::Rootfs => Ok(Some(asset)),
                    AssetKind::Kernel | AssetKind::Vmm => {
                        Err(ToolError::invalid(format!("asset {from} is not a root filesystem")))
                    }
                };
            }
        }
        let mut all = self.store.read(assets::all).await.map_err(store_error)?;
        let former = self.former(&all).await?;
        all.retain(|asset| !former.contains(&asset.id));
        Ok(newest_of(&all, from).cloned())
    }
}

/// The newest root filesystem of `PROVIDER[@VERSION]` whose version equals the given one or begins with it.
pub(super) fn newest_of<'a>(all: &'a [AssetRecord], from: &str) -> Option<&'a AssetRecord> {
    let (provider, version) = from.split_once('@').map_or((from, None), |(p, v)| (p, Some(v)));
    let version = version.map(|version| version.strip_prefix('v').unwrap_or(version));
    let is_one = |asset: &&AssetRecord| {
        let fits = |version: &str| {
            asset.version.strip_prefix(version).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        asset.kind == AssetKind::Rootfs && asset.provider == provider && version.is_none_or(fits)
    };
    all.iter().filter(is_one).max_by(|a, b| compare(&a.version, &b.version))
}

/// What to download if none that fits is installed.
pub(super) fn wanted_rootfs(from: &str) -> WantedAsset {
    WantedAsset {
        kind: AssetKind::Rootfs,
        from: Some(from.to_owned()),
        version: None,
        name: None,
        sha256: None,
        unverified: false,
    }
}
