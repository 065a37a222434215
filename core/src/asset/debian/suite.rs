//! One suite of one archive: its signed index, and its list of packages once requested.

use std::path::PathBuf;
use std::sync::Arc;

use nexus_schema::Arch;
use reqwest::Url;
use tokio::sync::OnceCell;

use crate::asset::AssetError;
use crate::asset::debian::packages::{self, Package};
use crate::asset::debian::release::Release;
use crate::asset::debian::signature::{Keyring, MAX_SIGNED, Seconds};
use crate::asset::debian::sources::Entry;
use crate::asset::debian::{DISTRIBUTIONS, Distribution};
use crate::asset::error::{IndexProblem, SourceProblem};
use crate::asset::fetch::{Fetcher, Want};
use crate::asset::stream::Compression;
use crate::progress::Progress;

/// The largest list of packages, compressed.
const MAX_LIST: u64 = 128 << 20;

/// What opening a suite needs to know.
pub(crate) struct Context {
    pub(crate) arch: Arch,
    pub(crate) apt_root: PathBuf,
    pub(crate) fetcher: Fetcher,
    pub(crate) check_valid_until: bool,
    pub(crate) check_date: bool,
    pub(crate) now: Seconds,
}

/// A suite with a verified index.
#[derive(Debug)]
pub(super) struct Suite {
    pub(super) entry: Entry,
    /// The mirror that answered.
    pub(super) mirror: Url,
    pub(super) release: Release,
    pub(super) distribution: &'static Distribution,
    /// The architecture of its packages.
    arch: Arch,
    /// The verified list of packages, compressed; that is small enough to keep.
    list: OnceCell<(Arc<[u8]>, Compression)>,
}

/// Fetches and verifies a suite's index.
pub(super) async fn open(context: &Context, entry: Entry, progress: &Progress) -> Result<Suite, AssetError> {
    let name = entry.shown();
    let fallback: Vec<_> = DISTRIBUTIONS.iter().map(|d| context.apt_root.join(d.keyring)).collect();
    let keyring = Keyring::of_entry(&context.apt_root, entry.signed_by.as_ref(), &fallback)?;
    let mut last = None;
    for mirror in entry.mirrors.clone() {
        let url = below(&mirror, &format!("dists/{}/InRelease", entry.suite))?;
        let want = Want { url, size: None, sha256: None, max_bytes: MAX_SIGNED };
        let fetched = context.fetcher.to_memory(&want, progress).await;
        let verified = match fetched {
            Ok(signed) => verify(&keyring, &name, signed, context).await,
            Err(error) => Err(error),
        };
        match verified.and_then(|release| accept(context, &entry, release)) {
            Ok((release, distribution)) => {
                let arch = context.arch;
                return Ok(Suite { entry, mirror, release, distribution, arch, list: OnceCell::new() });
            }
            Err(AssetError::Cancelled) => return Err(AssetError::Cancelled),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or(AssetError::Source {
        source_entry: name,
        problem: SourceProblem::Malformed("no address"),
    }))
}

/// Verifies an index on a blocking thread, because checking signatures takes time.
async fn verify(
    keyring: &Keyring,
    name: &str,
    signed: Vec<u8>,
    context: &Context,
) -> Result<Release, AssetError> {
    let (keyring, what) = (keyring.clone(), format!("{name} InRelease"));
    let (now, arch) = (context.now, context.arch.of_packages());
    tokio::task::spawn_blocking(move || {
        let text = keyring.signed_text(&what, &signed, now)?;
        Release::parse(&text, arch).map_err(|problem| AssetError::Index { what, problem })
    })
    .await?
}

/// Whether packages may be taken from a verified index.
fn accept(
    context: &Context,
    entry: &Entry,
    release: Release,
) -> Result<(Release, &'static Distribution), AssetError> {
    let refused = |problem| AssetError::Source { source_entry: entry.shown(), problem };
    let distribution = DISTRIBUTIONS
        .iter()
        .find(|d| d.origin == release.origin)
        .ok_or_else(|| refused(SourceProblem::ThirdParty(release.origin.clone())))?;
    if release.not_automatic {
        return Err(refused(SourceProblem::NotAutomatic));
    }
    let until = entry.check_valid_until.unwrap_or(context.check_valid_until);
    let date = entry.check_date.unwrap_or(context.check_date);
    let index = |problem| AssetError::Index { what: format!("{} InRelease", entry.shown()), problem };
    release.check_time(context.now, until, date).map_err(index)?;
    Ok((release, distribution))
}

impl Suite {
    /// Whether it belongs to that distributor.
    pub(super) fn is_of(&self, distribution: &Distribution) -> bool {
        self.distribution.origin == distribution.origin
    }

    /// The mirrors, beginning with the one that answered; those that failed before it come last.
    pub(super) fn mirrors(&self) -> impl Iterator<Item = &Url> {
        let all = &self.entry.mirrors;
        let answered = all.iter().position(|m| *m == self.mirror).unwrap_or(0);
        all[answered..].iter().chain(&all[..answered])
    }

    /// The packages whose name is wanted.
    pub(super) async fn select(
        &self,
        fetcher: &Fetcher,
        wanted: impl Fn(&str) -> bool + Send + 'static,
        progress: &Progress,
    ) -> Result<Vec<Package>, AssetError> {
        if !self.entry.components.iter().any(|c| c == self.distribution.component) {
            return Ok(Vec::new());
        }
        let (list, compression) =
            self.list.get_or_try_init(|| self.fetch_list(fetcher, progress)).await?.clone();
        progress.check()?;
        let what = self.list_name();
        tokio::task::spawn_blocking(move || packages::select(&list, compression, &wanted))
            .await?
            .map_err(|problem| AssetError::Index { what, problem })
    }

    async fn fetch_list(
        &self,
        fetcher: &Fetcher,
        progress: &Progress,
    ) -> Result<(Arc<[u8]>, Compression), AssetError> {
        let arch = self.arch.of_packages();
        let missing = || AssetError::Index {
            what: format!("{} InRelease", self.entry.shown()),
            problem: IndexProblem::NotListed(format!(
                "{}/binary-{arch}/Packages",
                self.distribution.component
            )),
        };
        let (path, compression, listed) =
            self.release.packages(self.distribution.component, arch).ok_or_else(missing)?;
        let suite = format!("dists/{}", self.entry.suite);
        let mut places = Vec::new();
        for mirror in self.mirrors() {
            if self.release.by_hash
                && let Some((directory, _)) = path.rsplit_once('/')
            {
                places.push(below(mirror, &format!("{suite}/{directory}/by-hash/SHA256/{}", listed.sha256))?);
            }
            places.push(below(mirror, &format!("{suite}/{path}"))?);
        }
        let mut last = None;
        for url in places {
            let want =
                Want { url, size: Some(listed.size), sha256: Some(listed.sha256), max_bytes: MAX_LIST };
            match fetcher.to_memory(&want, progress).await {
                Ok(bytes) => return Ok((bytes.into(), compression)),
                Err(AssetError::Cancelled) => return Err(AssetError::Cancelled),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(missing))
    }

    fn list_name(&self) -> String {
        format!("{} {} Packages", self.entry.shown(), self.distribution.component)
    }
}

/// The address of a path below an archive's root.
pub(super) fn below(root: &Url, path: &str) -> Result<Url, AssetError> {
    let unsafe_path =
        |_| AssetError::Index { what: root.to_string(), problem: IndexProblem::UnsafePath(path.to_owned()) };
    let url = root.join(path).map_err(unsafe_path)?;
    // Whatever the path is, the result must be on the same host and below the same directory.
    if url.origin() == root.origin() && url.path().starts_with(root.path()) {
        Ok(url)
    } else {
        Err(AssetError::Index { what: root.to_string(), problem: IndexProblem::UnsafePath(path.to_owned()) })
    }
}
