//! Kernels.

use std::path::Path;

use nexus_schema::id::AssetId;
use nexus_schema::tools::asset::{AssetKind, AssetSummary};
use nexus_schema::{Arch, ErrorCode, Name, Reference, ToolError};

use super::{DEBIAN, Provision, blocking, file_argument, hex_sha256, slug};
use crate::asset::{AssetError, KernelFiles, debian::Archive, import_kernel};
use crate::op::described;
use crate::op::{did_you_mean, store_error};
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::assets::AssetRecord;
use crate::store::{assets, now, random_id};

/// Which kernel is wanted.
pub(super) enum Want {
    /// The distribution's: a version, or the newest.
    Debian(Option<String>),
    /// An installed kernel.
    Installed(Box<AssetRecord>),
    /// A file on the host.
    File(std::path::PathBuf),
}

impl Provision {
    pub(super) async fn want_kernel(&self, want: &str) -> Result<Want, ToolError> {
        if let Some(path) = want.strip_prefix("file:") {
            return file_argument(&self.looks, want, path).await.map(Want::File);
        }
        if let Ok(reference) = want.parse::<Reference<_>>() {
            let found = self.store.read(move |db| assets::get(db, &reference)).await.map_err(store_error)?;
            if let Some(asset) = found {
                return match asset.kind {
                    AssetKind::Kernel => Ok(Want::Installed(Box::new(asset))),
                    AssetKind::Rootfs | AssetKind::Vmm => {
                        Err(ToolError::invalid(format!("asset {want} is no kernel")))
                    }
                };
            }
        }
        match want.split_once('@') {
            None if want == DEBIAN => Ok(Want::Debian(None)),
            Some((DEBIAN, version)) => Ok(Want::Debian(Some(version.to_owned()))),
            _ => {
                let all = self.store.read(assets::all).await.map_err(store_error)?;
                let kernels = all.iter().filter(|asset| asset.kind == AssetKind::Kernel);
                let error = ToolError::new(ErrorCode::AssetNotFound, format!("there is no kernel `{want}`"))
                    .hint("call asset_list to see the kernels, or give `debian` or file:PATH");
                let names = kernels.map(|asset| asset.name.as_str()).chain([DEBIAN]);
                Err(did_you_mean(error, want, names))
            }
        }
    }

    /// Refuses a kernel that cannot exist, as far as that is known at once.
    pub(crate) async fn check_kernel(&self, want: &str) -> Result<(), ToolError> {
        self.want_kernel(want).await.map(drop)
    }

    /// The wanted kernel, which is downloaded or imported if it is not installed. `arch` is the architecture of the distribution's kernel, unless
    /// its version says another one.
    pub(crate) async fn kernel(
        &self,
        want: &str,
        arch: Arch,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        match self.want_kernel(want).await? {
            Want::Installed(asset) => Ok(*asset),
            Want::Debian(version) => {
                let arch = arch_of_version(version.as_deref()).unwrap_or(arch);
                let _turn = self.turn("kernel debian", progress).await?;
                match self.installed_debian(version.clone(), arch).await? {
                    Some(asset) => Ok(asset),
                    None => {
                        self.fetch_debian_kernel(arch, version.as_deref(), None, None, owner, progress).await
                    }
                }
            }
            Want::File(path) => self.import_kernel(&path, None, None, owner, progress).await,
        }
    }

    /// The distribution's installed kernel of that version; without a version, the first one installed.
    pub(super) async fn installed_debian(
        &self,
        version: Option<String>,
        arch: Arch,
    ) -> Result<Option<AssetRecord>, ToolError> {
        self.store
            .read(move |db| assets::find(db, AssetKind::Kernel, DEBIAN, version.as_deref(), arch))
            .await
            .map_err(store_error)
    }

    /// `asset_download` of a kernel.
    pub(crate) async fn download_kernel(
        &self,
        from: &str,
        version: Option<&str>,
        name: Option<Name>,
        sha256: Option<&str>,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        if let Some(path) = from.strip_prefix("file:") {
            let path = file_argument(&self.looks, from, path).await?;
            return self.import_kernel(&path, name, sha256, owner, progress).await;
        }
        if from != DEBIAN {
            return Err(ToolError::new(ErrorCode::AssetNotFound, format!("there is no provider `{from}`"))
                .hint("give `debian` or file:PATH"));
        }
        let arch = arch_of_version(version).unwrap_or_default();
        let _turn = self.turn("kernel debian", progress).await?;
        self.fetch_debian_kernel(arch, version, name, sha256, owner, progress).await
    }

    async fn fetch_debian_kernel(
        &self,
        arch: Arch,
        version: Option<&str>,
        name: Option<Name>,
        sha256: Option<&str>,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        progress.step("reading the package archive");
        let archive = self.archive_for(arch, progress).await?;
        // The newest version may already be installed.
        let versions = archive.kernels().await.map_err(asset_error)?;
        let newest = newest_of(&versions, version, |kernel| &kernel.version);
        if let Some(newest) = newest
            && let Some(asset) = self.installed_debian(Some(newest.version.clone()), arch).await?
        {
            return Ok(asset);
        }
        let id: AssetId = random_id();
        let directory = self.paths.asset(id);
        progress.step("downloading the kernel");
        let version = newest.map(|kernel| kernel.version.as_str()).or(version);
        let fetched = archive.fetch_kernel(version, &directory, progress).await;
        let made = async {
            let files = fetched.map_err(asset_error)?;
            check_sum(&files, sha256)?;
            let name = match name {
                Some(name) => name,
                None => slug("debian-", &files.version, None)?,
            };
            self.add_kernel(id, name, DEBIAN, &files, owner).await
        }
        .await;
        self.cleaned(made, &directory).await
    }

    async fn import_kernel(
        &self,
        file: &Path,
        name: Option<Name>,
        sha256: Option<&str>,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        let _turn = self.turn(&format!("kernel {}", file.display()), progress).await?;
        progress.step(format!("importing the kernel {}", file.display()));
        let id: AssetId = random_id();
        let directory = self.paths.asset(id);
        let (source, into, expected) = (file.to_owned(), directory.clone(), sha256.map(str::to_owned));
        let imported =
            blocking(move || import_kernel(&source, &into, expected.as_deref()).map_err(asset_error)).await;
        let made = async {
            let files = imported?;
            let hash = files.sha256.clone();
            let found = self
                .store
                .read(move |db| assets::find_by_hash(db, AssetKind::Kernel, &hash))
                .await
                .map_err(store_error)?;
            if let Some(asset) = found {
                return Ok((asset, false));
            }
            let stem = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let name = match name {
                Some(name) => name,
                None => slug("file-", &stem, Some(&hex_sha256(files.sha256.as_bytes())))?,
            };
            self.add_kernel(id, name, "file", &files, owner).await.map(|asset| (asset, true))
        }
        .await;
        match made {
            Ok((asset, true)) => Ok(asset),
            Ok((asset, false)) => {
                crate::os::remove::tree(&directory).await;
                Ok(asset)
            }
            Err(error) => self.cleaned(Err(error), &directory).await,
        }
    }

    pub(super) async fn add_kernel(
        &self,
        id: AssetId,
        name: Name,
        provider: &str,
        files: &KernelFiles,
        owner: &str,
    ) -> Result<AssetRecord, ToolError> {
        let (hashed, directory) = (files.clone(), self.paths.asset(id));
        let noted = blocking(move || super::asset::kernel_files(&hashed, &directory)).await?;
        let record = AssetRecord {
            id,
            name,
            kind: AssetKind::Kernel,
            provider: provider.into(),
            version: files.version.clone(),
            arch: files.arch.as_str().into(),
            sha256: files.sha256.clone(),
            size_bytes: files.size_bytes,
            verified: files.verified,
            files: noted,
            origin: files.origin.clone(),
            download_sha256: None,
            owner: owner.into(),
            installed_at: now(),
        };
        failpoint::reach("kernel-placed");
        let row = record.clone();
        self.store.write(move |tx| assets::insert(tx, &row)).await.map_err(store_error)?;
        failpoint::reach("kernel-noted");
        tracing::info!(asset = %record.name, version = record.version, "kernel installed");
        Ok(record)
    }

    /// Removes the remains of a failed installation.
    pub(super) async fn cleaned<T>(
        &self,
        made: Result<T, ToolError>,
        directory: &Path,
    ) -> Result<T, ToolError> {
        if made.is_err() {
            crate::os::remove::tree(directory).await;
        }
        made
    }

    /// The files of an installed kernel.
    pub(crate) async fn kernel_files(&self, id: AssetId) -> Result<KernelFiles, ToolError> {
        let directory = self.paths.asset(id);
        blocking(move || KernelFiles::load(&directory).map_err(asset_error)).await
    }

    /// The host's package archive.
    pub(super) async fn archive(&self, progress: &Progress) -> Result<Archive, ToolError> {
        self.archive_for(Arch::HOST, progress).await
    }

    /// The same, with packages of an architecture.
    pub(super) async fn archive_for(&self, arch: Arch, progress: &Progress) -> Result<Archive, ToolError> {
        Archive::open_for(arch, &self.apt_root, &self.assets.fetch, progress).await.map_err(asset_error)
    }
}

/// What can be downloaded, apart from what is installed.
pub(super) async fn available_kernels(archive: &Archive) -> Result<Vec<AssetSummary>, ToolError> {
    let versions = archive.kernels().await.map_err(asset_error)?;
    versions
        .into_iter()
        .map(|kernel| {
            Ok(AssetSummary {
                id: None,
                name: slug("debian-", &kernel.version, None)?,
                kind: AssetKind::Kernel,
                provider: DEBIAN.into(),
                version: kernel.version,
                arch: archive.arch().as_str().into(),
                installed: false,
                default: false,
                sha256: None,
                size_bytes: Some(kernel.size_bytes),
                verified: None,
                path: None,
                installed_at: None,
                drivers: crate::asset::provider::all_drivers(),
                unsuitable: None,
            })
        })
        .collect()
}

/// A row in the form that callers see.
pub(crate) fn summary(asset: AssetRecord, default: bool, path: String) -> AssetSummary {
    AssetSummary {
        id: Some(asset.id),
        default,
        name: asset.name,
        kind: asset.kind,
        provider: asset.provider,
        version: asset.version,
        arch: asset.arch,
        installed: true,
        sha256: Some(asset.sha256),
        size_bytes: Some(asset.size_bytes),
        verified: Some(asset.verified),
        path: Some(path),
        installed_at: Some(asset.installed_at),
        drivers: Vec::new(),
        unsuitable: None,
    }
}

/// Turns an error of the asset room into the error that callers see.
pub(crate) fn asset_error(error: AssetError) -> ToolError {
    described(error.code(), &error, error.hint().map(str::to_owned))
}

fn check_sum(files: &KernelFiles, wanted: Option<&str>) -> Result<(), ToolError> {
    match wanted {
        Some(wanted) if !wanted.eq_ignore_ascii_case(&files.sha256) => Err(ToolError::new(
            ErrorCode::VerificationFailed,
            format!("the kernel {} has SHA-256 {}, not {wanted}", files.version, files.sha256),
        )),
        _ => Ok(()),
    }
}

/// The architecture that a version of a distribution's kernel ends with, as `6.12.48+deb12-cloud-arm64` does.
pub(super) fn arch_of_version(version: Option<&str>) -> Option<Arch> {
    version?.rsplit('-').next().and_then(Arch::named)
}

/// From kernels sorted newest first: the one with exactly this version, else the newest whose version begins with it.
pub(super) fn newest_of<'a, T>(
    kernels: &'a [T],
    wanted: Option<&str>,
    version: impl Fn(&T) -> &str,
) -> Option<&'a T> {
    let Some(wanted) = wanted else { return kernels.first() };
    let begins = |kernel: &&T| {
        let rest = version(kernel).strip_prefix(wanted);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    kernels.iter().find(|kernel| version(kernel) == wanted).or_else(|| kernels.iter().find(begins))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_may_say_its_architecture() {
        assert_eq!(arch_of_version(Some("6.12.9+deb12-cloud-arm64")), Some(Arch::Aarch64));
        assert_eq!(arch_of_version(Some("linux-image-6.1.0-5-cloud-amd64")), Some(Arch::X86_64));
        for unsaid in [None, Some("6.12"), Some("6.8.0-5-generic"), Some("")] {
            assert_eq!(arch_of_version(unsaid), None);
        }
    }

    #[test]
    fn a_version_may_be_cut_short() {
        let kernels = ["6.12.9+deb12", "6.1.0-56-cloud", "6.1.0-5-cloud"];
        let newest = |wanted| newest_of(&kernels, wanted, |kernel| kernel).copied();
        assert_eq!(newest(None), Some("6.12.9+deb12"));
        assert_eq!(newest(Some("6.1")), Some("6.1.0-56-cloud"));
        assert_eq!(newest(Some("6.1.0-5")), Some("6.1.0-5-cloud"));
        assert_eq!(newest(Some("6.12.9")), Some("6.12.9+deb12"));
        assert_eq!((newest(Some("6.12.")), newest(Some("7.0"))), (None, None));
    }
}
