//! Publishes kernels of the store.

use std::path::PathBuf;
use std::sync::Arc;

use nexus_schema::id::AssetKindTag;
use nexus_schema::tools::asset::AssetKind;
use nexus_schema::tools::kernel::{KernelPublished, PublishedKernel};
use nexus_schema::{Arch, ErrorCode, Reference, ToolError};

use super::kernel::asset_error;
use super::{Provision, blocking};
use crate::asset::publish::{self, Kernel, PUBLIC_KEY};
use crate::asset::signer::Signer;
use crate::op::store_error;
use crate::progress::Progress;
use crate::store::assets::AssetRecord;
use crate::store::{assets, now};

impl Provision {
    /// The kernels that a call of `kernel_publish` names: installed, with everything built in, unchanged since.
    pub(crate) async fn publishable(
        &self,
        named: &[Reference<AssetKindTag>],
    ) -> Result<Vec<AssetRecord>, ToolError> {
        let mut all = Vec::new();
        for reference in named {
            let wanted = reference.clone();
            let found = self.store.read(move |db| assets::get(db, &wanted)).await.map_err(store_error)?;
            all.push(found.ok_or_else(|| {
                ToolError::new(ErrorCode::AssetNotFound, format!("there is no asset {reference}"))
                    .hint("call asset_list to see the assets")
            })?);
        }
        if named.is_empty() {
            all = self.built_kernels().await?;
        }
        if all.is_empty() {
            let message = "there is nothing to publish: no kernel was built here";
            return Err(ToolError::new(ErrorCode::AssetNotFound, message)
                .hint("call kernel_build first, or name the kernels"));
        }
        for asset in &all {
            if asset.kind != AssetKind::Kernel {
                return Err(ToolError::invalid(format!("asset {} is no kernel", asset.name)));
            }
            if asset.arch != Arch::HOST.as_str() {
                let message = format!(
                    "kernel {} is for {}, and this host publishes kernels for {} only",
                    asset.name,
                    asset.arch,
                    Arch::HOST
                );
                return Err(ToolError::invalid(message));
            }
            if asset.files.len() > 1 {
                let message = format!(
                    "kernel {} needs modules, and only kernels without any are published",
                    asset.name
                );
                return Err(
                    ToolError::invalid(message).hint("call kernel_build for one with everything built in")
                );
            }
        }
        Ok(all)
    }

    /// `kernel_publish`.
    pub(crate) async fn publish_kernels(
        &self,
        kernels: Vec<AssetRecord>,
        provider: &str,
        directory: PathBuf,
        key: PathBuf,
        progress: &Progress,
    ) -> Result<KernelPublished, ToolError> {
        let provider = Arc::new(self.provider(provider).await?);
        for kernel in &kernels {
            let check = self.verify(kernel, progress).await?;
            if !check.ok {
                let message = format!("kernel {} is damaged: {}", kernel.name, check.problems.join("; "));
                return Err(ToolError::new(ErrorCode::VerificationFailed, message)
                    .hint("remove it with asset_remove, and build or download it again"));
            }
        }
        let kernel = |asset: AssetRecord| Kernel {
            file: self.paths.asset(asset.id).join(super::main_file(AssetKind::Kernel)),
            name: asset.name,
            version: asset.version,
        };
        let kernels: Vec<Kernel> = kernels.into_iter().map(kernel).collect();
        let now = now().as_millis().unsigned_abs() / 1000;
        let progress = progress.clone();
        blocking(move || {
            let signer = Signer::read(&key).map_err(asset_error)?;
            let written = publish::publish(&directory, &provider, &kernels, &signer, now, &progress);
            let kernels = written.map_err(asset_error)?.into_iter().map(|written| PublishedKernel {
                name: written.name,
                version: written.version,
                file: written.file,
                sha256: written.sha256.to_string(),
                size_bytes: written.size_bytes,
            });
            Ok(KernelPublished {
                kernels: kernels.collect(),
                public_key: directory.join(PUBLIC_KEY).display().to_string(),
                fingerprint: signer.fingerprint().to_owned(),
                directory: directory.display().to_string(),
            })
        })
        .await
    }
}
