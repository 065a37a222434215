//! The releases of distributions that apt's sources name, and what mmdebstrap needs to build them.

use std::sync::Arc;

use data_encoding::HEXLOWER_PERMISSIVE;
use reqwest::Url;

use super::sources::SignedBy;
use super::suite::Suite;
use super::{Archive, BootstrapSource, DISTRIBUTIONS, Distribution, keyring_file};
use crate::asset::error::AssetError;
use crate::asset::fetch::shown;
use crate::config::Secret;

/// A release that root filesystems can be made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseVersion {
    /// Its code name, such as `bookworm`.
    pub codename: String,
    /// Its version, such as `12.15`; unreleased ones have none.
    pub version: Option<String>,
    /// Its current suite, such as `stable`.
    pub suite: String,
}

impl ReleaseVersion {
    /// Whether the name means this release: its code name, its current suite, or (a prefix of) its version.
    fn is_called(&self, name: &str) -> bool {
        let has_version = |version: &str| {
            version.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        name == self.codename || name == self.suite || self.version.as_deref().is_some_and(has_version)
    }
}

/// The known distribution of that name.
fn distribution(name: &str) -> Option<&'static Distribution> {
    DISTRIBUTIONS.iter().find(|distribution| distribution.name == name)
}

/// The names of the known distributions.
pub(crate) fn distributions() -> impl Iterator<Item = &'static str> {
    DISTRIBUTIONS.iter().map(|distribution| distribution.name)
}

impl Archive {
    /// The suites that are releases of a distribution themselves: the host's own first, then in the order of apt's sources.
    fn bases(&self, name: &str) -> Vec<usize> {
        let Some(distribution) = distribution(name) else { return Vec::new() };
        let is_one = |suite: &Suite| {
            suite.is_of(distribution)
                && suite.release.is_base()
                && suite.entry.components.iter().any(|component| component == distribution.component)
        };
        let mut found: Vec<usize> = (0..self.suites.len()).filter(|at| is_one(&self.suites[*at])).collect();
        found.sort_by_key(|at| *at != self.base);
        let mut seen: Vec<&str> = Vec::new();
        found.retain(|at| {
            let codename = self.suites[*at].release.base_codename();
            let is_new = !seen.contains(&codename);
            seen.push(codename);
            is_new
        });
        found
    }

    fn version_at(&self, at: usize) -> ReleaseVersion {
        let release = &self.suites[at].release;
        ReleaseVersion {
            codename: release.base_codename().to_owned(),
            version: release.version.clone().filter(|version| !version.is_empty()),
            suite: release.suite.clone(),
        }
    }

    /// The releases of a distribution that root filesystems can be made from, the host's own first.
    pub fn releases(&self, distribution: &str) -> Vec<ReleaseVersion> {
        self.bases(distribution).into_iter().map(|at| self.version_at(at)).collect()
    }

    /// What mmdebstrap needs for the named release; by default for the host's own, or else the first.
    pub fn release_source(
        &self,
        distribution: &str,
        wanted: Option<&str>,
    ) -> Result<(ReleaseVersion, BootstrapSource), AssetError> {
        let bases = self.bases(distribution);
        let fits = |at: &&usize| wanted.is_none_or(|wanted| self.version_at(**at).is_called(wanted));
        let Some(at) = bases.iter().find(fits) else {
            return Err(AssetError::NoRelease {
                distribution: distribution.to_owned(),
                wanted: wanted.map(str::to_owned),
                has: self.releases(distribution).into_iter().map(|release| release.codename).collect(),
                apt_root: self.apt_root.clone(),
                problems: self.problems.clone(),
            });
        };
        Ok((self.version_at(*at), self.source_at(*at)?))
    }

    /// What mmdebstrap needs to make a root filesystem of the host's own release.
    pub fn bootstrap_source(&self) -> Result<BootstrapSource, AssetError> {
        self.source_at(self.base)
    }

    fn source_at(&self, at: usize) -> Result<BootstrapSource, AssetError> {
        let base = &self.suites[at];
        let distribution = base.distribution;
        let codename = base.release.base_codename();
        let same_release =
            || self.suites.iter().filter(|s| s.is_of(distribution) && s.release.base_codename() == codename);
        let mirrors = same_release()
            .map(|s| {
                // The base suite's keyring is passed separately; any other keyring must be named in the entry.
                let other = match &s.entry.signed_by {
                    Some(SignedBy::Keys { files, .. }) if s.entry.signed_by != base.entry.signed_by => {
                        files.first()
                    }
                    _ => None,
                };
                let valid_until = s.entry.check_valid_until.unwrap_or(self.check.valid_until);
                let date = s.entry.check_date.unwrap_or(self.check.date);
                let options = [
                    other.map(|file| format!("signed-by={}", file.display())),
                    (!valid_until).then(|| "check-valid-until=no".to_owned()),
                    (!date).then(|| "check-date=no".to_owned()),
                ];
                let options = options.into_iter().flatten().collect::<Vec<_>>().join(" ");
                let options = if options.is_empty() { options } else { format!("[{options}] ") };
                format!(
                    "deb {options}{} {} {}",
                    shown(&s.mirror).trim_end_matches('/'),
                    s.entry.suite,
                    distribution.component
                )
            })
            .collect();
        let version = base.release.version.as_deref().filter(|v| !v.is_empty());
        // Debian 12.15 is 12; Ubuntu 24.04 is 24.04.
        let version =
            version.map(|v| if distribution.name == "debian" { v.split('.').next().unwrap_or(v) } else { v });
        let keyring = Arc::new(keyring_file(&self.apt_root, base)?);
        Ok(BootstrapSource {
            mirrors,
            suite: base.entry.suite.clone(),
            keyring: keyring.path().to_owned(),
            distro: format!("{}-{}", distribution.name, version.unwrap_or(codename)),
            components: vec![distribution.component.to_owned()],
            proxies: self.proxies.clone(),
            credentials: Secret::new(
                same_release().filter_map(|s| credentials(&s.mirror)).collect::<String>(),
            ),
            _keyring: keyring,
        })
    }
}

/// The name and the password in an address, for apt.
fn credentials(mirror: &Url) -> Option<String> {
    // In that file only whitespace separates words.
    let word =
        |text: &str| decoded(text).filter(|word| !word.is_empty() && !word.contains(char::is_whitespace));
    let (login, password) = (word(mirror.username())?, word(mirror.password()?)?);
    Some(format!("machine {} login {login} password {password}\n", shown(mirror)))
}

/// Decodes the percent escapes of a part of an address.
fn decoded(text: &str) -> Option<String> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next()?.as_bytes().to_vec();
    for piece in pieces {
        bytes.extend(HEXLOWER_PERMISSIVE.decode(piece.get(..2)?.as_bytes()).ok()?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}
