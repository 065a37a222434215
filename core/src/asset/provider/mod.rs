//! Providers: where assets come from, as data.
//!
//! A provider is a row: its name, the kind of its assets, how to discover its versions, and the stages of its pipeline as JSON.
//! Rows are checked when they are parsed: an unknown stage, field or value, an impossible order, or a placeholder without a
//! value is refused by name, before anything is downloaded. The built-in rows are in `providers.json`, the only file of Nexus
//! that names servers of the Internet.

mod discover;
mod plan;
mod rows;
mod stage;
mod template;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use nexus_schema::tools::asset::AssetKind;
use nexus_schema::{Arch, DriverKind, ErrorCode, Name};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fetch::shown;

pub(crate) use self::discover::{Discovery, Found, Wanted, address};
pub(crate) use self::plan::{Check, Expect, Plan, Signed, Source, Taken};
pub use self::rows::mistakes;
pub(crate) use self::rows::{Fields, check_keys, is_built_in, known_field, row, rows, without_credentials};
pub(crate) use self::stage::{Apt, Format, Stage};
pub(crate) use self::template::{Template, Values};

/// How an armored key begins.
const ARMOR: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";

/// One provider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Provider {
    /// Its name.
    pub(crate) name: Name,
    /// The kind of its assets; without one, any kind, as the caller says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<AssetKind>,
    /// A description for people.
    #[serde(default)]
    pub(crate) about: String,
    /// The addresses that `{mirror}` stands for, in the order in which they are tried; no trailing slash.
    #[serde(default)]
    pub(crate) mirrors: Vec<String>,
    /// The address that `{api}` stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api: Option<String>,
    /// The supported architectures, with their values. If empty, all are supported under their own name.
    #[serde(default)]
    pub(crate) arch: BTreeMap<String, Values>,
    /// The keys that sign: absolute paths of files, or the armored keys themselves.
    #[serde(default)]
    pub(crate) keys: Vec<String>,
    /// The drivers that its assets work with; if empty, all.
    #[serde(default, deserialize_with = "vmms")]
    pub(crate) drivers: Vec<DriverKind>,
    /// The oldest version that works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) min_version: Option<String>,
    /// How to discover its versions.
    pub(crate) versions: Versions,
    /// The stages of its pipeline.
    pub(crate) stages: Vec<Stage>,
}

/// The name of a driver, as one that runs VMs.
struct Vmm(DriverKind);

impl<'de> Deserialize<'de> for Vmm {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        DriverKind::vmm(&name).map(Self).ok_or_else(|| {
            let known: Vec<String> = DriverKind::VMMS.iter().map(|kind| format!("`{kind}`")).collect();
            serde::de::Error::custom(format!("unknown driver `{name}`, expected {}", known.join(" or ")))
        })
    }
}

fn vmms<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<DriverKind>, D::Error> {
    Ok(Vec::<Vmm>::deserialize(deserializer)?.into_iter().map(|vmm| vmm.0).collect())
}

/// How to discover versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Versions {
    /// No versions: the caller provides the file.
    Given {},
    /// A fixed list.
    List { versions: Vec<String> },
    /// Every string between two texts in a document, such as a directory listing.
    Listing { url: Template, before: Template, after: String },
    /// The list of current releases in the format of kernel.org's `releases.json`; older versions exist, but are not listed.
    KernelReleases { url: Template },
    /// The releases of GitHub's API whose tag matches and that have the named file.
    GithubReleases { url: Template, tag: Template, asset: Template },
    /// The index files of a distribution's branches, and the document that lists the branches.
    ReleaseIndex { branches: Template, before: String, after: String, index: Template, flavor: String },
    /// The host's own package archive.
    Apt {},
}

/// What can be wrong with a provider, or with a request to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProviderProblem {
    /// The row is malformed.
    #[error("{path}: {problem}")]
    Malformed {
        /// Where in the row.
        path: String,
        /// What is wrong there.
        problem: String,
    },
    /// A stage is in a wrong place.
    #[error("stages[{at}]: {problem}")]
    Stage {
        /// Which one.
        at: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// It needs a key, but has none that can be read.
    #[error("it has no key to check signatures with")]
    NoKey,
    /// It has nothing for this machine.
    #[error("it does not support {0}")]
    Architecture(String),
    /// It has no such version.
    #[error("{}", match .0 { Some(version) => format!("it has no version {version}"), None => "it has no version".to_owned() })]
    NoVersion(Option<String>),
    /// A version that cannot be part of an address.
    #[error("`{0}` is not a version")]
    NotAVersion(String),
    /// The caller must provide an address or a path.
    #[error("it has no versions: give a URL or a path")]
    NothingGiven,
}

impl ProviderProblem {
    /// The error code for the API.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Self::Malformed { .. } | Self::Stage { .. } | Self::NotAVersion(_) | Self::NothingGiven => {
                ErrorCode::InvalidArgument
            }
            Self::NoKey | Self::Architecture(_) => ErrorCode::HostUnsuitable,
            Self::NoVersion(_) => ErrorCode::AssetNotFound,
        }
    }

    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Malformed { .. } | Self::Stage { .. } => Some(
                "mend the provider: provider_set changes it, provider_remove takes back what was set; other providers work",
            ),
            Self::NoKey => Some(
                "give its signing key: provider_set with keys, or in nexus.toml [providers.NAME] keys = [\"/path/to/key.asc\"]",
            ),
            Self::NoVersion(_) => Some("asset_list shows what is available"),
            Self::NothingGiven => Some("give url:ADDRESS or file:PATH"),
            Self::Architecture(_) | Self::NotAVersion(_) => None,
        }
    }
}

impl Provider {
    /// Parses a row.
    pub(crate) fn parse(name: &str, row: &Value) -> Result<Self, ProviderProblem> {
        let provider: Self = serde_path_to_error::deserialize(row).map_err(|error| {
            ProviderProblem::Malformed { path: error.path().to_string(), problem: error.inner().to_string() }
        })?;
        provider.check(name)?;
        Ok(provider)
    }

    fn check(&self, name: &str) -> Result<(), ProviderProblem> {
        let malformed =
            |path: &str, problem: String| Err(ProviderProblem::Malformed { path: path.into(), problem });
        if self.name.as_str() != name {
            return malformed("name", format!("it is {}, not {name}", self.name));
        }
        for url in self.mirrors.iter().chain(&self.api) {
            let good = reqwest::Url::parse(url)
                .is_ok_and(|u| matches!(u.scheme(), "http" | "https") && u.has_host() && u.query().is_none());
            if !good || url.ends_with('/') {
                return malformed(
                    "mirrors",
                    format!("`{url}` is not an address such as https://host.example/path"),
                );
            }
        }
        for key in &self.keys {
            if !key.starts_with('/') && !key.contains(ARMOR) {
                return malformed(
                    "keys",
                    "a key is neither the absolute path of a file nor an armored key".into(),
                );
            }
        }
        self.plan_of_row().map(drop)
    }

    /// The values for this machine's architecture, without a version.
    pub(crate) fn values(&self, mirror: &str) -> Result<Values, ProviderProblem> {
        let own = Arch::HOST.as_str();
        let mut values = match self.arch.get(own) {
            Some(values) => values.clone(),
            None if self.arch.is_empty() => Values::new(),
            None => return Err(ProviderProblem::Architecture(own.into())),
        };
        values.entry("arch".into()).or_insert_with(|| own.into());
        values.insert("mirror".into(), mirror.to_owned());
        values.insert("api".into(), self.api.clone().unwrap_or_default());
        Ok(values)
    }

    /// The mirrors; a single empty one if no address is needed.
    pub(crate) fn mirrors(&self) -> impl Iterator<Item = &str> {
        let none = self.mirrors.is_empty().then_some("");
        self.mirrors.iter().map(String::as_str).chain(none)
    }

    /// Why a version is unsuitable, if it is.
    pub(crate) fn unsuitable(&self, version: &str) -> Option<String> {
        let min = self.min_version.as_deref()?;
        let is_older = compare(version, min).is_lt();
        is_older.then(|| format!("version {version} is too old: {min} or newer is needed"))
    }

    /// Whether a file from this origin is what the provider now offers as that version. For a built-in provider, the mirror
    /// makes no difference. For an added one, another provider may have had the name before.
    pub(crate) fn has(&self, version: &str, origin: &str) -> bool {
        if is_built_in(self.name.as_str()) || self.apt().is_some() || self.versions == (Versions::Given {}) {
            return true;
        }
        let is_from = |mirror: &str| {
            let values = with_version(self.values(mirror).ok()?, version);
            Some(match self.plan(&values).ok()?.source {
                Source::Download(url) => address(&url).is_ok_and(|url| shown(&url) == origin),
                Source::Open(path) => path.display().to_string() == origin,
                Source::Apt => true,
            })
        };
        self.mirrors().any(|mirror| is_from(mirror) == Some(true))
    }

    /// The names of the drivers that its assets work with.
    pub(crate) fn drivers(&self) -> Vec<String> {
        let drivers: &[DriverKind] = if self.drivers.is_empty() { &DriverKind::VMMS } else { &self.drivers };
        drivers.iter().map(|driver| driver.as_str().to_owned()).collect()
    }

    /// What it takes from the package archive, if anything.
    pub(crate) fn apt(&self) -> Option<&Apt> {
        self.stages.iter().find_map(|stage| match stage {
            Stage::Apt(apt) => Some(apt),
            _ => None,
        })
    }

    /// The distribution whose root filesystems it offers from there, or an empty string.
    pub(crate) fn distribution(&self) -> &str {
        self.apt().and_then(|apt| apt.distribution.as_deref()).unwrap_or_default()
    }

    /// Whether it has sources of kernels, from which `kernel_build` makes assets.
    pub(crate) fn has_sources(&self) -> bool {
        self.stages.iter().any(|stage| matches!(stage, Stage::Build(_)))
    }

    /// The kinds of its assets; empty if the caller chooses the kind.
    pub(crate) fn kinds(&self) -> Vec<AssetKind> {
        match (self.kind, self.apt()) {
            (Some(kind), _) => vec![kind],
            (None, Some(apt)) => apt.take.iter().map(|take| take.kind()).collect(),
            (None, None) => Vec::new(),
        }
    }

    /// Whether it has, or may have, assets of a kind.
    pub(crate) fn may_have(&self, kind: AssetKind) -> bool {
        let kinds = self.kinds();
        !self.has_sources() && (kinds.is_empty() || kinds.contains(&kind))
    }
}

/// The names of all drivers.
pub(crate) fn all_drivers() -> Vec<String> {
    DriverKind::VMMS.iter().map(|driver| driver.as_str().to_owned()).collect()
}

/// Adds the values that depend on a version.
pub(crate) fn with_version(mut values: Values, version: &str) -> Values {
    let branch: Vec<&str> = version.split('.').take(2).collect();
    values.insert("major".into(), branch.first().copied().unwrap_or_default().to_owned());
    values.insert("branch".into(), branch.join("."));
    values.insert("version".into(), version.to_owned());
    values
}

/// Checks that a version can be part of an address.
pub(crate) fn checked_version(version: &str) -> Result<&str, ProviderProblem> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+~-".contains(&b);
    let good = (1..=64).contains(&version.len())
        && version.bytes().all(plain)
        && version.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !version.contains("..");
    if good { Ok(version) } else { Err(ProviderProblem::NotAVersion(version.chars().take(80).collect())) }
}

/// Compares versions number by number. Other words sort before numbers, so that `1.0-rc1` is older than `1.0.1`.
pub(crate) fn compare(a: &str, b: &str) -> std::cmp::Ordering {
    fn parts(version: &str) -> impl Iterator<Item = (u8, u64, &str)> {
        version.split(['.', '-', '_', '+', '~']).map(|part| match part.parse() {
            Ok(number) => (2, number, ""),
            Err(_) => (0, 0, part),
        })
    }
    // The end sorts between them: newer than `-rc1`, older than `.1`.
    let end = std::iter::repeat((1, 0, ""));
    let length = a.len().max(b.len()) + 1;
    parts(a).chain(end.clone()).take(length).cmp(parts(b).chain(end).take(length))
}
