//! A registry: references, credentials, manifests and blobs.
//!
//! Tokens and blobs come by oci-client. Manifests are fetched here with the token that it got, since it takes a document of
//! any length into memory. HTTP without TLS is for registries on the loopback interface only.

use std::fmt;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use data_encoding::BASE64;
use futures::{FutureExt, StreamExt};
use http::header;
use nexus_schema::ByteSize;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};

use super::OciError;
use super::digest::{Digest, shown};
use super::document::{Blob, DOCUMENT_MAX};
use crate::os::tls;

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long nothing may come.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a token or a document may take in all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest file of credentials that is read.
const CREDENTIALS_MAX: u64 = 1 << 20;
/// The registry of references that name none.
const HUB: &str = "docker.io";
/// The longest reference.
const REFERENCE_MAX: usize = 512;

const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// An image in a registry. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

struct Shared {
    reference: Reference,
    auth: RegistryAuth,
    client: Client,
    http: reqwest::Client,
}

/// An image in a registry as it is now: what its name stands for.
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
    /// Reads a reference (`REGISTRY/REPOSITORY:TAG` or `…@DIGEST`; `python:3.12` is Docker Hub's). Credentials are looked for
    /// in `docker_config`, if it is there.
    pub fn parse(text: &str, docker_config: Option<&Path>) -> Result<Self, OciError> {
        let bad = |why: String| OciError::Reference { reference: shown(text), why };
        if text.len() > REFERENCE_MAX {
            return Err(bad("it is too long".into()));
        }
        let reference: Reference = text.parse().map_err(|e: oci_client::ParseError| bad(e.to_string()))?;
        if let Some(digest) = reference.digest() {
            Digest::parse(digest).map_err(|e| bad(e.to_string()))?;
        }
        let registry = reference.resolve_registry();
        let protocol = if is_loopback(registry) { ClientProtocol::Http } else { ClientProtocol::Https };
        let auth = docker_config
            .and_then(|path| credentials(path, reference.registry()))
            .map_or(RegistryAuth::Anonymous, |(user, password)| RegistryAuth::Basic(user, password));
        tls::provide();
        let failed =
            |source| OciError::Transfer { registry: registry.to_owned(), what: "anything".into(), source };
        let config = ClientConfig {
            protocol,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(IDLE_TIMEOUT),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|e| failed(Box::new(e)))?;
        let http = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(IDLE_TIMEOUT)
            .build()
            .map_err(|e| failed(Box::new(e)))?;
        Ok(Self { shared: Arc::new(Shared { reference, auth, client, http }) })
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

    /// Finds out what the name stands for now.
    pub async fn resolve(&self) -> Result<Resolved, OciError> {
        let reference = &self.shared.reference;
        let name = reference.digest().or(reference.tag()).unwrap_or("latest");
        let document = self.document(name).await?;
        Ok(Resolved { remote: self.clone(), digest: Digest::of(&document), document })
    }

    /// Fetches a manifest or index by its digest, which it has.
    pub(super) async fn manifest(&self, blob: &Blob) -> Result<Vec<u8>, OciError> {
        let bytes = self.document(&blob.digest.to_string()).await?;
        super::blobs::check_size("a manifest", blob, bytes.len() as u64)?;
        Ok(bytes)
    }

    async fn document(&self, name: &str) -> Result<Vec<u8>, OciError> {
        let what = format!("the manifest {}", shown(name));
        self.within(&what, self.get_document(name, &what)).await
    }

    async fn within<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, OciError>>,
    ) -> Result<T, OciError> {
        let slow = || OciError::Slow { registry: self.registry(), what: what.to_owned() };
        tokio::time::timeout(ANSWER_TIMEOUT, work).await.unwrap_or_else(|_| Err(slow()))
    }

    async fn get_document(&self, name: &str, what: &str) -> Result<Vec<u8>, OciError> {
        let Shared { reference, auth, http, .. } = &*self.shared;
        let token = self.token().await?;
        let registry = reference.resolve_registry();
        let scheme = if is_loopback(registry) { "http" } else { "https" };
        let url = format!("{scheme}://{registry}/v2/{}/manifests/{name}", reference.repository());
        let mut request = http.get(url).header(header::ACCEPT, ACCEPTED);
        request = match (token, auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        };
        let failed = |source: reqwest::Error| self.transfer(what, Box::new(source));
        let mut response = request.send().await.map_err(failed)?;
        match response.status().as_u16() {
            200 => {}
            404 => return Err(self.not_found()),
            401 | 403 => return Err(self.unauthorized()),
            status => {
                return Err(OciError::Status { registry: self.registry(), what: what.to_owned(), status });
            }
        }
        let promised = response.headers().get("docker-content-digest").cloned();
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if (bytes.len() + chunk.len()) as u64 > DOCUMENT_MAX {
                let limit = ByteSize::bytes(DOCUMENT_MAX);
                return Err(OciError::TooLarge { what: what.to_owned(), limit });
            }
            bytes.extend_from_slice(&chunk);
        }
        let promised = promised.and_then(|value| Digest::parse(value.to_str().ok()?).ok());
        for expected in promised.into_iter().chain(Digest::parse(name).ok()) {
            let mut hasher = expected.hasher();
            hasher.update(&bytes);
            expected.expect(what, hasher)?;
        }
        Ok(bytes)
    }

    /// The registry's token for this repository, where it wants one; the client keeps it for blobs.
    async fn token(&self) -> Result<Option<String>, OciError> {
        let Shared { reference, auth, client, .. } = &*self.shared;
        let asked = client.auth(reference, auth, RegistryOperation::Pull);
        let token = guarded(asked).await?.map_err(|e| self.told("a token", e))?;
        // The client takes for granted that it can be sent.
        match &token {
            Some(token) if header::HeaderValue::from_str(token).is_err() => Err(OciError::Document {
                what: format!("{} gives a token that cannot be one", self.registry()),
            }),
            _ => Ok(token),
        }
    }

    /// Begins to fetch a blob from a byte on; whether it starts there, or over again.
    pub(super) async fn blob(&self, blob: &Blob, from: u64) -> Result<(bool, Pieces), OciError> {
        let what = "a blob";
        let Shared { reference, client, .. } = &*self.shared;
        let digest = blob.digest.to_string();
        let begun = async {
            if from == 0 {
                let asked = client.pull_blob_stream(reference, digest.as_str());
                return Ok((false, guarded(asked).await?.map_err(|e| self.told(what, e))?));
            }
            let asked = client.pull_blob_stream_partial(reference, digest.as_str(), from, None);
            Ok(match guarded(asked).await?.map_err(|e| self.told(what, e))? {
                oci_client::client::BlobResponse::Full(stream) => (false, stream),
                oci_client::client::BlobResponse::Partial(stream) => (true, stream),
            })
        };
        let (goes_on, stream) = self.within(what, begun).await?;
        let left = if goes_on { blob.size.saturating_sub(from) } else { blob.size };
        if let Some(length) = stream.content_length
            && length != left
        {
            let found = if goes_on { from.saturating_add(length) } else { length };
            return Err(OciError::Size { what: what.into(), expected: blob.size, found });
        }
        let remote = self.clone();
        let pieces =
            stream.stream.map(move |piece| piece.map_err(|e| remote.transfer("a blob", Box::new(e))));
        Ok((goes_on, Box::pin(pieces)))
    }

    fn transfer(&self, what: &str, source: Box<dyn std::error::Error + Send + Sync>) -> OciError {
        OciError::Transfer { registry: self.registry(), what: what.to_owned(), source }
    }

    fn not_found(&self) -> OciError {
        OciError::NotFound { registry: self.registry(), image: self.image() }
    }

    fn unauthorized(&self) -> OciError {
        OciError::Unauthorized { registry: self.registry(), image: self.image() }
    }

    fn told(&self, what: &str, error: OciDistributionError) -> OciError {
        match error {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => self.unauthorized(),
            OciDistributionError::ServerError { code: 404, .. } => {
                OciError::Missing { what: format!("{what} in {}", self.registry()) }
            }
            OciDistributionError::ServerError { code, .. } => {
                OciError::Status { registry: self.registry(), what: what.to_owned(), status: code }
            }
            OciDistributionError::RegistryError { .. } => {
                OciError::Missing { what: format!("{what} in {}", self.registry()) }
            }
            other => self.transfer(what, Box::new(other)),
        }
    }
}

impl Resolved {
    /// The whole reference, with the digest that it stood for.
    pub fn reference(&self) -> String {
        let reference = self.remote.reference();
        let name = reference.split('@').next().unwrap_or_default();
        format!("{name}@{}", self.digest)
    }

    /// The digest that it stood for, in hexadecimal.
    pub fn hex(&self) -> &str {
        self.digest.hex()
    }
}

/// The pieces of a blob.
pub(super) type Pieces = futures::stream::BoxStream<'static, Result<bytes::Bytes, OciError>>;

const USER_AGENT: &str = concat!("nexus/", env!("CARGO_PKG_VERSION"));

/// The client panics on some of what a registry may answer.
async fn guarded<T>(work: impl Future<Output = T>) -> Result<T, OciError> {
    std::panic::AssertUnwindSafe(work).catch_unwind().await.map_err(|_| OciError::Worker)
}

/// Whether a registry (`HOST` or `HOST:PORT`) is this machine by its name.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inner, _)) => inner,
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The user and password for a registry in a file as `docker login` writes it. Credential helpers are not asked.
fn credentials(path: &Path, registry: &str) -> Option<(String, String)> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        auths: std::collections::BTreeMap<String, Auth>,
    }
    #[derive(serde::Deserialize)]
    struct Auth {
        auth: Option<String>,
    }
    let mut text = Vec::new();
    fs_err::File::open(path).ok()?.take(CREDENTIALS_MAX).read_to_end(&mut text).ok()?;
    let file: File = match serde_json::from_slice(&text) {
        Ok(file) => file,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "registry credentials not read");
            return None;
        }
    };
    let wanted = [HUB, "index.docker.io"];
    let same = |host: &str| host == registry || (wanted.contains(&registry) && wanted.contains(&host));
    let (_, found) = file.auths.iter().find(|(key, _)| {
        let bare = key.trim_start_matches("https://").trim_start_matches("http://");
        same(bare.split('/').next().unwrap_or_default())
    })?;
    let decoded = String::from_utf8(BASE64.decode(found.auth.as_ref()?.as_bytes()).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read() {
        let whole = |text: &str| Remote::parse(text, None).map(|r| (r.reference(), r.short()));
        assert_eq!(
            whole("python:3.12-slim").unwrap(),
            (format!("{HUB}/library/python:3.12-slim"), "python-3.12-slim".into())
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

    #[test]
    fn only_this_machine_is_asked_without_tls() {
        for loopback in ["localhost", "localhost:5000", "127.0.0.1:80", "127.8.9.1", "[::1]:5000"] {
            assert!(is_loopback(loopback), "{loopback}");
        }
        for other in
            ["docker.io", "localhost.example.com", "127.0.0.1.example.com:5000", "10.0.0.1:5000", "[fe80::1]"]
        {
            assert!(!is_loopback(other), "{other}");
        }
    }

    #[test]
    fn credentials_are_found_by_their_registry() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("config.json");
        let auth = |text: &str| serde_json::json!({ "auth": BASE64.encode(text.as_bytes()) });
        let hub = format!("https://index.{HUB}/v1/");
        let file = serde_json::json!({ "auths": {
            hub: auth("hub:p:w"), "127.0.0.1:5000": auth("me:secret"), "empty.example.com": {},
        }, "credsStore": "desktop" });
        std::fs::write(&path, file.to_string()).unwrap();
        assert_eq!(credentials(&path, HUB).unwrap(), ("hub".into(), "p:w".into()));
        assert_eq!(credentials(&path, "127.0.0.1:5000").unwrap(), ("me".into(), "secret".into()));
        for none in ["127.0.0.1:5001", "empty.example.com", "example.com"] {
            assert!(credentials(&path, none).is_none(), "{none}");
        }
        let remote = Remote::parse("127.0.0.1:5000/x", Some(&path)).unwrap();
        assert!(!format!("{remote:?}").contains("secret"));
        std::fs::write(&path, "{").unwrap();
        assert!(credentials(&path, HUB).is_none());
    }
}
