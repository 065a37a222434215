//! The provider `debian`: kernels and packages from the archive that the host's own apt is configured for.
//!
//! It needs no `apt` process and changes nothing of apt's state. It reads apt's configuration, then fetches and verifies each
//! suite's `InRelease`, lists and packages itself. Third-party sources are skipped, by the origin that their signed index
//! states. A source that cannot be used is recorded as a problem; opening fails only if no source is left.

mod apt_conf;
mod auth;
mod control;
mod deb;
mod extract;
mod packages;
pub(crate) mod problem;
mod release;
mod releases;
pub(in crate::asset) mod signature;
mod sources;
mod suite;
#[cfg(test)]
mod tests;
mod version;

use nexus_schema::Arch;
use nexus_schema::error::chain;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fs_err as fs;
use nexus_schema::tools::asset::Verified;

use crate::asset::error::AssetError;
use crate::asset::fetch::{FetchSettings, Fetched, Fetcher, ProxySetting, Want};
use crate::asset::kernel::KernelFiles;
use crate::config::Secret;
use crate::os::{failpoint, memory};
use crate::progress::Progress;
use apt_conf::AptConf;
use extract::Extracted;
use packages::Package;
pub use releases::ReleaseVersion;
pub(crate) use releases::distributions;
use sources::SignedBy;
use suite::{Context, Suite};

/// A distributor: what its packages are called.
#[derive(Debug)]
struct Distribution {
    /// `Origin` of its signed indexes.
    origin: &'static str,
    /// Its name in the names of images.
    name: &'static str,
    /// The component with kernels and everything that a small root filesystem needs.
    component: &'static str,
    /// The prefix of the names of fitting kernel packages; the version as in `uname -r` follows.
    kernel: &'static str,
    /// The suffix of that version, before the architecture if it contains one.
    flavour: &'static str,
    /// Whether the version contains the architecture.
    flavour_has_arch: bool,
    /// The prefix of the package with the modules, if the kernel's package does not contain them.
    modules: Option<&'static str>,
    /// The distribution's own keyring, for hosts whose apt has no trusted keys of its own.
    keyring: &'static str,
}

const DISTRIBUTIONS: [Distribution; 2] = [
    Distribution {
        origin: "Debian",
        name: "debian",
        component: "main",
        kernel: "linux-image-",
        flavour: "-cloud-",
        flavour_has_arch: true,
        modules: None,
        keyring: "usr/share/keyrings/debian-archive-keyring.gpg",
    },
    Distribution {
        origin: "Ubuntu",
        name: "ubuntu",
        component: "main",
        kernel: "linux-image-",
        flavour: "-generic",
        flavour_has_arch: false,
        modules: Some("linux-modules-"),
        keyring: "usr/share/keyrings/ubuntu-archive-keyring.gpg",
    },
];

/// The name of this machine's architecture in Debian.
const ARCH: &str = Arch::HOST.of_packages();

/// The package archive of the host, limited to what is trusted.
#[derive(Debug)]
pub struct Archive {
    fetcher: Fetcher,
    apt_root: PathBuf,
    /// The architecture of its packages.
    arch: Arch,
    /// The distributor that kernels and packages come from: one at a time, that of the base suite.
    distribution: &'static Distribution,
    suites: Vec<Suite>,
    /// The suite of the host's own release, which root filesystems come from.
    base: usize,
    /// The proxy settings of apt's configuration.
    proxies: Secret,
    /// The time checks for sources that do not configure them.
    check: Check,
    problems: Vec<String>,
}

/// Which times of an index are checked.
#[derive(Debug, Clone, Copy)]
struct Check {
    /// Whether an index may not be past its end of validity.
    valid_until: bool,
    /// Whether an index may not be from the future.
    date: bool,
}

/// An available kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelVersion {
    /// Its version as `uname -r` says it, such as `6.1.0-40-cloud-amd64`.
    pub version: String,
    /// Its package.
    pub package: String,
    /// The package's version.
    pub package_version: String,
    /// The package's length in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the package, in hexadecimal.
    pub sha256: String,
}

/// The source of a kernel in the archive, as a package of the distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourcePackage {
    /// The package, such as `linux-source-6.12`.
    pub package: String,
    /// The version of Linux, such as `6.12.48`.
    pub version: String,
    /// The package's version, such as `6.12.48-1`.
    pub package_version: String,
}

/// What mmdebstrap needs to make a root filesystem of a release.
#[derive(Debug, Clone)]
pub struct BootstrapSource {
    /// One-line entries (`deb URI SUITE COMPONENT`): the release, its updates and its security updates.
    pub mirrors: Vec<String>,
    /// The suite, as a code name such as `bookworm`.
    pub suite: String,
    /// The keyring (a file, or a directory of keyring files) for all mirrors without a `signed-by` of their own.
    pub keyring: PathBuf,
    /// The distribution with its version, such as `debian-12`.
    pub distro: String,
    /// The components.
    pub components: Vec<String>,
    /// The host's proxy settings, in apt's syntax. For the build on the host only; they must not end up in the image.
    pub proxies: Secret,
    /// Names and passwords for the mirrors, in the syntax of `apt_auth.conf(5)`. These too are for the host only.
    pub credentials: Secret,
    /// Keeps a keyring file alive that was written for this purpose.
    _keyring: Arc<KeyringFile>,
}

/// A keyring as a file.
#[derive(Debug)]
enum KeyringFile {
    /// A file or directory of the host.
    Host(PathBuf),
    /// Written from an entry that embeds its keys; deleted with the last user.
    Written(tempfile::TempPath),
}

impl KeyringFile {
    fn path(&self) -> &Path {
        match self {
            Self::Host(path) => path,
            Self::Written(path) => path,
        }
    }
}

/// Describes apt's configuration under `apt_root` as a text that changes whenever the configuration does. Fetches nothing.
pub(crate) fn configured(apt_root: &Path) -> Result<String, AssetError> {
    let sources = sources::read(apt_root, ARCH)?;
    Ok(format!("{ARCH} {:?}", sources.entries))
}

/// Returns the addresses of all archives that apt's sources name.
pub(crate) fn mirrors(apt_root: &Path) -> Result<Vec<reqwest::Url>, AssetError> {
    Ok(sources::read(apt_root, ARCH)?.entries.into_iter().flat_map(|entry| entry.mirrors).collect())
}

impl Archive {
    /// Reads apt's configuration under `apt_root` and verifies the signed index of every suite in it, for packages of this machine.
    pub async fn open(
        apt_root: &Path,
        settings: &FetchSettings,
        progress: &Progress,
    ) -> Result<Self, AssetError> {
        Self::open_for(Arch::HOST, apt_root, settings, progress).await
    }

    /// The same for packages of an architecture. Sources that apt is told to use for others only are skipped.
    pub async fn open_for(
        arch: Arch,
        apt_root: &Path,
        settings: &FetchSettings,
        progress: &Progress,
    ) -> Result<Self, AssetError> {
        let settings = FetchSettings { deadline: Duration::from_secs(1800), ..settings.clone() };
        Self::open_with(arch, apt_root, settings, now(), progress).await
    }

    /// The same with explicit settings and an explicit time; apt's proxy replaces that of the settings.
    pub(crate) async fn open_with(
        arch: Arch,
        apt_root: &Path,
        mut settings: FetchSettings,
        now: signature::Seconds,
        progress: &Progress,
    ) -> Result<Self, AssetError> {
        memory::keep_lean();
        progress.step("reading the package archive's index");
        let conf = AptConf::read(apt_root);
        let sources = sources::read(apt_root, arch.of_packages())?;
        let mut problems: Vec<String> = sources.problems.iter().map(|p| chain(p)).collect();
        let proxies = Secret::new(conf.proxies());
        if conf.has_proxy() {
            settings.proxy = ProxySetting::Rules(Arc::new(conf.clone()));
        }
        // An index is small, and a source that does not answer must not delay the others.
        let impatient = settings.clone().for_lists(INDEX_DEADLINE);
        let fetcher = Fetcher::new(settings)?;
        let context = Context {
            arch,
            apt_root: apt_root.to_owned(),
            fetcher: Fetcher::new(impatient)?,
            check_valid_until: conf.is_on("Acquire::Check-Valid-Until", true),
            check_date: conf.is_on("Acquire::Check-Date", true),
            now,
        };
        let opening = sources.entries.into_iter().map(|entry| suite::open(&context, entry, progress));
        let mut suites = Vec::new();
        for result in futures::future::join_all(opening).await {
            match result {
                Ok(suite) => suites.push(suite),
                Err(AssetError::Cancelled) => return Err(AssetError::Cancelled),
                Err(error) => problems.push(chain(&error)),
            }
        }
        for problem in &problems {
            tracing::info!(problem, "a package source is not used");
        }
        let Some(base) = base_suite(&suites, apt_root) else {
            return Err(AssetError::NoArchive { apt_root: apt_root.to_owned(), problems });
        };
        let distribution = suites[base].distribution;
        let check = Check { valid_until: context.check_valid_until, date: context.check_date };
        let apt_root = context.apt_root;
        Ok(Self { fetcher, apt_root, arch, distribution, suites, base, proxies, check, problems })
    }

    /// The architecture of its packages.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Why sources are not used, one sentence each.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The available kernels, newest first.
    pub async fn kernels(&self) -> Result<Vec<KernelVersion>, AssetError> {
        let found = self.kernel_packages(&Progress::default()).await?;
        Ok(found
            .into_iter()
            .map(|(version, p, _)| KernelVersion {
                version,
                package: p.name,
                package_version: p.version,
                size_bytes: p.size,
                sha256: p.sha256.to_string(),
            })
            .collect())
    }

    /// Fetches a kernel into the directory `into`: the newest, or the given version (as in `uname -r`, or the package's name or version).
    pub async fn fetch_kernel(
        &self,
        version: Option<&str>,
        into: &Path,
        progress: &Progress,
    ) -> Result<KernelFiles, AssetError> {
        let found = self.kernel_packages(progress).await?;
        let named = |(v, p, _): &(String, Package, usize)| {
            version.is_none_or(|wanted| *v == wanted || p.name == wanted || p.version == wanted)
        };
        let none = || AssetError::NoKernel { version: version.map(str::to_owned) };
        let (uname, package, suite) = found.into_iter().find(named).ok_or_else(none)?;
        fs::create_dir_all(into).map_err(AssetError::io("make a kernel's directory"))?;

        let mut debs = vec![self.fetch_deb(&package, suite, into, progress).await?];
        if let Some(prefix) = self.distribution.modules {
            let (modules, suite) = self.newest_package(&format!("{prefix}{uname}"), progress).await?;
            debs.push(self.fetch_deb(&modules, suite, into, progress).await?);
        }
        progress.step("unpacking the kernel");
        let extracted = Extracted {
            origin: format!("{} {}", package.name, package.version),
            package: package.name,
            version: uname,
            verified: Verified::Signature,
        };
        let (into, watched) = (into.to_owned(), progress.clone());
        let kernel = tokio::task::spawn_blocking(move || {
            let result = extract::kernel(&debs, extracted, &into, &watched);
            for deb in debs {
                fs::remove_file(deb).map_err(AssetError::io("remove a package"))?;
            }
            result
        })
        .await??;
        failpoint::reach("kernel-unpacked");
        progress.check()?;
        Ok(kernel)
    }

    /// The available sources of kernels, newest first.
    pub(crate) async fn kernel_sources(&self, progress: &Progress) -> Result<Vec<SourcePackage>, AssetError> {
        let is_source = |name: &str| {
            let series = name.strip_prefix(SOURCE_PACKAGE);
            series.is_some_and(|s| {
                s.contains('.') && s.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
            })
        };
        let mut found = self.select(is_source, progress).await?;
        found.sort_by(|(a, _), (b, _)| version::compare(&b.version, &a.version));
        let mut seen = std::collections::BTreeSet::new();
        found.retain(|(package, _)| seen.insert(package.name.clone()));
        let source = |(package, _): (Package, usize)| SourcePackage {
            version: linux_version(&package.version).to_owned(),
            package: package.name,
            package_version: package.version,
        };
        Ok(found.into_iter().map(source).collect())
    }

    /// Fetches the source of a kernel, as the package's packed tar archive, to the file `to`.
    pub(crate) async fn fetch_kernel_source(
        &self,
        source: &SourcePackage,
        to: &Path,
        progress: &Progress,
    ) -> Result<(), AssetError> {
        let none = || AssetError::NoPackage { package: source.package.clone() };
        let (package, suite) = self.newest_package(&source.package, progress).await?;
        if package.version != source.package_version {
            return Err(none());
        }
        let directory = to.parent().ok_or_else(none)?;
        let deb = self.fetch_deb(&package, suite, directory, progress).await?;
        progress.step(format!("unpacking {}", package.name));
        let to = to.to_owned();
        tokio::task::spawn_blocking(move || {
            let result = extract::copy(&deb, &package, &format!("usr/src/{}.tar.xz", package.name), &to);
            fs::remove_file(deb).map_err(AssetError::io("remove a package"))?;
            result
        })
        .await?
    }

    /// The version of a package and how many bytes its file has.
    pub(crate) async fn find_package(&self, package: &str) -> Result<(String, u64), AssetError> {
        let (found, _) = self.newest_package(package, &Progress::default()).await?;
        Ok((found.version, found.size))
    }

    /// Fetches one file of a package, `./bin/busybox` of `busybox-static` for instance (found below `/usr` too), into the
    /// directory `into`, under its own name, with mode 0755.
    pub async fn fetch_package_file(
        &self,
        package: &str,
        member: &str,
        into: &Path,
        progress: &Progress,
    ) -> Result<Fetched, AssetError> {
        let (package, suite) = self.newest_package(package, progress).await?;
        fs::create_dir_all(into).map_err(AssetError::io("make a package file's directory"))?;
        let deb = self.fetch_deb(&package, suite, into, progress).await?;
        progress.step(format!("unpacking {}", package.name));
        let (into, member) = (into.to_owned(), member.to_owned());
        tokio::task::spawn_blocking(move || {
            let result = extract::file(&deb, &package, &member, &into);
            fs::remove_file(deb).map_err(AssetError::io("remove a package"))?;
            result
        })
        .await?
    }

    /// Fitting kernels with their version and their suite, newest first.
    async fn kernel_packages(
        &self,
        progress: &Progress,
    ) -> Result<Vec<(String, Package, usize)>, AssetError> {
        let (distribution, arch) = (self.distribution, self.arch.of_packages());
        let uname = move |name: &str| {
            let version = name.strip_prefix(distribution.kernel)?;
            let ending = if distribution.flavour_has_arch {
                version.strip_suffix(arch)?.strip_suffix(distribution.flavour)
            } else {
                version.strip_suffix(distribution.flavour)
            };
            // `cloud-amd64` and `6.12-cloud-amd64` are metapackages that only depend on the newest kernel.
            let is_whole =
                ending?.starts_with(|c: char| c.is_ascii_digit()) && version.matches('.').count() >= 2;
            is_whole.then(|| version.to_owned())
        };
        let mut found = self.select(move |name| uname(name).is_some(), progress).await?;
        // Of each package the newest version, and the newest packages first.
        found.sort_by(|(a, _), (b, _)| {
            version::compare(&b.version, &a.version).then_with(|| b.name.cmp(&a.name))
        });
        let mut seen = std::collections::BTreeSet::new();
        found.retain(|(p, _)| seen.insert(p.name.clone()));
        let kernels: Vec<_> =
            found.into_iter().filter_map(|(p, suite)| Some((uname(&p.name)?, p, suite))).collect();
        if kernels.is_empty() { Err(AssetError::NoKernel { version: None }) } else { Ok(kernels) }
    }

    /// The newest version of a package, and its suite.
    async fn newest_package(&self, name: &str, progress: &Progress) -> Result<(Package, usize), AssetError> {
        let wanted = name.to_owned();
        let found = self.select(move |name| name == wanted, progress).await?;
        found
            .into_iter()
            .max_by(|(a, _), (b, _)| version::compare(&a.version, &b.version))
            .ok_or_else(|| AssetError::NoPackage { package: name.to_owned() })
    }

    /// The packages of all suites whose name is wanted, with the suites that they are in.
    async fn select(
        &self,
        wanted: impl Fn(&str) -> bool + Clone + Send + 'static,
        progress: &Progress,
    ) -> Result<Vec<(Package, usize)>, AssetError> {
        progress.step("reading the package lists");
        let mut all = Vec::new();
        let own = self.suites.iter().enumerate().filter(|(_, suite)| suite.is_of(self.distribution));
        for (number, suite) in own {
            let found = suite.select(&self.fetcher, wanted.clone(), progress).await?;
            all.extend(found.into_iter().map(|package| (package, number)));
        }
        Ok(all)
    }

    /// Fetches a package into `into`.
    async fn fetch_deb(
        &self,
        package: &Package,
        suite: usize,
        into: &Path,
        progress: &Progress,
    ) -> Result<PathBuf, AssetError> {
        progress.step(format!("downloading {}", package.name));
        let path = into.join(format!(".{}.deb", package.sha256));
        let mut last = None;
        for mirror in self.suites[suite].mirrors() {
            let url = suite::below(mirror, &package.filename)?;
            let want =
                Want { url, size: Some(package.size), sha256: Some(package.sha256), max_bytes: MAX_PACKAGE };
            match self.fetcher.to_file(&want, &path, progress).await {
                Ok(_) => {
                    failpoint::reach("package-fetched");
                    return Ok(path);
                }
                Err(AssetError::Cancelled) => return Err(AssetError::Cancelled),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or(AssetError::NoPackage { package: package.name.clone() }))
    }
}

/// How the names of packages with the source of Linux begin.
const SOURCE_PACKAGE: &str = "linux-source-";

/// The version of Linux in that of a package: `6.12.48` of `6.12.48-1`, `6.1.153` of `6.1.153+1~deb12u1`.
fn linux_version(package: &str) -> &str {
    let end = package.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(package.len());
    package[..end].trim_end_matches('.')
}

/// How long a server may take to send an index.
const INDEX_DEADLINE: Duration = Duration::from_secs(60);
/// The largest package.
const MAX_PACKAGE: u64 = 1 << 30;

/// The suite of the host's own release: the one that `os-release` names, else the first that is a release itself.
fn base_suite(suites: &[Suite], apt_root: &Path) -> Option<usize> {
    let os_release = ["etc/os-release", "usr/lib/os-release"]
        .iter()
        .find_map(|f| fs::read_to_string(apt_root.join(f)).ok());
    let codename = os_release.as_deref().and_then(|text| {
        text.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).map(|name| name.trim_matches('"'))
    });
    let bases = || suites.iter().enumerate().filter(|(_, s)| s.release.is_base());
    let own = bases().find(|(_, s)| codename == Some(s.release.base_codename()));
    let any = own.or_else(|| bases().next()).map(|(number, _)| number);
    any.or(if suites.is_empty() { None } else { Some(0) })
}

/// A file or directory with the keys that sign a suite.
fn keyring_file(apt_root: &Path, suite: &Suite) -> Result<KeyringFile, AssetError> {
    Ok(match &suite.entry.signed_by {
        Some(SignedBy::Embedded(text)) => {
            use std::os::unix::fs::PermissionsExt;
            let doing = AssetError::io("write a keyring");
            let file = tempfile::Builder::new()
                .prefix("nexus-keyring-")
                .suffix(".asc")
                .permissions(std::fs::Permissions::from_mode(0o644))
                .tempfile()
                .map_err(&doing)?;
            fs::write(file.path(), text).map_err(&doing)?;
            KeyringFile::Written(file.into_temp_path())
        }
        Some(SignedBy::Keys { files, .. }) if !files.is_empty() => KeyringFile::Host(files[0].clone()),
        _ => {
            let parts = apt_root.join("etc/apt/trusted.gpg.d");
            let has_parts = fs::read_dir(&parts).is_ok_and(|mut d| d.next().is_some());
            let own = apt_root.join(suite.distribution.keyring);
            KeyringFile::Host(if has_parts { parts } else { own })
        }
    })
}

/// Seconds since 1970.
fn now() -> signature::Seconds {
    jiff::Timestamp::now().as_second().try_into().unwrap_or_default()
}
