//! Which asset a caller wants: the provider and the version.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::tools::asset::AssetKind;
use nexus_schema::{DriverKind, ErrorCode, Name, ToolError};

use super::{DEBIAN, Provision, file_argument};
use crate::asset::provider::{
    Discovery, Found, Provider, ProviderProblem, Values, Versions, Wanted, checked_version,
};
use crate::asset::{AssetError, Sha256};
use crate::op::{did_you_mean, store_error};
use crate::progress::Progress;
use crate::provision::kernel::asset_error;
use crate::store::providers;

/// How long the versions of a provider are cached.
const CACHED_FOR: Duration = Duration::from_secs(600);

/// A request as the caller made it.
#[derive(Debug, Clone)]
pub(crate) struct WantedAsset {
    pub(crate) kind: AssetKind,
    pub(crate) from: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) name: Option<Name>,
    pub(crate) sha256: Option<Sha256>,
    pub(crate) unverified: bool,
}

/// The parsed request: a provider, a version and values.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) provider: Arc<Provider>,
    pub(super) version: Option<String>,
    pub(super) given: Values,
}

/// A provider, and the prefix of the requested versions.
type Asked = (Name, String);

/// The versions that were found, when, and for which definition of the provider: a changed provider may have others.
#[derive(Debug)]
struct CachedVersions {
    at: Instant,
    provider: Provider,
    discovery: Discovery,
}

/// A cache of the versions of providers.
#[derive(Debug, Clone, Default)]
pub(super) struct VersionCache(Arc<Mutex<HashMap<Asked, CachedVersions>>>);

impl VersionCache {
    fn get(&self, key: &Asked, provider: &Provider) -> Option<Discovery> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, cached| cached.at.elapsed() < CACHED_FOR);
        all.get(key).filter(|cached| cached.provider == *provider).map(|cached| cached.discovery.clone())
    }

    fn put(&self, key: Asked, provider: &Provider, discovery: Discovery) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(key, CachedVersions { at: Instant::now(), provider: provider.clone(), discovery });
    }

    fn forget(&self, key: &Asked) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// The default provider of a kind.
pub(super) fn default_provider(kind: AssetKind) -> &'static str {
    match kind {
        AssetKind::Kernel => DEBIAN,
        AssetKind::Rootfs => "alpine",
        AssetKind::Vmm => DriverKind::OF_ASSETS.as_str(),
    }
}

impl Provision {
    /// Parses a request, as far as possible without network access.
    pub(super) async fn order(&self, wanted: &WantedAsset) -> Result<Order, ToolError> {
        let from = wanted.from.as_deref().unwrap_or(default_provider(wanted.kind));
        let url = from.strip_prefix("url:").unwrap_or(from);
        let (name, version, given) = if let Some(path) = from.strip_prefix("file:") {
            let path = file_argument(&self.looks, from, path).await?;
            ("file", None, Values::from([("path".into(), path.display().to_string())]))
        } else if from.starts_with("url:") || url.starts_with("http://") || url.starts_with("https://") {
            let good = reqwest::Url::parse(url)
                .is_ok_and(|u| matches!(u.scheme(), "http" | "https") && u.has_host());
            if !good {
                return Err(ToolError::invalid(format!(
                    "`{url}` is not an address such as https://host.example/file"
                )));
            }
            ("url", None, Values::from([("url".into(), url.to_owned())]))
        } else {
            let (name, version) = from.split_once('@').map_or((from, None), |(n, v)| (n, Some(v)));
            (name, version, Values::new())
        };
        let version = match (version, wanted.version.as_deref()) {
            (Some(a), Some(b)) if a != b => {
                return Err(ToolError::invalid(format!("`{from}` names another version than {b}")));
            }
            (a, b) => a.or(b),
        };
        let is_numbered =
            |v: &str| v.strip_prefix('v').is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()));
        let version = version.map(|v| if is_numbered(v) { &v[1..] } else { v });
        if let Some(version) = version {
            checked_version(version).map_err(|problem| {
                asset_error(AssetError::Provider { provider: name.to_owned(), problem })
            })?;
        }
        let provider = self.provider(name).await?;
        if provider.has_sources() {
            return Err(ToolError::invalid(format!("provider {name} has sources of kernels, and no assets"))
                .hint("call kernel_build to build a kernel from one"));
        }
        if !provider.may_have(wanted.kind) {
            let kinds: Vec<&str> = provider.kinds().into_iter().map(AssetKind::as_str).collect();
            return Err(ToolError::invalid(format!(
                "provider {name} has assets of the kind {}, not {}",
                kinds.join(" and "),
                wanted.kind.as_str()
            )));
        }
        let gives = given.is_empty() && provider.versions == Versions::Given {};
        if gives {
            return Err(asset_error(provider.failed(ProviderProblem::NothingGiven)));
        }
        Ok(Order { provider: Arc::new(provider), version: version.map(str::to_owned), given })
    }

    /// A provider by its name.
    pub(super) async fn provider(&self, name: &str) -> Result<Provider, ToolError> {
        let wanted = name.to_owned();
        let row = self.store.read(move |db| providers::get(db, &wanted)).await.map_err(store_error)?;
        match row {
            Some(row) => Provider::parse(name, &row.spec)
                .map_err(|problem| asset_error(AssetError::Provider { provider: name.to_owned(), problem })),
            None => Err(self.no_provider(name).await?),
        }
    }

    /// The error for an unknown provider; lists the known ones.
    pub(crate) async fn no_provider(&self, name: &str) -> Result<ToolError, ToolError> {
        let all = self.store.read(providers::all).await.map_err(store_error)?;
        let names: Vec<String> = all.into_iter().map(|row| row.name).collect();
        let error = ToolError::new(ErrorCode::AssetNotFound, format!("there is no provider `{name}`"))
            .hint(format!("there are {}; or give file:PATH or url:ADDRESS", names.join(", ")));
        Ok(did_you_mean(error, name, names))
    }

    /// The versions that a provider has.
    pub(super) async fn versions(
        &self,
        provider: &Provider,
        like: Option<&str>,
        progress: &Progress,
    ) -> Result<Discovery, ToolError> {
        let narrowed = like.filter(|_| matches!(provider.versions, Versions::ReleaseIndex { .. }));
        let key = (provider.name.clone(), narrowed.unwrap_or_default().to_owned());
        if let Some(discovery) = self.versions_cache.get(&key, provider) {
            return Ok(discovery);
        }
        let fetcher = self.fetcher(true)?;
        let token = self.assets.github_token.as_ref().filter(|_| self.may_have_token(provider));
        let wanted = Wanted { fetcher: &fetcher, token, like: narrowed, progress };
        let discovery = provider.discover(&wanted).await.map_err(asset_error)?;
        self.versions_cache.put(key, provider, discovery.clone());
        Ok(discovery)
    }

    /// The wanted version: the newest suitable one, the named one, or the newest that begins with the given prefix.
    pub(super) async fn resolve(
        &self,
        provider: &Provider,
        want: Option<&str>,
        progress: &Progress,
    ) -> Result<Found, ToolError> {
        let none = || asset_error(provider.failed(ProviderProblem::NoVersion(want.map(str::to_owned))));
        // A full version may exist even though lists no longer contain it.
        let may_be_unlisted = |version: &str| version.split('.').count() >= 3;
        for is_last in [false, true] {
            let discovery = match (self.versions(provider, want, progress).await, want) {
                (Ok(discovery), _) => discovery,
                (Err(error), Some(version))
                    if may_be_unlisted(version) && error.code != ErrorCode::Cancelled =>
                {
                    tracing::info!(provider = %provider.name, %error, "versions cannot be found out");
                    return Ok(Found { version: version.to_owned(), size_bytes: None });
                }
                (Err(error), _) => return Err(error),
            };
            let Some(version) = want else {
                let suits = |found: &&Found| provider.unsuitable(&found.version).is_none();
                let newest = discovery.found.iter().find(suits).or(discovery.found.first());
                return newest.cloned().ok_or_else(none);
            };
            let begins = |found: &&Found| {
                found.version.strip_prefix(version).is_some_and(|rest| rest.starts_with(['.', '-']))
            };
            let exact = discovery.found.iter().find(|found| found.version == version);
            if let Some(found) = exact.or_else(|| discovery.found.iter().find(begins)) {
                return Ok(found.clone());
            }
            if !discovery.is_complete && may_be_unlisted(version) {
                return Ok(Found { version: version.to_owned(), size_bytes: None });
            }
            // It may be newer than the cached versions.
            if !is_last {
                self.versions_cache.forget(&(provider.name.clone(), String::new()));
                self.versions_cache.forget(&(provider.name.clone(), version.to_owned()));
            }
        }
        Err(none())
    }
}
