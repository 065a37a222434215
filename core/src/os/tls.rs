//! TLS: the cryptography, the trusted CAs, and why a server is refused.
//!
//! [`Trust::client`] makes every HTTP client of the daemon: all trust the same CAs, and none follows a redirect from TLS to plain HTTP.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use data_encoding::BASE64;
use fs_err as fs;
use reqwest::ClientBuilder;
use reqwest::redirect::{Attempt, Policy};
use rustls::CertificateError;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use tempfile::TempPath;

/// The daemon's user agent.
const USER_AGENT: &str = concat!("nexus/", env!("CARGO_PKG_VERSION"));
/// How many redirects are followed.
const REDIRECTS_MAX: usize = 8;

/// Installs a cryptography provider before a client is made.
pub(crate) fn provide() {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Another part of the process may have installed one: any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// The trusted CAs: those that the host trusts, and those in a file. Cheap to clone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Trust {
    more: Option<Arc<More>>,
}

/// CAs in addition to the host's.
#[derive(PartialEq, Eq)]
struct More {
    file: PathBuf,
    certificates: Vec<CertificateDer<'static>>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trust").field(&self.more.as_ref().map(|more| &more.file)).finish()
    }
}

impl Trust {
    /// Reads the certificates of more CAs from a file in PEM.
    pub fn read(file: &Path) -> Result<Self, TrustProblem> {
        let unusable = |why: String| TrustProblem::Unusable { file: file.to_owned(), why };
        let text = fs::read(file).map_err(|source| TrustProblem::Read { source })?;
        let mut certificates = Vec::new();
        for (at, certificate) in CertificateDer::pem_slice_iter(&text).enumerate() {
            let certificate = certificate.map_err(|e| unusable(e.to_string()))?;
            // A client uses the certificates that it can parse, and silently ignores others.
            let read = rustls::RootCertStore::empty().add(certificate.clone());
            read.map_err(|e| unusable(format!("certificate {}: {e}", at + 1)))?;
            certificates.push(certificate);
        }
        if certificates.is_empty() {
            return Err(unusable("it contains no certificate".into()));
        }
        Ok(Self { more: Some(Arc::new(More { file: file.to_owned(), certificates })) })
    }

    /// All trusted CAs, including the host's, in a file for programs that accept only one file; `None` if there are only the
    /// host's. World-readable.
    pub(crate) fn bundle(&self) -> io::Result<Option<TempPath>> {
        use std::os::unix::fs::PermissionsExt;
        let Some(more) = &self.more else { return Ok(None) };
        let own = rustls_native_certs::load_native_certs().certs;
        let mut text = String::new();
        for certificate in more.certificates.iter().chain(&own) {
            text.push_str("-----BEGIN CERTIFICATE-----\n");
            for line in BASE64.encode(certificate).as_bytes().chunks(64) {
                text.extend(line.iter().map(|b| char::from(*b)));
                text.push('\n');
            }
            text.push_str("-----END CERTIFICATE-----\n");
        }
        let readable = std::fs::Permissions::from_mode(0o644);
        let file = tempfile::Builder::new().prefix("nexus-ca-").permissions(readable).tempfile()?;
        fs::write(file.path(), text)?;
        Ok(Some(file.into_temp_path()))
    }

    /// Makes an HTTP client.
    pub(crate) fn client(
        &self,
        configure: impl Fn(ClientBuilder) -> ClientBuilder,
    ) -> Result<reqwest::Client, reqwest::Error> {
        provide();
        let more = self.more.iter().flat_map(|more| &more.certificates);
        let more = more.map(|der| reqwest::Certificate::from_der(der)).collect::<Result<Vec<_>, _>>()?;
        let build = || {
            let builder = reqwest::Client::builder()
                .user_agent(USER_AGENT)
                .redirect(Policy::custom(redirect))
                .referer(false);
            configure(builder)
        };
        // Without any CA certificates on the host the verifier cannot be made. Plain HTTP, which package archives use, still
        // works; HTTPS then trusts only the CAs in the file.
        build().tls_certs_merge(more.clone()).build().or_else(|_| build().tls_certs_only(more).build())
    }
}

/// Why a file of CAs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustProblem {
    /// It cannot be read; the cause names it.
    #[error("{source}")]
    Read {
        /// Why.
        source: io::Error,
    },
    /// It is not a list of certificates.
    #[error("{} is not a PEM list of CA certificates: {why}", .file.display())]
    Unusable {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Follows a redirect, but never from TLS to plain HTTP.
fn redirect(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let was_safe = attempt.previous().iter().any(|url| url.scheme() == "https");
    if was_safe && attempt.url().scheme() != "https" {
        let to = super::shown::shown(attempt.url());
        return attempt.error(TlsProblem::Downgrade { to });
    }
    Policy::limited(REDIRECTS_MAX).redirect(attempt)
}

/// Why a server is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsProblem {
    /// Its certificate was not issued by a trusted CA.
    #[error("its certificate was not issued by a trusted CA")]
    UnknownIssuer,
    /// Its certificate has expired.
    #[error("its certificate expired at {0}")]
    Expired(String),
    /// Its certificate is not valid yet.
    #[error("its certificate is not valid before {0}")]
    NotYetValid(String),
    /// Its certificate is for another server.
    #[error("its certificate is only valid for {0}")]
    WrongName(String),
    /// Its certificate is invalid in another way.
    #[error("its certificate is not accepted: {0}")]
    Certificate(String),
    /// It redirects from TLS to plain HTTP.
    #[error("redirect from HTTPS to plain HTTP refused: {to}")]
    Downgrade {
        /// The target of the redirect.
        to: String,
    },
}

impl TlsProblem {
    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::UnknownIssuer => Some(
                "if the server is yours, set ca_file in nexus.toml to the certificate of its CA (or \
                 NEXUS_CA_FILE) and start nexusd again; else somebody may be in between",
            ),
            Self::Expired(_) | Self::NotYetValid(_) => Some(
                "check the host's clock; if it is correct, the server needs a new certificate: use another mirror until then",
            ),
            Self::WrongName(_) => Some("use the address that the server's certificate is for"),
            Self::Certificate(_) => {
                Some("the server needs another certificate: use another mirror until then")
            }
            Self::Downgrade { .. } => Some(
                "use another mirror or registry, or the redirect's target itself if you trust the network in between",
            ),
        }
    }

    fn of(error: &CertificateError) -> Self {
        match error {
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::ExpiredContext { not_after, .. } => Self::Expired(day(*not_after)),
            CertificateError::NotValidYetContext { not_before, .. } => Self::NotYetValid(day(*not_before)),
            CertificateError::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
                Self::WrongName(named(presented))
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Self::WrongName("no name at all".into())
            }
            other => Self::Certificate(rustls::Error::InvalidCertificate(other.clone()).to_string()),
        }
    }
}

/// The first names in a certificate.
fn named(presented: &[String]) -> String {
    const SHOWN: usize = 4;
    let names: Vec<String> = presented.iter().take(SHOWN).map(|name| shortened(name)).collect();
    let more = if presented.len() > SHOWN { " and others" } else { "" };
    format!("{}{more}", names.join(", "))
}

/// A name without the verifier's decoration, cut to the maximum length of a name.
fn shortened(name: &str) -> String {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
    inner.trim_matches('"').chars().filter(|c| !c.is_control()).take(253).collect()
}

fn day(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| "an invalid time".into(), |at| at.to_string())
}

/// Why a request failed, if its server is not trusted. A retry would not help.
pub(crate) fn refusal(error: &(dyn Error + 'static)) -> Option<TlsProblem> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(problem) = error.downcast_ref::<TlsProblem>() {
            return Some(problem.clone());
        }
        if let Some(rustls::Error::InvalidCertificate(problem)) = error.downcast_ref::<rustls::Error>() {
            return Some(TlsProblem::of(problem));
        }
        // An I/O error's `source` skips the error that it wraps, so that one is looked at here.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
