//! A registry: references, manifests and blobs. Plain HTTP is allowed only for registries on the loopback interface.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use http::header::{self, HeaderMap, HeaderValue};
use oci_spec::distribution::{ParseError, Reference};
use reqwest::StatusCode;
use reqwest::redirect::Policy;

use super::OciError;
use super::credentials::Keychain;
use super::digest::{Digest, shown};
use super::document::{Blob, DOCUMENT_MAX};
use super::session::{Actions, Session};
use crate::os::tls::Trust;

/// The timeout for connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The timeout while nothing is received.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The total timeout for a token or a document.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest reference.
const REFERENCE_MAX: usize = 512;

const ACCEPTED: HeaderValue = HeaderValue::from_static(
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json",
);

/// How to access registries. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// The credentials for private ones.
    pub keychain: Keychain,
    /// The CAs to trust.
    pub trust: Trust,
    /// Host names that are not in DNS.
    #[cfg(test)]
    pub(crate) hosts: Vec<(String, std::net::SocketAddr)>,
}

impl Access {
    /// Uses these credentials and this trust.
    pub fn new(keychain: Keychain, trust: Trust) -> Self {
        Self {
            keychain,
            trust,
            #[cfg(test)]
            hosts: Vec::new(),
        }
    }

    pub(super) fn client(&self) -> Result<reqwest::Client, reqwest::Error> {
        self.client_within(Some(IDLE_TIMEOUT))
    }

    /// A client to send with: its answers come after all was sent, so only the connection has a timeout. It follows no redirect, since what is sent is for
    /// the registry alone.
    pub(super) fn uploading_client(&self) -> Result<reqwest::Client, reqwest::Error> {
        self.client_within(None)
    }

    fn client_within(&self, idle: Option<Duration>) -> Result<reqwest::Client, reqwest::Error> {
        self.trust.client(|builder| {
            let builder = builder.connect_timeout(CONNECT_TIMEOUT);
            let builder = match idle {
                Some(idle) => builder.read_timeout(idle),
                None => builder.redirect(Policy::none()),
            };
            #[cfg(test)]
            let builder = self.hosts.iter().fold(builder, |builder, (name, at)| builder.resolve(name, *at));
            builder
        })
    }
}

/// An image in a registry. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

struct Shared {
    reference: Reference,
    session: Session,
}

/// An image in a registry, resolved to its current digest.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub(super) remote: Remote,
    pub(super) digest: Digest,
    pub(super) document: Vec<u8>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Remote").field(&self.shared.reference.whole()).finish()
    }
}

impl Remote {
    /// Parses a reference (`REGISTRY/REPOSITORY:TAG` or `…@DIGEST`; `python:3.12` refers to Docker Hub).
    pub fn parse(text: &str, access: &Access) -> Result<Self, OciError> {
        Self::parse_for(Actions::Pull, text, access)
    }

    /// The same for a reference with a tag to which an image is to be pushed.
    pub(crate) fn parse_to_push(text: &str, access: &Access) -> Result<Self, OciError> {
        let remote = Self::parse_for(Actions::Push, text, access)?;
        remote.tag()?;
        Ok(remote)
    }

    fn parse_for(actions: Actions, text: &str, access: &Access) -> Result<Self, OciError> {
        let bad = |why: String| OciError::Reference { reference: shown(text), why };
        if text.len() > REFERENCE_MAX {
            return Err(bad("it is too long".into()));
        }
        let reference: Reference = text.parse().map_err(|e: ParseError| bad(e.to_string()))?;
        if let Some(digest) = reference.digest() {
            Digest::parse(digest).map_err(|e| bad(e.to_string()))?;
        }
        let session = Session::new(
            reference.resolve_registry().to_owned(),
            reference.registry().to_owned(),
            reference.repository().to_owned(),
            actions,
            access.clone(),
        )?;
        Ok(Self { shared: Arc::new(Shared { reference, session }) })
    }

    /// The whole reference.
    pub fn reference(&self) -> String {
        self.shared.reference.whole()
    }

    /// The last part of the repository's name, and the tag.
    pub fn short(&self) -> String {
        let reference = &self.shared.reference;
        let name = reference.repository().rsplit('/').next().unwrap_or_default();
        match reference.tag() {
            Some(tag) => format!("{name}-{tag}"),
            None => name.to_owned(),
        }
    }

    pub(super) fn session(&self) -> &Session {
        &self.shared.session
    }

    /// The tag; a digest is refused, because it is of what the registry has already.
    pub(super) fn tag(&self) -> Result<&str, OciError> {
        let reference = &self.shared.reference;
        match (reference.digest(), reference.tag()) {
            (None, tag) => Ok(tag.unwrap_or("latest")),
            (Some(_), _) => Err(OciError::Reference {
                reference: shown(&reference.whole()),
                why: "an image is pushed to a tag, not to a digest".into(),
            }),
        }
    }

    /// The registry has no such image, or no such repository.
    pub(super) fn not_found(&self) -> OciError {
        OciError::NotFound { registry: self.registry(), image: self.image() }
    }

    fn registry(&self) -> String {
        self.shared.reference.resolve_registry().to_owned()
    }

    fn image(&self) -> String {
        let reference = &self.shared.reference;
        match (reference.tag(), reference.digest()) {
            (_, Some(digest)) => format!("{}@{digest}", reference.repository()),
            (tag, None) => format!("{}:{}", reference.repository(), tag.unwrap_or("latest")),
        }
    }

    /// Resolves the reference to its current digest.
    pub async fn resolve(&self) -> Result<Resolved, OciError> {
        let reference = &self.shared.reference;
        let name = reference.digest().or(reference.tag()).unwrap_or("latest");
        let document = self.document(name).await?;
        Ok(Resolved { remote: self.clone(), digest: Digest::of(&document), document })
    }

    /// Fetches a manifest or index by its digest, and verifies it.
    pub(super) async fn manifest(&self, blob: &Blob) -> Result<Vec<u8>, OciError> {
        let bytes = self.document(&blob.digest.to_string()).await?;
        super::blobs::check_size("a manifest", blob, bytes.len() as u64)?;
        Ok(bytes)
    }

    async fn document(&self, name: &str) -> Result<Vec<u8>, OciError> {
        let what = format!("the manifest {}", shown(name));
        self.within(&what, self.get_document(name, &what)).await
    }

    pub(super) async fn within<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, OciError>>,
    ) -> Result<T, OciError> {
        let slow = || OciError::Slow { registry: self.registry(), what: what.to_owned() };
        tokio::time::timeout(ANSWER_TIMEOUT, work).await.unwrap_or_else(|_| Err(slow()))
    }

    async fn get_document(&self, name: &str, what: &str) -> Result<Vec<u8>, OciError> {
        let session = &self.shared.session;
        let headers = HeaderMap::from_iter([(header::ACCEPT, ACCEPTED)]);
        let asked = session.get(&format!("manifests/{name}"), headers, what).await;
        let response = asked.map_err(|error| match error {
            OciError::Missing { .. } => self.not_found(),
            OciError::Unauthorized { .. } => {
                OciError::Unauthorized { registry: self.registry(), image: self.image() }
            }
            other => other,
        })?;
        let promised = response.headers().get("docker-content-digest").cloned();
        let bytes = session.capped(response, DOCUMENT_MAX, what).await?;
        let promised = promised.and_then(|value| Digest::parse(value.to_str().ok()?).ok());
        for expected in promised.into_iter().chain(Digest::parse(name).ok()) {
            let mut hasher = expected.hasher();
            hasher.update(&bytes);
            expected.expect(what, hasher)?;
        }
        Ok(bytes)
    }

    /// Starts to fetch a blob at an offset; also returns whether the server starts there or at the beginning.
    pub(super) async fn blob(&self, blob: &Blob, from: u64) -> Result<(bool, Pieces), OciError> {
        let what = "a blob";
        let mut headers = HeaderMap::new();
        if from > 0 {
            headers.insert(
                header::RANGE,
                HeaderValue::from_maybe_shared(format!("bytes={from}-")).map_err(|_| OciError::Worker)?,
            );
        }
        let path = format!("blobs/{}", blob.digest);
        let response = self.within(what, self.shared.session.get(&path, headers, what)).await?;
        let goes_on = from > 0 && response.status() == StatusCode::PARTIAL_CONTENT;
        let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
        if goes_on && range.is_some_and(|range| !range.starts_with(&format!("bytes {from}-"))) {
            let what = format!("{} returned a different range of {what} than requested", self.registry());
            return Err(OciError::Document { what });
        }
        let left = if goes_on { blob.size.saturating_sub(from) } else { blob.size };
        if let Some(length) = response.content_length()
            && length != left
        {
            let found = if goes_on { from.saturating_add(length) } else { length };
            return Err(OciError::Size { what: what.into(), expected: blob.size, found });
        }
        let remote = self.clone();
        let pieces = response.bytes_stream();
        let pieces = pieces.map(move |piece| piece.map_err(|e| remote.shared.session.transfer(what, e)));
        Ok((goes_on, Box::pin(pieces)))
    }
}

impl Resolved {
    /// The whole reference, with the digest that it was resolved to.
    pub fn reference(&self) -> String {
        let reference = self.remote.reference();
        let name = reference.split('@').next().unwrap_or_default();
        format!("{name}@{}", self.digest)
    }

    /// That digest, in hexadecimal.
    pub fn hex(&self) -> &str {
        self.digest.hex()
    }
}

/// The chunks of a blob.
pub(super) type Pieces = futures::stream::BoxStream<'static, Result<bytes::Bytes, OciError>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read() {
        let whole = |text: &str| Remote::parse(text, &Access::default()).map(|r| (r.reference(), r.short()));
        let hub = "docker.io";
        assert_eq!(
            whole("python:3.12-slim").unwrap(),
            (format!("{hub}/library/python:3.12-slim"), "python-3.12-slim".into())
        );
        assert_eq!(
            whole("127.0.0.1:5000/a/b").unwrap(),
            ("127.0.0.1:5000/a/b:latest".into(), "b-latest".into())
        );
        let digest = Digest::of(b"");
        assert_eq!(
            whole(&format!("localhost/x@{digest}")).unwrap(),
            (format!("localhost/x@{digest}"), "x".into())
        );
        for bad in
            ["", "UPPER", "a b", "a/b:", "a@sha256:12", "a@md5:d41d8cd98f00b204e9800998ecf8427e", "../../x"]
        {
            let error = whole(bad).expect_err(bad);
            assert_eq!(error.code(), nexus_schema::ErrorCode::InvalidArgument, "{bad}: {error}");
        }
        assert!(whole(&"a".repeat(600)).is_err());
    }
}
