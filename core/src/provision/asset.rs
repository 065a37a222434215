//! Assets of every kind: downloads and verifies them, verifies them again, and removes them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use nexus_schema::access::Scope;
use nexus_schema::id::AssetId;
use nexus_schema::tools::asset::{AssetCheck, AssetFile, AssetKind, AssetSummary, Verified};
use nexus_schema::{Arch, ErrorCode, Name, Reference, ToolError};

use super::kernel::asset_error;
use super::unused::{meant_kernel, vmm_in_force};
use super::wanted::{Order, WantedAsset};
use super::{DEBIAN, Provision, blocking, hex_sha256, slug};
use crate::access::Caller;
use crate::asset::pipeline::{self, Job, Made};
use crate::asset::provider::{Found, Plan, Provider, Source, Values, Versions, with_version};
use crate::asset::{AssetError, Fetcher, ProviderProblem, VMLINUX, adopt_kernel, hash_file, is_program};
use crate::image::Source as ImageSource;
use crate::op::store_error;
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::assets::AssetRecord;
use crate::store::{StoreError, assets, now, providers, random_id, settings};
use crate::vmm::downloaded_programs;

/// The file names of assets that consist of one file.
/// How long a provider may take to send its list of versions.
const LIST_DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);
const KERNEL: &str = "kernel";
const ROOTFS: &str = "rootfs";

/// The main file of an asset of a kind.
pub(crate) fn main_file(kind: AssetKind) -> &'static str {
    match kind {
        AssetKind::Kernel => VMLINUX,
        AssetKind::Rootfs => ROOTFS,
        AssetKind::Vmm => downloaded_programs()[0],
    }
}

impl Provision {
    /// `asset_download`.
    pub(crate) async fn download(
        &self,
        wanted: WantedAsset,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        let order = self.order(&wanted).await?;
        let is_of_packages = order.provider.apt().is_some();
        if is_of_packages && wanted.kind == AssetKind::Kernel {
            let (version, sha256) =
                (order.version.as_deref(), wanted.sha256.map(|digest| digest.to_string()));
            return self
                .download_kernel(DEBIAN, version, wanted.name, sha256.as_deref(), owner, progress)
                .await;
        }
        if let Some(asset) = self.installed(&order, wanted.kind).await? {
            return Ok(asset);
        }
        let (version, packages) = match is_of_packages {
            true => {
                let (release, packages) = self.release(&order, progress).await?;
                (Some(release.codename), Some(packages))
            }
            false => (self.found(&order, progress).await?.map(|found| found.version), None),
        };
        let order = Order { version, ..order };
        if let Some(asset) = self.installed(&order, wanted.kind).await? {
            return Ok(asset);
        }
        let doing = match &packages {
            Some(_) => "making",
            None => check_vouched(&order, &wanted)?,
        };
        let what = match (&order.version, order.given.values().next()) {
            (Some(version), _) => format!("{} {version}", order.provider.name),
            (None, given) => given.cloned().unwrap_or_default(),
        };
        let _turn = self.turn(&what, progress).await?;
        // Another call may have made it meanwhile.
        if let Some(asset) = self.installed(&order, wanted.kind).await? {
            return Ok(asset);
        }
        if let Some(name) = &wanted.name {
            self.check_name(name).await?;
        }
        progress.step(format!("{doing} {what}"));
        let id: AssetId = random_id();
        let scratch = self.scratch.claim(id);
        let into = scratch.path();
        let made = match &packages {
            Some(packages) => self.make_release(packages, wanted.sha256, &into, progress).await,
            None => self.fetch(&order, &wanted, into.clone(), progress).await,
        };
        let made = match made {
            Ok(made) => self.install(id, made, into, &wanted, &order, owner, progress).await,
            Err(error) => Err(error),
        };
        scratch.clear().await;
        let asset = match made {
            Ok(asset) if asset.id == id => asset,
            other => {
                crate::os::remove::tree(&self.paths.asset(id)).await;
                return other;
            }
        };
        if asset.kind == AssetKind::Vmm {
            self.link_programs().await?;
        }
        tracing::info!(asset = %asset.name, version = asset.version, verified = asset.verified.as_str(), "asset installed");
        Ok(asset)
    }

    /// Runs a provider's pipeline; the result goes to `into`.
    async fn fetch(
        &self,
        order: &Order,
        wanted: &WantedAsset,
        into: PathBuf,
        progress: &Progress,
    ) -> Result<Made, ToolError> {
        let job = Job {
            provider: order.provider.clone(),
            version: order.version.clone(),
            given: order.given.clone(),
            sha256: wanted.sha256,
            name: if wanted.kind == AssetKind::Kernel { KERNEL } else { main_file(wanted.kind) },
            executable: wanted.kind == AssetKind::Vmm,
            into,
            parts: self.paths.downloads(),
            now: now().as_millis().unsigned_abs() / 1000,
        };
        let fetcher = self.fetcher(false)?;
        pipeline::run(&fetcher, &job, progress).await.map_err(|error| match error {
            // The version does not exist; the log has the address.
            AssetError::Status { status: 404, .. } if job.version.is_some() => {
                asset_error(job.provider.failed(ProviderProblem::NoVersion(job.version.clone())))
            }
            error => asset_error(error),
        })
    }

    /// Moves what was made in `into` to its place, and adds its row.
    #[expect(clippy::too_many_arguments, reason = "each is another part of one asset")]
    async fn install(
        &self,
        id: AssetId,
        made: Made,
        into: PathBuf,
        wanted: &WantedAsset,
        order: &Order,
        owner: &str,
        progress: &Progress,
    ) -> Result<AssetRecord, ToolError> {
        progress.step("storing");
        let (kind, directory) = (wanted.kind, self.paths.asset(id));
        let (Settled { files, version: said, arch }, made) =
            blocking(move || settle(kind, &made, &into, &directory).map(|settled| (settled, made))).await?;
        failpoint::reach("asset-placed");
        progress.check().map_err(|_| ToolError::new(ErrorCode::Cancelled, "the download was cancelled"))?;
        let main = files.first().ok_or_else(|| ToolError::internal("an asset without files"))?.clone();
        if order.version.is_none() {
            let (kind, hash) = (wanted.kind, main.sha256.clone());
            let same = self
                .store
                .read(move |db| assets::find_by_hash(db, kind, &hash))
                .await
                .map_err(store_error)?;
            // An unverified asset must not replace a verified one.
            if let Some(same) =
                same.filter(|same| made.verified == Verified::None || same.verified != Verified::None)
            {
                return Ok(same);
            }
        }
        let version = order.version.clone().or(said).unwrap_or_else(|| main.sha256[..12].to_owned());
        let name = match &wanted.name {
            Some(name) => name.clone(),
            None => self.made_up_name(order, &version, &main.sha256).await?,
        };
        let download = made.download.to_string();
        let record = AssetRecord {
            id,
            name,
            kind: wanted.kind,
            provider: order.provider.name.to_string(),
            version,
            arch: arch.as_str().into(),
            sha256: main.sha256.clone(),
            size_bytes: main.size_bytes,
            verified: made.verified,
            download_sha256: (download != main.sha256).then_some(download),
            origin: made.origin,
            files,
            owner: owner.into(),
            installed_at: now(),
        };
        let row = record.clone();
        let charges = match wanted.kind {
            AssetKind::Rootfs => self.tokens.charges(owner),
            AssetKind::Kernel | AssetKind::Vmm => Vec::new(),
        };
        let noted = self.store.write(move |tx| {
            assets::insert(tx, &row)?;
            charges.iter().try_for_each(|charge| charge.check_held(tx))
        });
        noted.await.map_err(store_error)?;
        failpoint::reach("asset-noted");
        Ok(record)
    }

    /// A name made from provider and version; with the content too if that name is taken.
    async fn made_up_name(&self, order: &Order, version: &str, sha256: &str) -> Result<Name, ToolError> {
        let head = format!("{}-", order.provider.name);
        let given = order.given.values().next().map(|given| given.split(['?', '#']).next().unwrap_or(given));
        let name = match given.and_then(|given| given.rsplit('/').next()) {
            Some(stem) => return slug(&head, stem, Some(&hex_sha256(sha256.as_bytes()))),
            None => slug(&head, version, None)?,
        };
        match self.check_name(&name).await {
            Ok(()) => Ok(name),
            Err(_) => slug(&head, version, Some(sha256)),
        }
    }

    pub(super) async fn check_name(&self, name: &Name) -> Result<(), ToolError> {
        let reference = Reference::Name(name.clone());
        let found = self.store.read(move |db| assets::get(db, &reference)).await.map_err(store_error)?;
        match found {
            Some(other) => Err(ToolError::new(
                ErrorCode::NameTaken,
                format!("asset {name} already exists: {} {}", other.provider, other.version),
            )
            .hint("give another name, or remove that asset")),
            None => Ok(()),
        }
    }

    /// The installed asset that exactly matches an order.
    async fn installed(&self, order: &Order, kind: AssetKind) -> Result<Option<AssetRecord>, ToolError> {
        let Some(version) = &order.version else { return Ok(None) };
        self.installed_version(kind, order.provider.name.as_str(), version).await
    }

    /// The installed asset for a version that a provider offers.
    pub(crate) async fn installed_of(&self, found: &AssetSummary) -> Result<Option<AssetRecord>, ToolError> {
        self.installed_version(found.kind, &found.provider, &found.version).await
    }

    /// The newest installed asset with this version from the provider's current source.
    async fn installed_version(
        &self,
        kind: AssetKind,
        provider: &str,
        version: &str,
    ) -> Result<Option<AssetRecord>, ToolError> {
        let mut all = self.store.read(assets::all).await.map_err(store_error)?;
        all.retain(|asset| asset.kind == kind && asset.provider == provider && asset.version == version);
        let former = self.former(&all).await?;
        Ok(all.into_iter().filter(|asset| !former.contains(&asset.id)).max_by_key(|asset| asset.installed_at))
    }

    /// Those of the given assets that come from a former provider of the same name, whose versions now have another origin. If
    /// the provider no longer exists, its assets are not counted: no other can be meant.
    pub(crate) async fn former(&self, assets: &[AssetRecord]) -> Result<HashSet<AssetId>, ToolError> {
        if assets.is_empty() {
            return Ok(HashSet::new());
        }
        let rows = self.store.read(providers::all).await.map_err(store_error)?;
        let now: Vec<Provider> =
            rows.iter().filter_map(|row| Provider::parse(&row.name, &row.spec).ok()).collect();
        let is_former = |asset: &&AssetRecord| {
            let provider = now.iter().find(|provider| provider.name.as_str() == asset.provider);
            provider.is_some_and(|provider| !provider.has(&asset.version, &asset.origin))
        };
        Ok(assets.iter().filter(is_former).map(|asset| asset.id).collect())
    }

    /// The version that an order means; `None` for providers without versions.
    pub(super) async fn found(&self, order: &Order, progress: &Progress) -> Result<Option<Found>, ToolError> {
        match order.provider.versions {
            Versions::Given {} => Ok(None),
            _ => {
                progress.step(format!("looking for versions of {}", order.provider.name));
                self.resolve(&order.provider, order.version.as_deref(), progress).await.map(Some)
            }
        }
    }

    /// The client for downloads, or the one with short timeouts for small documents.
    pub(super) fn fetcher(&self, impatient: bool) -> Result<Fetcher, ToolError> {
        let settings = self.assets.fetch.clone();
        let settings = match impatient {
            false => settings,
            true => settings.for_lists(LIST_DEADLINE),
        };
        Fetcher::new(settings).map_err(asset_error)
    }

    /// Verifies an asset's files again.
    pub(crate) async fn verify(
        &self,
        asset: &AssetRecord,
        progress: &Progress,
    ) -> Result<AssetCheck, ToolError> {
        progress.step(format!("hashing {}", asset.name));
        let directory = self.paths.asset(asset.id);
        let files = files_of(asset);
        let watched = progress.clone();
        let (bytes, problems) = blocking(move || hash_again(&directory, &files, &watched)).await?;
        Ok(AssetCheck {
            id: asset.id,
            name: asset.name.clone(),
            kind: asset.kind,
            ok: problems.is_empty(),
            bytes,
            problems,
        })
    }

    /// Removes an unused asset; returns whether it was a default.
    pub(crate) async fn remove(&self, asset: &AssetRecord, caller: &Caller) -> Result<bool, ToolError> {
        let (record, who) = (asset.clone(), caller.owner.clone());
        let removed = self
            .store
            .write(move |tx| -> Result<Result<bool, Vec<String>>, StoreError> {
                let users = assets::users(tx, &record)?;
                if !users.is_empty() {
                    return Ok(Err(users));
                }
                let all = assets::all(tx)?;
                let kernel = settings::get(tx, settings::DEFAULT_KERNEL)?.unwrap_or_else(|| DEBIAN.into());
                let vmm = settings::get(tx, settings::DEFAULT_VMM)?;
                let in_force = [meant_kernel(&all, &kernel), vmm_in_force(&all, vmm.as_deref())];
                let mut was_default = in_force.into_iter().flatten().any(|asset| asset.id == record.id);
                for key in [settings::DEFAULT_KERNEL, settings::DEFAULT_VMM] {
                    if settings::get(tx, key)?.as_deref() == Some(record.name.as_str()) {
                        settings::set(tx, key, "", &who)?;
                        was_default = true;
                    }
                }
                assets::delete(tx, record.id)?;
                Ok(Ok(was_default))
            })
            .await
            .map_err(store_error)?;
        let was_default = removed.map_err(|users| needed(caller, &asset.name, &users))?;
        crate::os::remove::tree(&self.paths.asset(asset.id)).await;
        if asset.kind == AssetKind::Vmm {
            self.link_programs().await?;
        }
        tracing::info!(asset = %asset.name, "asset removed");
        Ok(was_default)
    }

    /// Links the downloaded programs to use: those of the default VMM asset, or else of the first one installed.
    pub(crate) async fn link_programs(&self) -> Result<(), ToolError> {
        let (all, default) = self
            .store
            .read(|db| -> Result<_, StoreError> {
                Ok((assets::all(db)?, settings::get(db, settings::DEFAULT_VMM)?))
            })
            .await
            .map_err(store_error)?;
        let chosen = vmm_in_force(&all, default.as_deref());
        let target = chosen.map(|asset| self.paths.asset(asset.id));
        let links = self.paths.programs();
        blocking(move || {
            relink(&links, target.as_deref()).map_err(|e| ToolError::internal(format!("link programs: {e}")))
        })
        .await
    }
}

/// Returns the error for an asset that VMs need. Those may be VMs that the caller does not see.
fn needed(caller: &Caller, asset: &Name, users: &[String]) -> ToolError {
    let by = if caller.has(Scope::Admin) { users.join(", ") } else { "VMs".to_owned() };
    ToolError::new(ErrorCode::InUse, format!("asset {asset} is needed by {by}"))
        .hint("delete those VMs first")
}

/// Refuses assets that nothing verifies and that the caller did not accept; returns what is done with the others.
fn check_vouched(order: &Order, wanted: &WantedAsset) -> Result<&'static str, ToolError> {
    let plan = plan(order)?;
    let is_file = matches!(plan.source, Source::Open(_));
    if plan.is_checked() || wanted.sha256.is_some() || wanted.unverified || is_file {
        return Ok(if is_file { "importing" } else { "downloading" });
    }
    let message = format!(
        "provider {} has neither signatures nor checksums, so its files cannot be verified",
        order.provider.name
    );
    Err(ToolError::new(ErrorCode::VerificationFailed, message)
        .hint("give its sha256, or pass unverified: true to accept it unverified"))
}

/// The plan of a pipeline for an order.
pub(super) fn plan(order: &Order) -> Result<Plan, ToolError> {
    let provider = &order.provider;
    let failed = |problem| asset_error(provider.failed(problem));
    let mut values: Values =
        provider.values(provider.mirrors().next().unwrap_or_default()).map_err(failed)?;
    if let Some(version) = &order.version {
        values = with_version(values, version);
    }
    values.extend(order.given.clone());
    provider.plan(&values).map_err(failed)
}

/// An asset in its place.
struct Settled {
    files: Vec<AssetFile>,
    /// Its version, if a file contains one.
    version: Option<String>,
    arch: Arch,
}

/// Checks that a downloaded asset is what it should be, and moves it to its place.
fn settle(kind: AssetKind, made: &Made, from: &Path, into: &Path) -> Result<Settled, ToolError> {
    let failed = |message: String| ToolError::new(ErrorCode::VerificationFailed, message);
    let internal = |e: std::io::Error| asset_error(AssetError::io("store an asset")(e));
    let files = match kind {
        AssetKind::Kernel => {
            let kernel =
                adopt_kernel(&from.join(KERNEL), into, &made.origin, made.verified).map_err(asset_error)?;
            let files = kernel_files(&kernel, into)?;
            return Ok(Settled { files, version: Some(kernel.version), arch: kernel.arch });
        }
        AssetKind::Rootfs => {
            let detected = ImageSource::detect(&from.join(ROOTFS));
            let is_empty = made.files.first().is_none_or(|file| file.size_bytes == 0);
            match detected {
                Ok(ImageSource::Tar(_) | ImageSource::Ext4(_)) if !is_empty => made.files.clone(),
                _ => {
                    return Err(failed(format!(
                        "{} is not a root filesystem: neither a tar archive nor ext4",
                        made.origin
                    )));
                }
            }
        }
        AssetKind::Vmm => {
            for file in &made.files {
                if !is_program(&from.join(&file.name)).map_err(internal)? {
                    return Err(failed(format!(
                        "{} of {} is no program for this machine",
                        file.name, made.origin
                    )));
                }
            }
            made.files.clone()
        }
    };
    fs_err::rename(from, into).map_err(internal)?;
    // The name is synced before a row refers to it.
    let parent = into.parent().unwrap_or(into);
    fs_err::File::open(parent).and_then(|parent| parent.sync_all()).map_err(internal)?;
    Ok(Settled { files, version: None, arch: Arch::HOST })
}

/// The files of a kernel, with their digests.
pub(super) fn kernel_files(
    kernel: &crate::asset::KernelFiles,
    directory: &Path,
) -> Result<Vec<AssetFile>, ToolError> {
    let mut files = vec![AssetFile {
        name: VMLINUX.into(),
        sha256: kernel.sha256.clone(),
        size_bytes: kernel.size_bytes,
    }];
    for module in kernel.modules.iter().chain(kernel.module_image.iter().map(|image| &image.path)) {
        let name = module.strip_prefix(directory).unwrap_or(module).display().to_string();
        let (digest, size_bytes) = hash_file(module, &Progress::default()).map_err(asset_error)?;
        files.push(AssetFile { name, sha256: digest.to_string(), size_bytes });
    }
    Ok(files)
}

/// The files of an asset. An old row that lists none has only the main file.
pub(crate) fn files_of(asset: &AssetRecord) -> Vec<AssetFile> {
    if asset.files.is_empty() {
        let name = main_file(asset.kind).to_owned();
        return vec![AssetFile { name, sha256: asset.sha256.clone(), size_bytes: asset.size_bytes }];
    }
    asset.files.clone()
}

fn hash_again(
    directory: &Path,
    files: &[AssetFile],
    progress: &Progress,
) -> Result<(u64, Vec<String>), ToolError> {
    let (mut bytes, mut problems) = (0, Vec::new());
    for file in files {
        let path = directory.join(&file.name);
        match hash_file(&path, progress) {
            Ok((digest, size)) => {
                bytes += size;
                if size != file.size_bytes {
                    problems.push(format!(
                        "{} has {size} bytes instead of {}",
                        path.display(),
                        file.size_bytes
                    ));
                } else if digest.to_string() != file.sha256 {
                    problems.push(format!(
                        "{} has the SHA-256 {digest} instead of {}",
                        path.display(),
                        file.sha256
                    ));
                }
            }
            Err(AssetError::Cancelled) => {
                return Err(ToolError::new(ErrorCode::Cancelled, "hashing was cancelled"));
            }
            Err(error) => problems.push(nexus_schema::error::chain(&error)),
        }
    }
    Ok((bytes, problems))
}

/// Makes the links to the programs of an asset, or removes them if there is none.
fn relink(links: &Path, target: Option<&Path>) -> std::io::Result<()> {
    for name in downloaded_programs() {
        let link = links.join(name);
        let program: Option<PathBuf> =
            target.map(|target| target.join(name)).filter(|program| program.is_file());
        let Some(program) = program else {
            match fs_err::remove_file(&link) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
                _ => continue,
            }
        };
        fs_err::create_dir_all(links)?;
        let fresh = links.join(format!(".{name}"));
        match fs_err::remove_file(&fresh) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs_err::os::unix::fs::symlink(&program, &fresh)?;
        fs_err::rename(&fresh, &link)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Tokens, Wanted};

    #[test]
    fn who_needs_an_asset_is_named_to_those_who_see_all_vms() {
        let owner = Caller::owner("uid:0");
        let holder = |scope: Scope| {
            let tokens = Tokens::default();
            let wanted = Wanted { scopes: Some([scope].into_iter().collect()), ..Wanted::default() };
            let (record, secret) = tokens.draft(&owner, wanted).unwrap();
            tokens.add(record);
            tokens.authenticate(&secret).unwrap()
        };
        let said = |caller: &Caller| {
            let error = needed(caller, &"linux".parse().unwrap(), &["web".to_owned(), "db".to_owned()]);
            assert_eq!(error.code, ErrorCode::InUse);
            error.message
        };
        assert_eq!(said(&owner), "asset linux is needed by web, db");
        assert_eq!(said(&holder(Scope::Admin)), "asset linux is needed by web, db");
        assert_eq!(said(&holder(Scope::Images)), "asset linux is needed by VMs");
    }
}
