//! Kernels that are built here: finds their source, and adds what is built to the assets.

use std::path::PathBuf;
use std::sync::Arc;

use nexus_schema::id::AssetId;
use nexus_schema::tools::asset::{AssetKind, Verified};
use nexus_schema::tools::kernel::KernelSource;
use nexus_schema::{ErrorCode, Name, ToolError};

use super::kernel::{asset_error, newest_of};
use super::{DEBIAN, Provision, Turn, blocking, hex_sha256, slug};
use crate::asset::debian::SourcePackage;
use crate::asset::pipeline::{self, Job};
use crate::asset::provider::{Provider, Values, checked_version, compare};
use crate::asset::source::{self, MICROVM, Work};
use crate::asset::{AssetError, IndexProblem, adopt_kernel};
use crate::op::store_error;
use crate::progress::{Log, Progress};
use crate::store::assets::AssetRecord;
use crate::store::{assets, now, providers, random_id};

/// The provider in the rows of kernels that were built here.
pub(super) const BUILT: &str = "build";
/// The name of a source in the directory where it arrives.
const ARRIVED: &str = "source";
/// The longest configuration, in bytes.
const CONFIG_MAX: usize = 1 << 20;

/// A kernel to build.
#[derive(Debug, Clone, Default)]
pub(crate) struct WantedKernel {
    /// Which version of Linux, or how it begins.
    pub(crate) version: Option<String>,
    /// Where the source comes from.
    pub(crate) from: Option<String>,
    /// The configuration.
    pub(crate) config: Option<String>,
    /// The name for it.
    pub(crate) name: Option<Name>,
}

/// A kernel that was built.
#[derive(Debug)]
pub(crate) struct BuiltKernel {
    pub(crate) asset: AssetRecord,
    pub(crate) sources: Vec<KernelSource>,
    /// Whether it was there already.
    pub(crate) cached: bool,
    pub(crate) log: PathBuf,
}

/// What is to be done for a kernel that is wanted.
pub(crate) enum BegunKernel {
    /// Nothing: it was built before.
    Built(Box<BuiltKernel>),
    /// To compile it. Its source is there.
    Pending(Box<PendingKernel>),
}

/// A kernel whose source is there. No other one is built as long as this is there.
pub(crate) struct PendingKernel {
    /// Where it is built.
    pub(crate) work: Work,
    /// Its configuration.
    pub(crate) config: String,
    /// Made of its source and configuration, in hexadecimal.
    pub(crate) key: String,
    /// The progress, which is logged.
    pub(crate) progress: Progress,
    name: Option<Name>,
    origin: String,
    verified: Verified,
    sources: Vec<KernelSource>,
    _turn: Turn,
}

/// A source that was asked for the version.
#[derive(Debug)]
struct Candidate {
    told: KernelSource,
    /// How to get it, if it can be used.
    place: Option<Place>,
}

/// How to get a source.
#[derive(Debug, Clone)]
enum Place {
    Package(SourcePackage),
    Provider(Arc<Provider>, String),
}

impl Candidate {
    fn found(provider: &str, version: &str, origin: String, verified: Verified, place: Place) -> Self {
        let told = KernelSource {
            provider: provider.to_owned(),
            version: Some(version.to_owned()),
            origin: Some(origin),
            verified: Some(verified),
            newer: None,
            problem: None,
        };
        Self { told, place: Some(place) }
    }

    fn without(provider: &str, problem: String) -> Self {
        let told = KernelSource {
            provider: provider.to_owned(),
            version: None,
            origin: None,
            verified: None,
            newer: None,
            problem: Some(problem),
        };
        Self { told, place: None }
    }

    /// The source that failed this way; a cancellation is passed on.
    fn failed(provider: &str, error: ToolError) -> Result<Self, ToolError> {
        if error.code == ErrorCode::Cancelled {
            return Err(error);
        }
        let hint = error.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
        Ok(Self::without(provider, format!("{}{hint}", error.message)))
    }
}

impl Provision {
    /// What sources have the wanted version, those that can be used first. Nothing large is downloaded.
    pub(crate) async fn kernel_sources(
        &self,
        wanted: &WantedKernel,
        progress: &Progress,
    ) -> Result<Vec<KernelSource>, ToolError> {
        let candidates = self.candidates(wanted, progress).await?;
        Ok(candidates.into_iter().map(|candidate| candidate.told).collect())
    }

    /// `kernel_build`: the kernel, which is built by the host's compiler unless the same was built before.
    pub(crate) async fn build_kernel(
        &self,
        wanted: WantedKernel,
        owner: &str,
        progress: &Progress,
    ) -> Result<BuiltKernel, ToolError> {
        match self.begin_kernel(wanted, source::missing, progress).await? {
            BegunKernel::Built(built) => Ok(*built),
            BegunKernel::Pending(pending) => {
                let file = pending.work.build(&pending.config, &pending.progress).await;
                self.finish_kernel(*pending, file.map_err(asset_error)?, owner).await
            }
        }
    }

    /// Finds and fetches the source of a kernel, unless the same kernel was built before. `missing` says which packages whoever compiles it lacks.
    pub(crate) async fn begin_kernel(
        &self,
        wanted: WantedKernel,
        missing: fn() -> Vec<String>,
        progress: &Progress,
    ) -> Result<BegunKernel, ToolError> {
        let config = wanted.config.as_deref().unwrap_or(MICROVM);
        // One at a time: each uses all processors.
        let turn = self.turn("kernel that is built", progress).await?;
        let candidates = self.candidates(&wanted, progress).await?;
        let (told, place) = match candidates.first() {
            Some(Candidate { told, place: Some(place) }) => (told.clone(), place.clone()),
            _ => return Err(no_source(&wanted, &candidates)),
        };
        let sources = candidates.into_iter().map(|candidate| candidate.told).collect();
        let version = told.version.unwrap_or_default();
        let of = told.origin.unwrap_or_default();
        let key = hex_sha256(format!("{of}\0{version}\0{config}").as_bytes());
        let origin = format!("{of}, built with the configuration {}", &key[..12]);
        let directory = self.paths.kernels().join(&key[..16]);
        let work = Work::new(directory.clone(), &version);
        if let Some(asset) = self.built_kernel(&origin).await? {
            let built = BuiltKernel { asset, sources, cached: true, log: work.log() };
            return Ok(BegunKernel::Built(Box::new(built)));
        }
        if let Some(name) = &wanted.name {
            self.check_name(name).await?;
        }
        let missing = missing();
        if !missing.is_empty() {
            let packages = missing.join(" ");
            let message = format!("building a kernel needs packages that this host lacks: {packages}");
            return Err(ToolError::new(ErrorCode::HostUnsuitable, message)
                .hint(format!(
                    "install them as root (apt-get install {packages}), then call again; or build it with in_vm: true"
                )));
        }
        source::sweep(&self.paths.kernels(), &directory).await;
        let io = |error| asset_error(AssetError::io("prepare the build of a kernel")(error));
        fs_err::create_dir_all(&directory).map_err(io)?;
        let progress = progress.logged(Log::open(&work.log()).map_err(io)?);
        if !work.source().exists() {
            self.fetch_source(&place, &work, &progress).await?;
        }
        let pending = PendingKernel {
            work,
            config: config.to_owned(),
            key,
            progress,
            name: wanted.name,
            origin,
            verified: told.verified.unwrap_or(Verified::None),
            sources,
            _turn: turn,
        };
        Ok(BegunKernel::Pending(Box::new(pending)))
    }

    /// Adds a kernel that was compiled to the assets.
    pub(crate) async fn finish_kernel(
        &self,
        pending: PendingKernel,
        file: PathBuf,
        owner: &str,
    ) -> Result<BuiltKernel, ToolError> {
        let PendingKernel { work, key, name, origin, verified, sources, .. } = pending;
        let id: AssetId = random_id();
        let into = self.paths.asset(id);
        let adopted = {
            let into = into.clone();
            blocking(move || adopt_kernel(&file, &into, &origin, verified).map_err(asset_error)).await
        };
        let made = async {
            let files = adopted?;
            let name = match name {
                Some(name) => name,
                None => self.built_name(&files.version, &key).await?,
            };
            self.add_kernel(id, name, BUILT, &files, owner).await
        }
        .await;
        let asset = self.cleaned(made, &into).await?;
        work.clear().await;
        Ok(BuiltKernel { asset, sources, cached: false, log: work.log() })
    }

    /// The kernels that were built here.
    pub(crate) async fn built_kernels(&self) -> Result<Vec<AssetRecord>, ToolError> {
        let mut all = self.store.read(assets::all).await.map_err(store_error)?;
        all.retain(|asset| asset.kind == AssetKind::Kernel && asset.provider == BUILT);
        Ok(all)
    }

    async fn built_kernel(&self, origin: &str) -> Result<Option<AssetRecord>, ToolError> {
        Ok(self.built_kernels().await?.into_iter().find(|asset| asset.origin == origin))
    }

    /// A name made from the version; with the configuration too if that name is taken.
    async fn built_name(&self, version: &str, key: &str) -> Result<Name, ToolError> {
        let name = slug("linux-", version, None)?;
        match self.check_name(&name).await {
            Ok(()) => Ok(name),
            Err(_) => slug("linux-", version, Some(key)),
        }
    }

    async fn candidates(
        &self,
        wanted: &WantedKernel,
        progress: &Progress,
    ) -> Result<Vec<Candidate>, ToolError> {
        if wanted.config.as_ref().is_some_and(|config| config.len() > CONFIG_MAX) {
            return Err(ToolError::invalid(format!("config has more than {CONFIG_MAX} bytes")));
        }
        let version = wanted.version.as_deref().map(|version| version.strip_prefix('v').unwrap_or(version));
        if let Some(version) = version {
            checked_version(version).map_err(|problem| ToolError::invalid(problem.to_string()))?;
        }
        let mut all = Vec::new();
        if wanted.from.as_deref().is_none_or(|from| from == DEBIAN) {
            all.push(self.package_candidate(version, progress).await?);
        }
        let from = wanted.from.as_deref().filter(|from| *from != DEBIAN);
        match from {
            Some(from) => {
                all.push(self.provider_candidate(self.source_provider(from).await?, version, progress).await?)
            }
            None if wanted.from.is_some() => {}
            None => {
                let rows = self.store.read(providers::all).await.map_err(store_error)?;
                let parsed = rows.iter().filter_map(|row| Provider::parse(&row.name, &row.spec).ok());
                for provider in parsed.filter(Provider::has_sources) {
                    all.push(self.provider_candidate(provider, version, progress).await?);
                }
            }
        }
        // Those that can be used come first, in the same order otherwise.
        all.sort_by_key(|candidate| candidate.place.is_none());
        Ok(all)
    }

    /// A provider of sources.
    async fn source_provider(&self, name: &str) -> Result<Provider, ToolError> {
        let provider = self.provider(name).await?;
        if provider.has_sources() {
            return Ok(provider);
        }
        Err(ToolError::invalid(format!("provider {name} has no sources of kernels")).hint(
            "give `debian`, or a provider whose pipeline ends with the stage build, such as `kernel-org`",
        ))
    }

    /// The distribution's source of the version.
    async fn package_candidate(
        &self,
        version: Option<&str>,
        progress: &Progress,
    ) -> Result<Candidate, ToolError> {
        let found = async {
            let archive = self.archive(progress).await?;
            archive.kernel_sources(progress).await.map_err(asset_error)
        };
        let all = match found.await {
            Ok(all) => all,
            Err(error) => return Candidate::failed(DEBIAN, error),
        };
        if let Some(source) = newest_of(&all, version, |source| &source.version) {
            let origin = format!("{} {}", source.package, source.package_version);
            let place = Place::Package(source.clone());
            return Ok(Candidate::found(DEBIAN, &source.version, origin, Verified::Signature, place));
        }
        let has: Vec<&str> = all.iter().map(|source| source.version.as_str()).collect();
        let problem = match (version, has.is_empty()) {
            (_, true) => "the package archive has no package linux-source".to_owned(),
            (Some(version), false) => format!("it has no version {version}, only {}", has.join(", ")),
            (None, false) => format!("it has only {}", has.join(", ")),
        };
        Ok(Candidate::without(DEBIAN, problem))
    }

    /// A provider's source of the version, if its documents vouch for it.
    async fn provider_candidate(
        &self,
        provider: Provider,
        version: Option<&str>,
        progress: &Progress,
    ) -> Result<Candidate, ToolError> {
        let name = provider.name.to_string();
        progress.step(format!("looking for versions of {name}"));
        let version = match (self.resolve(&provider, version, progress).await, version) {
            (Ok(found), _) => found.version,
            // An old series is not listed, but its first version may be there.
            (Err(error), Some(version)) if error.code == ErrorCode::AssetNotFound => version.to_owned(),
            (Err(error), _) => return Candidate::failed(&name, error),
        };
        let provider = Arc::new(provider);
        let job = self.source_job(&provider, &version, PathBuf::new());
        let known = pipeline::known(&self.fetcher(true)?, &job, progress).await;
        let known = match known {
            Ok(known) => known,
            Err(AssetError::Status { status: 404, .. })
            | Err(AssetError::Index { problem: IndexProblem::NotListed(_), .. }) => {
                return Ok(Candidate::without(&name, format!("it has no version {version}")));
            }
            Err(error) => return Candidate::failed(&name, asset_error(error)),
        };
        let newer = self.newer(&provider, &version, progress).await;
        if known.verified == Verified::None {
            return Ok(Candidate::without(&name, format!("nothing vouches for its version {version}")));
        }
        let place = Place::Provider(provider, version.clone());
        let mut candidate = Candidate::found(&name, &version, known.origin, known.verified, place);
        candidate.told.newer = newer;
        Ok(candidate)
    }

    /// The newest listed version of the same series, if it is newer.
    async fn newer(&self, provider: &Provider, version: &str, progress: &Progress) -> Option<String> {
        let series = |version: &str| {
            let mut parts = version.split('.').map(str::to_owned);
            (parts.next(), parts.next())
        };
        let listed = self.versions(provider, None, progress).await.ok()?.found;
        let newest =
            listed.into_iter().map(|found| found.version).find(|other| series(other) == series(version))?;
        compare(&newest, version).is_gt().then_some(newest)
    }

    fn source_job(&self, provider: &Arc<Provider>, version: &str, into: PathBuf) -> Job {
        Job {
            provider: provider.clone(),
            version: Some(version.to_owned()),
            given: Values::new(),
            sha256: None,
            name: ARRIVED,
            executable: false,
            into,
            parts: self.paths.downloads(),
            now: now().as_millis().unsigned_abs() / 1000,
        }
    }

    async fn fetch_source(&self, place: &Place, work: &Work, progress: &Progress) -> Result<(), ToolError> {
        match place {
            Place::Package(package) => {
                let archive = self.archive(progress).await?;
                archive.fetch_kernel_source(package, &work.source(), progress).await.map_err(asset_error)
            }
            Place::Provider(provider, version) => {
                let arrival = work.arrival();
                crate::os::remove::tree(&arrival).await;
                let job = self.source_job(provider, version, arrival.clone());
                progress.step(format!("downloading Linux {version}"));
                pipeline::run(&self.fetcher(false)?, &job, progress).await.map_err(asset_error)?;
                fs_err::rename(arrival.join(ARRIVED), work.source())
                    .map_err(|error| asset_error(AssetError::io("keep the source of a kernel")(error)))
            }
        }
    }
}

/// The error of a version that no source has.
fn no_source(wanted: &WantedKernel, candidates: &[Candidate]) -> ToolError {
    let which = wanted.version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
    let why = candidates.iter().map(|candidate| {
        let told = &candidate.told;
        format!("{}: {}", told.provider, told.problem.as_deref().unwrap_or("it cannot be used"))
    });
    let why: Vec<String> = why.collect();
    ToolError::new(ErrorCode::AssetNotFound, format!("no source of Linux{which}: {}", why.join("; ")))
        .hint("call kernel_build with check: true to see what sources have, or asset_list for kernels that need no building")
}

#[cfg(test)]
mod tests;
