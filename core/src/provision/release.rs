//! Root filesystems of distributions, made from packages of the host's own archive, whose chain of trust applies.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::tools::asset::{AssetFile, AssetKind, AssetSummary, Verified};

use super::Provision;
use super::asset::main_file;
use super::available::available;
use super::image::image_error;
use super::kernel::asset_error;
use super::wanted::Order;
use crate::asset::debian::{Archive, BootstrapSource, ReleaseVersion};
use crate::asset::pipeline::Made;
use crate::asset::provider::{Found, Provider};
use crate::asset::{AssetError, Sha256, hashed};
use crate::image::{self, Bootstrap, ImageError, Limits, check_room};
use crate::os::failpoint;
use crate::progress::Progress;

/// After how many bytes the free disk space is checked again.
const LOOK: u64 = 16 << 20;

impl Provision {
    /// How to make a root filesystem from packages, with some in addition to the default ones.
    pub(super) fn bootstrap(&self, packages: &BootstrapSource, more: &[String]) -> Bootstrap {
        Bootstrap {
            mirrors: packages.mirrors.clone(),
            suite: packages.suite.clone(),
            keyring: packages.keyring.clone(),
            distro: packages.distro.clone(),
            options: packages.proxies.clone(),
            credentials: packages.credentials.clone(),
            environment: self.assets.proxies.clone(),
            trust: self.assets.fetch.trust.clone(),
            program: self.assets.mmdebstrap.clone(),
            packages: image::PACKAGES.iter().map(|p| (*p).to_owned()).chain(more.iter().cloned()).collect(),
        }
    }

    /// The release that an order means, in the current state of the archive.
    pub(super) async fn release(
        &self,
        order: &Order,
        progress: &Progress,
    ) -> Result<(ReleaseVersion, BootstrapSource), ToolError> {
        let archive = self.archive(progress).await?;
        archive.release_source(order.provider.distribution(), order.version.as_deref()).map_err(asset_error)
    }

    /// `asset_download` with `check`: the release exists, and everything needed to make it is installed.
    pub(super) async fn look_up_release(
        &self,
        order: &Order,
        progress: &Progress,
    ) -> Result<AssetSummary, ToolError> {
        let (release, packages) = self.release(order, progress).await?;
        self.bootstrap(&packages, &[]).check().map_err(image_error)?;
        available_release(&order.provider, release)
    }

    /// Makes the root filesystem of a release in `into`.
    pub(super) async fn make_release(
        &self,
        packages: &BootstrapSource,
        given: Option<Sha256>,
        into: &Path,
        progress: &Progress,
    ) -> Result<Made, ToolError> {
        let bootstrap = self.bootstrap(packages, &[]);
        let scratch = into.join("packages");
        let name = main_file(AssetKind::Rootfs);
        let file = into.join(name);
        for directory in [into, &scratch] {
            fs_err::create_dir_all(directory).map_err(|e| image_error(ImageError::write(directory, e)))?;
        }
        let made = bootstrap
            .run(&scratch, progress, |pipe| async {
                let work = move || keep(pipe, &file, &Limits::default());
                tokio::task::spawn_blocking(work).await.map_err(|_| ImageError::Worker)?
            })
            .await;
        crate::os::remove::tree(&scratch).await;
        let (digest, size_bytes) = made.map_err(image_error)?;
        let origin = packages.mirrors.join("; ");
        if let Some(expected) = given.filter(|given| *given != digest) {
            let what = format!("the root filesystem of {origin}");
            return Err(asset_error(AssetError::Checksum { what, expected, found: digest }));
        }
        failpoint::reach("release-made");
        Ok(Made {
            files: vec![AssetFile { name: name.into(), sha256: digest.to_string(), size_bytes }],
            origin,
            download: digest,
            verified: Verified::Signature,
        })
    }
}

/// The releases of a provider as they are listed before they are made.
pub(super) fn available_releases(
    provider: &Provider,
    archive: &Archive,
) -> Result<Vec<AssetSummary>, ToolError> {
    let releases = archive.releases(provider.distribution());
    releases.into_iter().map(|release| available_release(provider, release)).collect()
}

fn available_release(provider: &Provider, release: ReleaseVersion) -> Result<AssetSummary, ToolError> {
    available(provider, AssetKind::Rootfs, &Found { version: release.codename, size_bytes: None })
}

/// Writes a stream to a file while hashing it, up to the limit.
fn keep(from: impl Read, path: &Path, limits: &Limits) -> Result<(Sha256, u64), ImageError> {
    let failed = |e: io::Error| ImageError::write(path, e);
    let directory: PathBuf = path.parent().unwrap_or(path).to_owned();
    let mut reader = hashed(from);
    let mut file = File::create(path).map_err(failed)?;
    let (mut buffer, mut written, mut unseen) = (vec![0; 256 << 10], 0, LOOK);
    loop {
        if unseen >= LOOK {
            unseen = 0;
            check_room(&directory, limits.keep_free)?;
        }
        let read = reader.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            break;
        }
        written += read as u64;
        unseen += read as u64;
        if written > limits.bytes {
            return Err(ImageError::TooLarge { limit: limits.bytes, what: "bytes of a root filesystem" });
        }
        file.write_all(&buffer[..read]).map_err(failed)?;
        failpoint::reach("release-piece");
    }
    file.sync_all().map_err(failed)?;
    reader.finish().map_err(failed)
}
