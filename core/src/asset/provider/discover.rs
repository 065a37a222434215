//! Discovers the versions that a provider has.

use futures::future::join_all;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue};
use serde::Deserialize;

use super::{Provider, ProviderProblem, Template, Values, Versions, checked_version, compare, with_version};
use crate::asset::AssetError;
use crate::asset::error::IndexProblem;
use crate::asset::fetch::{Fetcher, Want};
use crate::config::Secret;
use crate::progress::Progress;

/// The largest list of releases, and the largest other document.
const MAX_RELEASES: u64 = 16 << 20;
const MAX_DOCUMENT: u64 = 2 << 20;
/// How many branches of a distribution are searched, newest first.
const BRANCHES_MAX: usize = 8;
/// How many versions are kept.
const VERSIONS_MAX: usize = 1000;

/// The parameters of a discovery.
pub(crate) struct Wanted<'a> {
    pub(crate) fetcher: &'a Fetcher,
    /// For servers with rate limits.
    pub(crate) token: Option<&'a Secret>,
    /// A prefix of wanted versions, if that shortens the search.
    pub(crate) like: Option<&'a str>,
    pub(crate) progress: &'a Progress,
}

/// The discovered versions of a provider.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Discovery {
    /// Newest first.
    pub(crate) found: Vec<Found>,
    /// Whether the list is complete.
    pub(crate) is_complete: bool,
}

/// One version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) version: String,
    pub(crate) size_bytes: Option<u64>,
}

impl Provider {
    /// Discovers the versions.
    pub(crate) async fn discover(&self, wanted: &Wanted<'_>) -> Result<Discovery, AssetError> {
        let mut last = None;
        for mirror in self.mirrors() {
            let values = self.values(mirror).map_err(|problem| self.failed(problem))?;
            match self.discover_at(wanted, &values).await {
                Ok(mut discovery) => {
                    discovery.found.retain(|found| checked_version(&found.version).is_ok());
                    discovery.found.sort_by(|a, b| compare(&b.version, &a.version));
                    discovery.found.dedup_by(|a, b| a.version == b.version);
                    discovery.found.truncate(VERSIONS_MAX);
                    return Ok(discovery);
                }
                Err(AssetError::Cancelled) => return Err(AssetError::Cancelled),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| self.failed(ProviderProblem::NoVersion(None))))
    }

    pub(crate) fn failed(&self, problem: ProviderProblem) -> AssetError {
        AssetError::Provider { provider: self.name.to_string(), problem }
    }

    async fn discover_at(&self, wanted: &Wanted<'_>, values: &Values) -> Result<Discovery, AssetError> {
        match &self.versions {
            // The package archive lists its own versions.
            Versions::Given {} | Versions::Apt {} => Ok(Discovery { found: Vec::new(), is_complete: false }),
            Versions::List { versions } => {
                let found =
                    versions.iter().map(|version| Found { version: version.clone(), size_bytes: None });
                Ok(Discovery { found: found.collect(), is_complete: true })
            }
            Versions::Listing { url, before, after } => {
                let text = wanted.document(&url.fill(values), MAX_RELEASES, HeaderMap::new()).await?;
                let text = String::from_utf8_lossy(&text);
                let versions = between(&text, &before.fill(values), after);
                let found = versions.into_iter().map(|version| Found { version, size_bytes: None });
                Ok(Discovery { found: found.collect(), is_complete: true })
            }
            Versions::KernelReleases { url } => {
                let url = url.fill(values);
                let text = wanted.document(&url, MAX_DOCUMENT, HeaderMap::new()).await?;
                let list: KernelReleases = parse(&url, serde_json::from_slice(&text))?;
                let is_release = |version: &String| {
                    version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') && version.contains('.')
                };
                let versions = list.releases.into_iter().map(|release| release.version).filter(is_release);
                let found = versions.map(|version| Found { version, size_bytes: None }).collect();
                Ok(Discovery { found, is_complete: false })
            }
            Versions::GithubReleases { url, tag, asset } => {
                let url = url.fill(values);
                let text = wanted.document(&url, MAX_RELEASES, wanted.github()).await?;
                let releases: Vec<Release> = parse(&url, serde_json::from_slice(&text))?;
                let found = releases.iter().filter_map(|release| release.found(tag, asset, values));
                // A list contains the newest hundred.
                Ok(Discovery { found: found.collect(), is_complete: releases.len() < 100 })
            }
            Versions::ReleaseIndex { branches, before, after, index, flavor } => {
                let branches = match wanted.like.and_then(branch_of) {
                    Some(branch) => vec![branch],
                    None => {
                        let text =
                            wanted.document(&branches.fill(values), MAX_DOCUMENT, HeaderMap::new()).await?;
                        newest_branches(&String::from_utf8_lossy(&text), before, after)
                    }
                };
                let indexes = branches.iter().map(|branch| async {
                    let url = index.fill(&with_version(values.clone(), branch));
                    let text = wanted.document(&url, MAX_DOCUMENT, HeaderMap::new()).await?;
                    let entries: Vec<Entry> = parse(&url, serde_yaml_ng::from_slice(&text))?;
                    let arch = values.get("arch").map_or("", String::as_str);
                    let fits = |entry: &Entry| entry.flavor == *flavor && entry.arch == arch;
                    Ok(entries.into_iter().filter(fits).filter_map(Entry::found).collect::<Vec<_>>())
                });
                let mut found = Vec::new();
                let mut last = None;
                for result in join_all(indexes).await {
                    match result {
                        Ok(some) => found.extend(some),
                        // A branch may lack an architecture.
                        Err(AssetError::Status { status: 404, .. }) => {}
                        Err(error) => last = Some(error),
                    }
                }
                match last {
                    Some(error) if found.is_empty() => Err(error),
                    _ => Ok(Discovery { found, is_complete: false }),
                }
            }
        }
    }
}

impl Wanted<'_> {
    async fn document(&self, url: &str, max_bytes: u64, headers: HeaderMap) -> Result<Vec<u8>, AssetError> {
        let want = Want { url: address(url)?, size: None, sha256: None, max_bytes };
        self.fetcher.to_memory_with(&want, &headers, self.progress).await
    }

    fn github(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/vnd.github+json"));
        headers.insert("x-github-api-version", HeaderValue::from_static("2022-11-28"));
        let token =
            self.token.and_then(|token| HeaderValue::try_from(format!("Bearer {}", token.reveal())).ok());
        if let Some(mut token) = token {
            token.set_sensitive(true);
            headers.insert(AUTHORIZATION, token);
        }
        headers
    }
}

/// Parses an address from a row.
pub(crate) fn address(url: &str) -> Result<reqwest::Url, AssetError> {
    reqwest::Url::parse(url).map_err(|e| AssetError::Transfer { url: url.to_owned(), source: Box::new(e) })
}

fn parse<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Result<T, AssetError> {
    let problem = |e: E| IndexProblem::Damaged(e.to_string());
    result.map_err(|e| AssetError::Index { what: what.to_owned(), problem: problem(e) })
}

/// The strings between two texts that consist of digits and dots.
fn between(text: &str, before: &str, after: &str) -> Vec<String> {
    let is_version =
        |v: &&str| !v.is_empty() && v.len() <= 64 && v.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let pieces = text.split(before).skip(1).filter_map(|piece| piece.split_once(after).map(|(v, _)| v));
    if before.is_empty() { Vec::new() } else { pieces.filter(is_version).map(str::to_owned).collect() }
}

/// The branch of `3.21` or `3.21.3`.
fn branch_of(version: &str) -> Option<String> {
    let mut parts = version.split('.');
    let (major, minor) = (parts.next()?, parts.next()?);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (is_number(major) && is_number(minor)).then(|| format!("{major}.{minor}"))
}

fn newest_branches(text: &str, before: &str, after: &str) -> Vec<String> {
    let mut branches = between(text, before, after);
    branches.sort_by(|a, b| compare(b, a));
    branches.dedup();
    branches.truncate(BRANCHES_MAX);
    branches
}

/// kernel.org's list of current releases. Candidates (`6.18-rc3`) and snapshots (`next-..`) are listed, too.
#[derive(Deserialize)]
struct KernelReleases {
    releases: Vec<KernelRelease>,
}

#[derive(Deserialize)]
struct KernelRelease {
    version: String,
}

/// A release as GitHub's API lists it.
#[derive(Deserialize)]
struct Release {
    tag_name: String,
    #[serde(default)]
    draft: bool,
    #[serde(default)]
    prerelease: bool,
    #[serde(default)]
    assets: Vec<ReleaseFile>,
}

#[derive(Deserialize)]
struct ReleaseFile {
    name: String,
    size: Option<u64>,
}

impl Release {
    fn found(&self, tag: &Template, asset: &Template, values: &Values) -> Option<Found> {
        let version = tag.find("version", values, &self.tag_name)?;
        let name = asset.fill(&with_version(values.clone(), &version));
        let file = self.assets.iter().find(|file| file.name == name)?;
        let is_release = !self.draft && !self.prerelease;
        is_release.then_some(Found { version, size_bytes: file.size })
    }
}

/// An entry of a distribution's `latest-releases.yaml`.
#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    flavor: String,
    #[serde(default)]
    arch: String,
    version: Option<serde_yaml_ng::Value>,
    size: Option<u64>,
}

impl Entry {
    fn found(self) -> Option<Found> {
        let version = match self.version? {
            serde_yaml_ng::Value::String(version) => version,
            serde_yaml_ng::Value::Number(version) => version.to_string(),
            _ => return None,
        };
        Some(Found { version, size_bytes: self.size })
    }
}
