//! The errors of assets.

use std::io;
use std::path::PathBuf;

use nexus_schema::error::chain;
use nexus_schema::{ErrorCode, ToolError};

pub use crate::asset::debian::problem::{IndexProblem, PackageProblem, SignatureProblem, SourceProblem};
pub use crate::asset::kernel::problem::KernelProblem;
use crate::asset::provider::ProviderProblem;
use crate::asset::stream::Sha256;
use crate::image::ImageError;
use crate::os::disk::is_full;
use crate::os::tls::TlsProblem;
use crate::os::tool::ProgramError;
use crate::progress::Cancelled;

/// Why an asset could not be obtained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AssetError {
    /// The host's apt is configured for no usable archive.
    #[error("no usable package archive configured in {}{}", .apt_root.join("etc/apt").display(), listed(.problems))]
    NoArchive {
        /// Where apt's configuration was looked for.
        apt_root: PathBuf,
        /// What is wrong with each source that is there.
        problems: Vec<String>,
    },
    /// An entry of apt's configuration cannot be used.
    #[error("source {source_entry}: {problem}")]
    Source {
        /// The entry: its file, or its address and suite.
        source_entry: String,
        /// What is wrong with it.
        problem: SourceProblem,
    },
    /// A server answered with an error status.
    #[error("get {url}: the server answered {status}")]
    Status {
        /// The file's address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// A transfer failed after all retries.
    #[error("get {url}")]
    Transfer {
        /// The file's address.
        url: String,
        /// How the last attempt failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A server that is not trusted.
    #[error("get {url}: the server is not trusted: {problem}")]
    Untrusted {
        /// The file's address.
        url: String,
        /// Why not.
        problem: Box<TlsProblem>,
    },
    /// A transfer timed out.
    #[error("get {url}: timed out after {seconds} s")]
    Timeout {
        /// The file's address.
        url: String,
        /// The timeout in seconds.
        seconds: u64,
    },
    /// A server rejected the request because of its rate limit.
    #[error("{host}: rate limit exceeded{}", match .seconds { Some(s) => format!("; retry in {s} s"), None => String::new() })]
    RateLimited {
        /// The server.
        host: String,
        /// When to retry, in seconds, if the server says so.
        seconds: Option<u64>,
        /// Whether it was given a token.
        had_token: bool,
    },
    /// A file changed while it was downloaded.
    #[error("get {url}: the file changed while it was downloaded")]
    Changed {
        /// The file's address.
        url: String,
    },
    /// A provider, or a request to it, is invalid.
    #[error("provider {provider}: {problem}")]
    Provider {
        /// The provider.
        provider: String,
        /// What is wrong.
        problem: ProviderProblem,
    },
    /// A file's length differs from the promised one.
    #[error("{what} has {found} bytes instead of {expected}")]
    Length {
        /// The file.
        what: String,
        /// The promised length.
        expected: u64,
        /// The length found.
        found: u64,
    },
    /// A file exceeds its limit.
    #[error("{what} is larger than the {limit} bytes that are allowed")]
    TooLarge {
        /// The file.
        what: String,
        /// How many bytes it may have.
        limit: u64,
    },
    /// A file's digest differs from the promised one.
    #[error("{what} has the SHA-256 {found} instead of {expected}")]
    Checksum {
        /// The file.
        what: String,
        /// The promised digest.
        expected: Sha256,
        /// The digest found.
        found: Sha256,
    },
    /// A file's signature is not valid.
    #[error("signature of {what}")]
    Signature {
        /// The file.
        what: String,
        /// What is wrong.
        #[source]
        problem: SignatureProblem,
    },
    /// A keyring cannot be used.
    #[error("keyring {} holds no key that can be read", .path.display())]
    Keyring {
        /// The keyring.
        path: PathBuf,
    },
    /// A signed index is invalid.
    #[error("{what}: {problem}")]
    Index {
        /// The index.
        what: String,
        /// What is wrong with it.
        problem: IndexProblem,
    },
    /// No archive has such a package.
    #[error("no configured package archive has a package {package}")]
    NoPackage {
        /// The package.
        package: String,
    },
    /// No archive has such a kernel.
    #[error("no configured package archive has {}", match .version { Some(v) => format!("a kernel {v}"), None => "a kernel".into() })]
    NoKernel {
        /// The version asked for.
        version: Option<String>,
    },
    /// No archive has such a release of a distribution.
    #[error("apt's sources in {} name {}{}", .apt_root.join("etc/apt").display(), no_release(.distribution, .wanted.as_deref(), .has),
        if .problems.is_empty() { String::new() } else { listed(.problems) })]
    NoRelease {
        /// The distribution.
        distribution: String,
        /// What was asked for.
        wanted: Option<String>,
        /// The releases that there are.
        has: Vec<String>,
        /// Where apt's configuration was looked for.
        apt_root: PathBuf,
        /// What is wrong with each source that cannot be used.
        problems: Vec<String>,
    },
    /// A package is invalid.
    #[error("package {package}")]
    Package {
        /// The package.
        package: String,
        /// What is wrong with it.
        #[source]
        problem: PackageProblem,
    },
    /// A kernel cannot be used.
    #[error("kernel {kernel}")]
    Kernel {
        /// The kernel: its file or its version.
        kernel: String,
        /// What is wrong with it.
        #[source]
        problem: KernelProblem,
    },
    /// The filesystem of a kernel's modules could not be made.
    #[error("make the modules' filesystem of kernel {kernel}")]
    ModuleImage {
        /// The kernel's version.
        kernel: String,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// A program that builds a kernel failed.
    #[error("{doing}")]
    Program {
        /// What was being done.
        doing: String,
        /// How it failed.
        #[source]
        source: ProgramError,
    },
    /// The source of a kernel does not take these lines of a configuration.
    #[error("the source of Linux {version} has no such options, or they need others: {}", .options.join(", "))]
    Options {
        /// The version of Linux.
        version: String,
        /// The lines of the configuration.
        options: Vec<String>,
    },
    /// Kernels cannot be published.
    #[error("publish kernels: {0}")]
    Publish(String),
    /// The given digest is malformed.
    #[error("{text:?} is not a SHA-256 digest")]
    NotADigest {
        /// What was given.
        text: String,
    },
    /// A file of the host could not be read or written; the cause names it.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// The operation was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A worker thread ended without an answer.
    #[error("a worker ended unexpectedly")]
    Worker,
}

impl AssetError {
    /// Returns a function that turns an [`io::Error`] into an [`AssetError::Io`].
    pub(crate) fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    /// The error code for the API.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoArchive { .. } => ErrorCode::HostUnsuitable,
            Self::Source { .. } | Self::Keyring { .. } => ErrorCode::HostUnsuitable,
            Self::Status { .. }
            | Self::Transfer { .. }
            | Self::Timeout { .. }
            | Self::RateLimited { .. }
            | Self::Changed { .. } => ErrorCode::DownloadFailed,
            Self::Provider { problem, .. } => problem.code(),
            Self::Untrusted { .. }
            | Self::Length { .. }
            | Self::TooLarge { .. }
            | Self::Checksum { .. }
            | Self::Signature { .. }
            | Self::Index { .. }
            | Self::Package { .. }
            | Self::Kernel { .. } => ErrorCode::VerificationFailed,
            Self::NoPackage { .. } | Self::NoKernel { .. } | Self::NoRelease { .. } => {
                ErrorCode::AssetNotFound
            }
            Self::ModuleImage { source, .. } => source.code(),
            Self::NotADigest { .. } | Self::Options { .. } | Self::Publish(_) => ErrorCode::InvalidArgument,
            Self::Program { source: ProgramError::Cancelled { .. }, .. } => ErrorCode::Cancelled,
            Self::Program { source: ProgramError::Missing { .. }, .. } => ErrorCode::HostUnsuitable,
            Self::Program { source: ProgramError::Late { .. }, .. } => ErrorCode::Timeout,
            Self::Program { source: ProgramError::Failed { stderr, .. }, .. }
                if stderr.contains("No space left on device") =>
            {
                ErrorCode::DiskFull
            }
            Self::Program { .. } => ErrorCode::ImageFailed,
            Self::Io { source, .. } if is_full(source) => ErrorCode::DiskFull,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorCode::AssetNotFound,
            Self::Io { .. } => ErrorCode::HostUnsuitable,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Worker => ErrorCode::Internal,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoArchive { .. } => Some(
                "use files of your own: file:PATH as `kernel` and as `from` (nexusctl vm create --kernel FILE --rootfs DIR); or add \
                 a Debian archive to apt's sources; asset_list shows what is installed and what is available",
            ),
            Self::NoKernel { .. } | Self::NoPackage { .. } => Some("asset_list shows what is available"),
            Self::NoRelease { .. } => Some(
                "add its archive to apt's sources, or to those in a directory that apt_root in nexus.toml names: a .sources file with \
                 Types: deb, URIs, Suites (RELEASE RELEASE-updates RELEASE-security), Components: main, and Signed-By: the keyring of \
                 the package debian-archive-keyring or ubuntu-keyring",
            ),
            Self::Provider { problem, .. } => problem.hint(),
            Self::Untrusted { problem, .. } => problem.hint(),
            Self::RateLimited { had_token: false, .. } => Some(
                "wait, or give nexusd a token in NEXUS_GITHUB_TOKEN (or github_token in nexus.toml): it raises the limit",
            ),
            Self::RateLimited { had_token: true, .. } => Some("wait, then call again"),
            Self::Changed { .. } => Some("call again"),
            Self::Status { .. } | Self::Transfer { .. } | Self::Timeout { .. } => Some(
                "check the host's network, its proxy (http_proxy, or apt's) and the provider's mirrors or apt's sources, then call again",
            ),
            Self::Index { problem: IndexProblem::Expired(_) | IndexProblem::FromTheFuture(_), .. } => Some(
                "check the host's clock; for a frozen mirror set Acquire::Check-Valid-Until \"false\" in apt's configuration",
            ),
            Self::Program { source: ProgramError::Missing { .. }, .. } => {
                Some("call kernel_build with check: true to see all that is missing on this host")
            }
            Self::Program { .. } => {
                Some("the log of the build has all that it said; call again to go on from there")
            }
            Self::Options { .. } => {
                Some("leave them out of the configuration, add what they need, or build another version")
            }
            Self::Checksum { .. } | Self::Length { .. } => Some(
                "the mirror or a proxy on the way may hold a stale or damaged copy: call again, or use another mirror",
            ),
            _ => None,
        }
    }
}

fn no_release(distribution: &str, wanted: Option<&str>, has: &[String]) -> String {
    match (wanted, has) {
        (_, []) => format!("no release of {distribution}"),
        (Some(wanted), has) => format!("no release {wanted} of {distribution}, only {}", has.join(", ")),
        (None, has) => format!("only {} of {distribution}", has.join(", ")),
    }
}

fn listed(problems: &[String]) -> String {
    if problems.is_empty() { ": there are none".into() } else { format!(": {}", problems.join("; ")) }
}

impl From<Cancelled> for AssetError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<tokio::task::JoinError> for AssetError {
    fn from(_: tokio::task::JoinError) -> Self {
        Self::Worker
    }
}

impl From<AssetError> for ToolError {
    fn from(error: AssetError) -> Self {
        let tool_error = Self::new(error.code(), chain(&error));
        match error.hint() {
            Some(hint) => tool_error.hint(hint),
            None => tool_error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_sources_is_told_what_to_do() {
        let error = ToolError::from(AssetError::NoArchive { apt_root: "/x".into(), problems: vec![] });
        assert_eq!(error.code, ErrorCode::HostUnsuitable);
        let text = error.to_string();
        for word in ["/x/etc/apt", "--kernel FILE", "--rootfs DIR", "asset_list"] {
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn causes_are_told_once() {
        let error = AssetError::Io { doing: "write vmlinux", source: io::Error::other("no room") };
        assert_eq!(chain(&error), "write vmlinux: no room");
    }
}
