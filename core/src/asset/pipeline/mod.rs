//! Runs the pipelines of providers.
//!
//! ```text
//! documents: sums, signatures ── checked first
//! [part of an earlier run] + network ─> sha256 ─> part ─> decompress ─> sha256 ─> file, or chosen files of a tar
//! ```
//!
//! Every byte passes once: it is hashed while it is written. The result is written to a directory of the caller, which nobody
//! reads before all checks passed. The raw bytes are kept in a part file until then, so an interrupted download can be
//! resumed, even after a restart of the daemon.

mod documents;
mod extract;
mod flow;
mod part;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err as fs;
use nexus_schema::tools::asset::{AssetFile, Verified};

use self::documents::Resolved;
use self::flow::Flow;
use self::part::Part;
pub(crate) use self::part::sweep;
use crate::asset::debian::signature::Seconds;
use crate::asset::fetch::{Fetcher, Start, Want, shown};
use crate::asset::provider::{
    Expect, Plan, Provider, ProviderProblem, Source, Values, address, with_version,
};
use crate::asset::stream::Sha256;
use crate::asset::{AssetError, IndexProblem};
use crate::os::given;
use crate::progress::Progress;

/// One run of a pipeline.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Whose pipeline it is.
    pub(crate) provider: Arc<Provider>,
    /// The version.
    pub(crate) version: Option<String>,
    /// What the caller provides if the provider has no versions: `url` or `path`.
    pub(crate) given: Values,
    /// The digest that the caller provides, of the file either as downloaded or unpacked.
    pub(crate) sha256: Option<Sha256>,
    /// The file's name, unless the pipeline extracts files from an archive.
    pub(crate) name: &'static str,
    /// Whether that file is a program.
    pub(crate) executable: bool,
    /// The directory for its files; it must not exist yet.
    pub(crate) into: PathBuf,
    /// Where parts of downloads are kept.
    pub(crate) parts: PathBuf,
    /// The current time, in seconds since 1970.
    pub(crate) now: Seconds,
}

/// The result of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Made {
    /// The files, the main one first.
    pub(crate) files: Vec<AssetFile>,
    /// Its source, without credentials.
    pub(crate) origin: String,
    /// The digest of what was downloaded.
    pub(crate) download: Sha256,
    /// How it was verified.
    pub(crate) verified: Verified,
}

/// Runs a pipeline, trying one mirror after the other until one provides the asset. A failure leaves nothing behind but the
/// part file, if the download can be resumed.
pub(crate) async fn run(fetcher: &Fetcher, job: &Job, progress: &Progress) -> Result<Made, AssetError> {
    let provider = &job.provider;
    let mut last = None;
    for mirror in provider.mirrors() {
        let plan = plan_at(job, mirror)?;
        match attempt(fetcher, job, &plan, progress).await {
            Ok(made) => return Ok(made),
            Err(error) => {
                remove(&job.into)?;
                match error {
                    AssetError::Cancelled => return Err(error),
                    error => {
                        tracing::info!(provider = %provider.name, mirror, error = %nexus_schema::error::chain(&error), "a mirror failed");
                        last = Some(error);
                    }
                }
            }
        }
    }
    Err(last.unwrap_or_else(|| provider.failed(ProviderProblem::NoVersion(job.version.clone()))))
}

/// The plan of a job at one of its provider's mirrors.
fn plan_at(job: &Job, mirror: &str) -> Result<Plan, AssetError> {
    let provider = &job.provider;
    let mut values = provider.values(mirror).map_err(|problem| provider.failed(problem))?;
    if let Some(version) = &job.version {
        values = with_version(values, version);
    }
    values.extend(job.given.clone());
    provider.plan(&values).map_err(|problem| provider.failed(problem))
}

/// What is known of a version before it is downloaded: its address, its digest, and what vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    /// Its address, without credentials.
    pub(crate) origin: String,
    /// Its digest, if a document states it.
    pub(crate) sha256: Option<Sha256>,
    /// What will verify it.
    pub(crate) verified: Verified,
}

/// Reads the documents of a job's version and checks their signatures; downloads nothing else.
pub(crate) async fn known(fetcher: &Fetcher, job: &Job, progress: &Progress) -> Result<Known, AssetError> {
    let provider = &job.provider;
    let mut last = None;
    for mirror in provider.mirrors() {
        let plan = plan_at(job, mirror)?;
        let Source::Download(url) = &plan.source else {
            return Err(provider.failed(ProviderProblem::NoVersion(job.version.clone())));
        };
        match documents::resolve(fetcher, job, &plan, progress).await {
            Ok(resolved) => {
                let verified = match (resolved.is_signed, plan.is_checked()) {
                    (true, _) => Verified::Signature,
                    (false, true) => Verified::Checksum,
                    (false, false) => Verified::None,
                };
                let origin = shown(&address(url)?);
                return Ok(Known { origin, sha256: resolved.raw.first().copied(), verified });
            }
            Err(AssetError::Cancelled) => return Err(AssetError::Cancelled),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| provider.failed(ProviderProblem::NoVersion(job.version.clone()))))
}

async fn attempt(fetcher: &Fetcher, job: &Job, plan: &Plan, progress: &Progress) -> Result<Made, AssetError> {
    let resolved = documents::resolve(fetcher, job, plan, progress).await?;
    let (flowed, origin) = match &plan.source {
        Source::Download(url) => download(fetcher, job, plan, &resolved, url, progress).await?,
        Source::Open(path) => open(job, plan, &resolved, path, progress).await?,
        // It has an executor of its own.
        Source::Apt => return Err(AssetError::Worker),
    };
    let verified = match job.sha256 {
        _ if resolved.is_signed => Verified::Signature,
        None if !plan.is_checked() => Verified::None,
        _ => Verified::Checksum,
    };
    Ok(Made { files: flowed.files, origin, download: flowed.raw.0, verified })
}

async fn open(
    job: &Job,
    plan: &Plan,
    resolved: &Resolved,
    path: &Path,
    progress: &Progress,
) -> Result<(flow::Flowed, String), AssetError> {
    let doing = AssetError::io("read a file");
    let of = path.to_owned();
    let file = tokio::task::spawn_blocking(move || given::open_file(&of)).await?.map_err(&doing)?;
    let meta = file.metadata().map_err(&doing)?;
    let what = path.display().to_string();
    let flow = Flow::new(job, plan, resolved, &what, None, progress);
    let read = flow::Watched { inner: file, done: 0, total: meta.len(), progress: progress.clone() };
    let flowed = tokio::task::spawn_blocking(move || flow.run(read)).await??;
    Ok((flowed, what))
}

async fn download(
    fetcher: &Fetcher,
    job: &Job,
    plan: &Plan,
    resolved: &Resolved,
    url: &str,
    progress: &Progress,
) -> Result<(flow::Flowed, String), AssetError> {
    let url = address(url)?;
    let what = shown(&url);
    let want = Want { url, size: None, sha256: resolved.raw.first().copied(), max_bytes: plan.max_bytes };
    // Parts of two runs are combined only if a digest verifies the whole.
    let is_checked = plan.is_checked() || job.sha256.is_some();
    let mut part = Part::of(job, &what, is_checked)?;
    let mut begun_anew = 0;
    loop {
        progress.check()?;
        let (at, validator) = part.have(want.sha256.is_some());
        let start = Start { at, validator, on_head: part.on_head(), ..Start::default() };
        let flow = Flow::new(job, plan, resolved, &what, part.file().map(|file| (file, at)), progress);
        let result = fetcher.stream(&want, &start, progress, move |pieces| flow.run(pieces)).await;
        let error = match result {
            Ok(flowed) => {
                part.remove()?;
                return Ok((flowed, what));
            }
            Err(error) => error,
        };
        remove(&job.into)?;
        let is_another = match &error {
            AssetError::Changed { .. } => true,
            AssetError::Checksum { .. }
            | AssetError::Length { .. }
            | AssetError::TooLarge { .. }
            | AssetError::Package { .. } => {
                part.remove()?;
                at > 0
            }
            AssetError::Io { .. } => {
                // Frees the space on a full disk.
                part.remove()?;
                false
            }
            _ => false,
        };
        begun_anew += 1;
        if !is_another || begun_anew > 3 {
            return Err(error);
        }
        tracing::info!(url = what, error = %nexus_schema::error::chain(&error), "the download begins anew");
        part.remove()?;
        part = Part::of(job, &what, is_checked)?;
    }
}

fn remove(directory: &Path) -> Result<(), AssetError> {
    match fs::remove_dir_all(directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(AssetError::io("remove a half-made asset")(e))
        }
        _ => Ok(()),
    }
}

/// The expected digest, from the documents that were read.
fn listed(
    expect: &Expect,
    what: &str,
    documents: &documents::Documents,
) -> Result<Option<Sha256>, AssetError> {
    match expect {
        Expect::Known(digest) => Ok(Some(*digest)),
        Expect::Given => Ok(None),
        Expect::Listed { document, name } => {
            let text = documents.get(document).map_or("", String::as_str);
            let failed = |problem| AssetError::Index { what: what.to_owned(), problem };
            let wanted = || name.clone().unwrap_or_else(|| "a digest".into());
            documents::digest_in(text, name.as_deref())
                .map(Some)
                .ok_or_else(|| failed(IndexProblem::NotListed(wanted())))
        }
    }
}
