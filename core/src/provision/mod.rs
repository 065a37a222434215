//! Finds, fetches or builds what VMs are made of: kernels, root filesystems and images. Each thing is made only once, even if
//! several callers want it at the same time.

mod asset;
mod available;
mod build;
mod dry_run;
mod image;
mod image_export;
mod in_flight;
mod kernel;
mod kernel_build;
mod kernel_publish;
mod meant;
mod oci;
mod provider;
mod release;
mod rootfs;
mod scratch;
mod template_build;
mod unused;
mod wanted;

use std::path::PathBuf;
use std::sync::Arc;

use nexus_schema::tools::image::BUILT_IN;
use nexus_schema::{ErrorCode, Name, ToolError};
use sha2::{Digest, Sha256};

use self::in_flight::{InFlight, Turn};
use crate::access::{Charge, Tokens};
use crate::config::AssetConfig;
use crate::image::oci::{Access, Keychain};
use crate::op::Ops;
use crate::os::given::Looks;
use crate::os::paths::Paths;
use crate::progress::Progress;
use crate::store::Store;

pub(crate) use asset::{files_of, main_file};
pub(crate) use build::{additions, base_of_packages};
pub(crate) use dry_run::{ImagePlan, step};
pub(crate) use image::{Copied, template_argument};
pub(crate) use kernel::{asset_error, summary as asset_summary};
pub(crate) use kernel_build::{BuiltKernel, WantedKernel};
pub(crate) use provider::{Change, Refusal, fields_in, key_of, name_in};
pub(crate) use scratch::Scratch;
pub(crate) use template_build::called;
pub(crate) use unused::{Defaults, Removal, meant_kernel, vmm_in_force};
pub(crate) use wanted::WantedAsset;

/// The provider of the distribution's own packages.
pub(crate) const DEBIAN: &str = "debian";

/// What VMs are made of. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Provision {
    store: Store,
    ops: Ops,
    paths: Paths,
    scratch: Scratch,
    apt_root: PathBuf,
    assets: Arc<AssetConfig>,
    versions_cache: wanted::VersionCache,
    /// How to access registries.
    registries: Access,
    /// Whose quotas what is made counts for.
    tokens: Tokens,
    /// Looks at paths that callers name.
    looks: Looks,
    in_flight: InFlight,
}

impl Provision {
    pub(crate) fn new(
        store: Store,
        ops: Ops,
        paths: Paths,
        apt_root: PathBuf,
        assets: AssetConfig,
        keychain: Keychain,
        tokens: Tokens,
    ) -> Self {
        let (assets, versions_cache) = (Arc::new(assets), wanted::VersionCache::default());
        let scratch = Scratch::new(paths.scratch());
        let registries = Access::new(keychain, assets.fetch.trust.clone());
        let in_flight = InFlight::default();
        Self {
            store,
            ops,
            paths,
            scratch,
            apt_root,
            assets,
            versions_cache,
            registries,
            tokens,
            looks: Looks::default(),
            in_flight,
        }
    }

    /// The scratch directories of work in progress.
    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The quotas that an image of this name and owner counts for. The built-in ones are for all callers and count for nobody.
    fn charges_of_image(&self, name: &Name, owner: &str) -> Vec<Charge> {
        if BUILT_IN.contains(&name.as_str()) { Vec::new() } else { self.tokens.charges(owner) }
    }

    /// Waits until nobody else is making the thing called `what`, and shows the progress; later callers then find it made.
    /// Stops waiting when the operation is cancelled.
    async fn turn(&self, what: &str, progress: &Progress) -> Result<Turn, ToolError> {
        self.in_flight.turn(what, progress).await.map_err(|_| {
            ToolError::new(
                ErrorCode::Cancelled,
                format!("cancelled while waiting for another operation that makes the {what}"),
            )
        })
    }
}

/// A path after `file:`. It must be absolute, because the daemon's working directory means nothing to a caller.
async fn file_argument(looks: &Looks, argument: &str, path: &str) -> Result<PathBuf, ToolError> {
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(ToolError::invalid(format!("`{argument}` is not an absolute path on the host")));
    }
    match looks.kind(path.clone()).await {
        Ok(_) => Ok(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(ToolError::new(
            ErrorCode::FileNotFound,
            format!("there is no {} on the host", path.display()),
        )
        .hint("give an existing path, as seen by nexusd")),
        Err(error) => Err(ToolError::invalid(format!("{error}"))),
    }
}

/// Makes a name from words that are not valid in names, with a digest to keep similar ones apart.
fn slug(head: &str, text: &str, digest: Option<&str>) -> Result<Name, ToolError> {
    let tail = digest.map(|d| format!("-{}", &d[..8])).unwrap_or_default();
    let mut name = String::from(head);
    for c in text.chars() {
        let c = if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        if !(c == '-' && name.ends_with('-')) {
            name.push(c);
        }
    }
    name.truncate(nexus_schema::name::NAME_MAX - tail.len());
    let name = format!("{}{tail}", name.trim_end_matches('-'));
    name.parse().map_err(|e| ToolError::internal(format!("{e}")))
}

fn hex_sha256(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

/// Runs blocking work on a separate thread. A panic of the work goes on here, and so fails the operation that it belongs to.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ToolError> + Send + 'static,
) -> Result<T, ToolError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ToolError::new(ErrorCode::ShuttingDown, "the daemon is shutting down")),
    }
}

#[cfg(test)]
mod tests;
