//! The errors of reading an OCI image.

use nexus_schema::{ByteSize, ErrorCode};

use super::credentials::HelperProblem;
use crate::os::tls::TlsProblem;

/// Why an OCI image was not read.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The reference cannot be parsed.
    #[error("`{reference}` is not a valid image reference: {why}")]
    Reference {
        /// The given reference, shortened.
        reference: String,
        /// What is wrong with it.
        why: String,
    },
    /// The registry has no such image.
    #[error("{registry} has no image {image}")]
    NotFound {
        /// The registry.
        registry: String,
        /// The image.
        image: String,
    },
    /// The registry requires other credentials.
    #[error("{registry} denied access to {image}")]
    Unauthorized {
        /// The registry.
        registry: String,
        /// The image.
        image: String,
    },
    /// The request to the registry failed.
    #[error("request {what} from {registry}")]
    Transfer {
        /// The registry.
        registry: String,
        /// The requested resource.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The registry timed out.
    #[error("{registry} did not answer in time when asked for {what}")]
    Slow {
        /// The registry.
        registry: String,
        /// The requested resource.
        what: String,
    },
    /// The registry returned an error.
    #[error("{registry} answers {status} when asked for {what}{}", quoted(.said))]
    Status {
        /// The registry.
        registry: String,
        /// The requested resource.
        what: String,
        /// The status code.
        status: u16,
        /// Its explanation, if any.
        said: String,
    },
    /// The registry is not trusted.
    #[error("request {what} from {registry}: the server is not trusted: {problem}")]
    Untrusted {
        /// The registry.
        registry: String,
        /// The requested resource.
        what: String,
        /// Why not.
        problem: TlsProblem,
    },
    /// The credential helper for a registry failed.
    #[error("get credentials for {registry} from {program} (set in {file}): {why}")]
    Helper {
        /// The program.
        program: String,
        /// Docker's file.
        file: String,
        /// The registry.
        registry: String,
        /// Why.
        why: HelperProblem,
    },
    /// A digest does not match.
    #[error("{what} has the digest {found} instead of {expected}")]
    Digest {
        /// What was read.
        what: String,
        /// The expected digest.
        expected: String,
        /// The actual digest.
        found: String,
    },
    /// A length does not match.
    #[error("{what} has {found} bytes instead of {expected}")]
    Size {
        /// What was read.
        what: String,
        /// The expected length.
        expected: u64,
        /// The actual length; reading stops one byte after the expected length.
        found: u64,
    },
    /// Something exceeds a limit.
    #[error("{what} is larger than {limit}")]
    TooLarge {
        /// What.
        what: String,
        /// The limit.
        limit: ByteSize,
    },
    /// A manifest, an index or a configuration is invalid.
    #[error("the image is damaged: {what}")]
    Document {
        /// What is wrong with it.
        what: String,
    },
    /// A blob is missing in a layout or archive.
    #[error("the image is damaged: {what} is missing")]
    Missing {
        /// What.
        what: String,
    },
    /// The image is not for this machine.
    #[error("there is no image for {wanted}, only for {has}")]
    Platform {
        /// The required platform.
        wanted: String,
        /// The available platforms.
        has: String,
    },
    /// A layout or archive holds several images.
    #[error("it holds several images: {names}")]
    Several {
        /// Their names.
        names: String,
    },
    /// A layout or archive holds no image of that name.
    #[error("it holds no image `{name}`, only {names}")]
    NoSuchName {
        /// The name that was given.
        name: String,
        /// The available names.
        names: String,
    },
    /// The file or directory is not an OCI image.
    #[error("{path} is not {wanted}")]
    NotOne {
        /// The file or directory.
        path: String,
        /// The expected format, with its article.
        wanted: &'static str,
    },
    /// The worker that pulls the image ended early.
    #[error("the worker that pulls the image ended early")]
    Worker,
}

impl OciError {
    /// The error code for callers.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Reference { .. } | Self::Several { .. } | Self::NoSuchName { .. } | Self::NotOne { .. } => {
                ErrorCode::InvalidArgument
            }
            Self::NotFound { .. } | Self::Platform { .. } => ErrorCode::ImageNotFound,
            Self::Unauthorized { .. }
            | Self::Transfer { .. }
            | Self::Slow { .. }
            | Self::Status { .. }
            | Self::Worker => ErrorCode::DownloadFailed,
            Self::Helper { .. } => ErrorCode::HostUnsuitable,
            Self::Untrusted { .. } | Self::Digest { .. } | Self::Size { .. } => ErrorCode::VerificationFailed,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Document { .. } | Self::Missing { .. } => ErrorCode::ImageFailed,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Reference { .. } => {
                Some("give oci:REGISTRY/REPOSITORY:TAG, such as oci:alpine:3.21".into())
            }
            Self::NotFound { .. } => Some("look at the spelling of repository and tag".into()),
            Self::Unauthorized { .. } => {
                Some("the image is private or does not exist; `docker login` on the host of nexusd makes private ones readable".into())
            }
            Self::Untrusted { problem, .. } => problem.hint().map(str::to_owned),
            Self::Helper { program, .. } => Some(format!(
                "see that `echo REGISTRY | {program} get` works for the user of nexusd and in its environment, or name another \
                 file as docker_config in nexus.toml"
            )),
            Self::Several { .. } | Self::NoSuchName { .. } => Some("name one behind a #, as in oci-layout:PATH#NAME".into()),
            Self::Transfer { .. } | Self::Slow { .. } => {
                Some("check that the host of nexusd can reach the registry; docker-archive:FILE takes a saved image".into())
            }
            _ => None,
        }
    }
}

fn quoted(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(", and says: {said}") }
}
