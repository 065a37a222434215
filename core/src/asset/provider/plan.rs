//! Turns a row's stages into a plan: checks their order and fills the placeholders.

use std::path::PathBuf;

use super::stage::Take;
use super::stage::{Checksum, MAX_DOWNLOAD, MAX_UNPACKED};
use super::{Format, Provider, ProviderProblem, Stage, Template, Values, Versions};
use crate::asset::debian;
use crate::asset::stream::Sha256;

/// The plan of a pipeline, for one version of one asset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) source: Source,
    /// The most bytes that the source may have.
    pub(crate) max_bytes: u64,
    /// Checks of the bytes as downloaded.
    pub(crate) raw: Vec<Check>,
    pub(crate) decompress: Option<Format>,
    /// The most bytes that it may decompress to.
    pub(crate) max_unpacked: u64,
    /// Checks of the bytes after decompression.
    pub(crate) unpacked: Vec<Check>,
    /// The files to extract from a tar archive; if empty, the bytes themselves are the asset.
    pub(crate) extract: Vec<Taken>,
    /// The documents that must be signed.
    pub(crate) signed: Vec<Signed>,
}

/// Where the bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Download(String),
    Open(PathBuf),
    Apt,
}

/// An expected digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) expect: Expect,
}

/// The source of a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expect {
    Known(Sha256),
    Listed { document: String, name: Option<String> },
    Given,
}

/// A file of an archive, and what it is called here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) path: String,
    pub(crate) name: String,
    pub(crate) executable: bool,
}

/// A document that must be signed, and its signature if it is detached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signed {
    pub(crate) document: String,
    pub(crate) signature: Option<String>,
}

impl Plan {
    /// Whether the bytes are verified by anything but the caller.
    pub(crate) fn is_checked(&self) -> bool {
        self.checks().any(|check| check.expect != Expect::Given)
    }

    fn checks(&self) -> impl Iterator<Item = &Check> {
        self.raw.iter().chain(&self.unpacked)
    }

    fn names_document(&self, document: &str) -> bool {
        self.checks()
            .any(|check| matches!(&check.expect, Expect::Listed { document: d, .. } if d == document))
    }
}

impl Provider {
    /// The plan of its pipeline for these values.
    pub(crate) fn plan(&self, values: &Values) -> Result<Plan, ProviderProblem> {
        self.compile(&|template| template.fill(values))
    }

    /// Checks the whole row: the order of its stages, and that every placeholder has a value.
    pub(super) fn plan_of_row(&self) -> Result<Plan, ProviderProblem> {
        let known = |name: &str| {
            let always = ["mirror", "api", "version", "major", "branch", "arch"].contains(&name);
            let given = matches!(self.versions, Versions::Given {}) && ["url", "path"].contains(&name);
            let of_arch = !self.arch.is_empty() && self.arch.values().all(|values| values.contains_key(name));
            (always || given || of_arch)
                && !(name == "mirror" && self.mirrors.is_empty())
                && !(name == "api" && self.api.is_none())
        };
        let malformed = |path: String, template: &Template, name: &str| {
            let problem = format!("`{template}` has a place for {{{name}}}, of which nothing is known");
            Err(ProviderProblem::Malformed { path, problem })
        };
        for template in self.versions.templates() {
            if let Some(name) = template.names().find(|name| !known(name)) {
                return malformed("versions".into(), template, name);
            }
        }
        for (at, stage) in self.stages.iter().enumerate() {
            for template in stage.templates() {
                if let Some(name) = template.names().find(|name| !known(name)) {
                    return malformed(format!("stages[{at}]"), template, name);
                }
            }
        }
        let plan = self.compile(&|template| template.to_string())?;
        let signs = self.stages.iter().position(|stage| matches!(stage, Stage::Pgp(_)));
        let unused = plan.signed.iter().find(|signed| !plan.names_document(&signed.document));
        match (signs, unused) {
            (Some(at), Some(unused)) => {
                let problem = format!("no checksum is taken from the signed document {}", unused.document);
                Err(ProviderProblem::Stage { at, problem })
            }
            _ => Ok(plan),
        }
    }

    fn compile(&self, fill: &dyn Fn(&Template) -> String) -> Result<Plan, ProviderProblem> {
        fn problem<T>(at: usize, problem: &str) -> Result<T, ProviderProblem> {
            Err(ProviderProblem::Stage { at, problem: problem.to_owned() })
        }
        let mut plan: Option<Plan> = None;
        let mut stored = false;
        for (at, stage) in self.stages.iter().enumerate() {
            if stored {
                return problem(at, "nothing can follow what ends a pipeline");
            }
            let source = match stage {
                Stage::Download(download) => {
                    Some((Source::Download(fill(&download.url)), download.max_bytes.unwrap_or(MAX_DOWNLOAD)))
                }
                Stage::Open(open) => {
                    Some((Source::Open(fill(&open.path).into()), open.max_bytes.unwrap_or(MAX_UNPACKED)))
                }
                Stage::Apt(apt) => {
                    if apt.take.is_empty()
                        || self.kind.is_some_and(|kind| apt.take.iter().all(|t| t.kind() != kind))
                    {
                        return problem(at, "nothing of the provider's kind is taken");
                    }
                    let is_known = |name: &String| debian::distributions().any(|known| known == name);
                    if apt.take.contains(&Take::Rootfs) && !apt.distribution.as_ref().is_some_and(is_known) {
                        return problem(at, "a root filesystem is of a distribution: debian or ubuntu");
                    }
                    Some((Source::Apt, 0))
                }
                _ => None,
            };
            if let Some((source, max_bytes)) = source {
                if plan.is_some() {
                    return problem(at, "a pipeline has one source, at its beginning");
                }
                stored = matches!(source, Source::Apt);
                plan = Some(Plan::from(source, max_bytes));
                continue;
            }
            let Some(plan) = &mut plan else {
                return problem(at, "a pipeline begins with download, open or apt");
            };
            let unpacks = plan.decompress.is_some();
            match stage {
                Stage::Download(_) | Stage::Open(_) | Stage::Apt(_) => {}
                Stage::Checksum(_) | Stage::Decompress(_) | Stage::Extract(_) if !plan.extract.is_empty() => {
                    return problem(at, "only store can follow extract");
                }
                Stage::Checksum(checksum) => {
                    let check = Check { expect: expect(checksum, fill).or_else(|p| problem(at, p))? };
                    if unpacks { plan.unpacked.push(check) } else { plan.raw.push(check) }
                }
                Stage::Pgp(pgp) => plan.signed.push(Signed {
                    document: fill(&pgp.document),
                    signature: pgp.signature.as_ref().map(fill),
                }),
                Stage::Decompress(_) if unpacks => return problem(at, "it is decompressed already"),
                Stage::Decompress(decompress) => {
                    plan.decompress = Some(decompress.format);
                    plan.max_unpacked = decompress.max_bytes.unwrap_or(MAX_UNPACKED);
                }
                Stage::Extract(extract) => {
                    if extract.members.is_empty() {
                        return problem(at, "it takes no members");
                    }
                    for member in &extract.members {
                        let is_name = member.name.parse::<nexus_schema::Name>().is_ok();
                        if !is_name || plan.extract.iter().any(|taken| taken.name == member.name) {
                            return problem(at, "a member is stored under no fit name of its own");
                        }
                        plan.extract.push(Taken {
                            path: fill(&member.path),
                            name: member.name.clone(),
                            executable: member.executable,
                        });
                    }
                }
                Stage::Build(_) if !plan.extract.is_empty() => {
                    return problem(at, "a kernel is built from a whole archive");
                }
                Stage::Store(_) | Stage::Build(_) => stored = true,
            }
        }
        match plan {
            Some(plan) if stored => Ok(plan),
            _ => {
                problem(self.stages.len(), "a pipeline ends with store, or with build for sources of kernels")
            }
        }
    }
}

impl Plan {
    fn from(source: Source, max_bytes: u64) -> Self {
        Self {
            source,
            max_bytes,
            raw: Vec::new(),
            decompress: None,
            max_unpacked: max_bytes,
            unpacked: Vec::new(),
            extract: Vec::new(),
            signed: Vec::new(),
        }
    }
}

fn expect(checksum: &Checksum, fill: &dyn Fn(&Template) -> String) -> Result<Expect, &'static str> {
    match (checksum.sha256, &checksum.document, checksum.given, &checksum.name) {
        (Some(digest), None, false, None) => Ok(Expect::Known(digest.0)),
        (None, Some(document), false, name) => {
            Ok(Expect::Listed { document: fill(document), name: name.as_ref().map(fill) })
        }
        (None, None, true, None) => Ok(Expect::Given),
        _ => Err("a checksum is either sha256, or document with an optional name, or given"),
    }
}

impl Stage {
    fn templates(&self) -> Vec<&Template> {
        match self {
            Self::Download(download) => vec![&download.url],
            Self::Open(open) => vec![&open.path],
            Self::Checksum(checksum) => checksum.document.iter().chain(&checksum.name).collect(),
            Self::Pgp(pgp) => std::iter::once(&pgp.document).chain(&pgp.signature).collect(),
            Self::Extract(extract) => extract.members.iter().map(|member| &member.path).collect(),
            Self::Decompress(_) | Self::Store(_) | Self::Build(_) | Self::Apt(_) => Vec::new(),
        }
    }
}

impl Versions {
    fn templates(&self) -> Vec<&Template> {
        match self {
            Self::Given {} | Self::List { .. } | Self::Apt {} => Vec::new(),
            Self::Listing { url, before, .. } => vec![url, before],
            Self::KernelReleases { url } => vec![url],
            Self::GithubReleases { url, tag, asset } => vec![url, tag, asset],
            Self::ReleaseIndex { branches, index, .. } => vec![branches, index],
        }
    }
}
