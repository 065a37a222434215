//! Authentication with a registry: what it demands, and the token or password that answers it.
//!
//! A request is first sent without credentials. If the registry demands authentication, credentials are looked up and the
//! request is sent once more. Every response of a registry is limited in size.

use std::fmt;
use std::net::IpAddr;

use data_encoding::BASE64;
use http::header::{self, HeaderMap, HeaderValue};
use nexus_schema::ByteSize;
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::OciError;
use super::credentials::Login;
use super::registry::Access;
use crate::os::tls::{self, TlsProblem};

/// The largest response with a token.
const TOKEN_MAX: u64 = 256 << 10;
/// How much of an error's explanation is read.
const EXPLANATION_MAX: u64 = 16 << 10;
/// How much of it is shown.
const EXPLANATION_SHOWN: usize = 200;

/// What is to be done with a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Actions {
    /// Read from it.
    Pull,
    /// Write to it, too.
    Push,
}

impl Actions {
    /// The words by which a token is asked for.
    fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "pull,push",
        }
    }
}

/// Requests to one repository of a registry.
pub(super) struct Session {
    registry: String,
    /// The registry's name in the host's credentials.
    known_as: String,
    repository: String,
    actions: Actions,
    access: Access,
    http: reqwest::Client,
    uploads: reqwest::Client,
    held: Mutex<Option<HeaderValue>>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Session").field(&self.registry).finish()
    }
}

impl Session {
    pub(super) fn new(
        registry: String,
        known_as: String,
        repository: String,
        actions: Actions,
        access: Access,
    ) -> Result<Self, OciError> {
        let failed = |e| OciError::Transfer {
            registry: registry.clone(),
            what: "anything".into(),
            source: Box::new(e),
        };
        let http = access.client().map_err(failed)?;
        let uploads = match actions {
            Actions::Pull => http.clone(),
            Actions::Push => access.uploading_client().map_err(failed)?,
        };
        Ok(Self { registry, known_as, repository, actions, access, http, uploads, held: Mutex::new(None) })
    }

    pub(super) fn http(&self) -> &reqwest::Client {
        &self.http
    }

    /// The client for requests that send much.
    pub(super) fn uploads(&self) -> &reqwest::Client {
        &self.uploads
    }

    /// The URL of something in the repository.
    pub(super) fn url(&self, path: &str) -> String {
        let scheme = if is_loopback(&self.registry) { "http" } else { "https" };
        format!("{scheme}://{}/v2/{}/{path}", self.registry, self.repository)
    }

    /// Requests something from the repository. The response was successful; its body is not read yet.
    pub(super) async fn get(&self, path: &str, headers: HeaderMap, what: &str) -> Result<Response, OciError> {
        let url = self.parsed(&self.url(path))?;
        let response = self.call(&url, what, &|| self.http.get(url.clone()).headers(headers.clone())).await?;
        self.accepted(response, what).await
    }

    /// The URL of something in the repository.
    pub(super) fn parsed(&self, url: &str) -> Result<Url, OciError> {
        Url::parse(url).map_err(|_| self.misled("has no valid address"))
    }

    /// Sends the request that `make` makes to `url`, and once more with credentials if the registry demands them. The response may be of any status; its body
    /// is not read yet.
    pub(super) async fn call(
        &self,
        url: &Url,
        what: &str,
        make: &(dyn Fn() -> RequestBuilder + Sync),
    ) -> Result<Response, OciError> {
        let held = self.held.lock().await.clone();
        let request = |held: Option<HeaderValue>| match held {
            Some(held) => make().header(header::AUTHORIZATION, held),
            None => make(),
        };
        let response = self.send(request(held.clone()), what).await?;
        // After a redirect another server answered, which gets no credentials.
        if response.status() != StatusCode::UNAUTHORIZED || url.origin() != response.url().origin() {
            return Ok(response);
        }
        let proof = self.prove(response.headers(), held).await?;
        self.send(request(Some(proof)), what).await
    }

    /// Returns a response that was successful.
    pub(super) async fn accepted(&self, response: Response, what: &str) -> Result<Response, OciError> {
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.unauthorized()),
            StatusCode::NOT_FOUND => Err(OciError::Missing { what: format!("{what} in {}", self.registry) }),
            _ => Err(self.failure(response, what).await),
        }
    }

    /// The answer to a registry's demand, different from the one that was refused.
    async fn prove(
        &self,
        headers: &HeaderMap,
        refused: Option<HeaderValue>,
    ) -> Result<HeaderValue, OciError> {
        let mut held = self.held.lock().await;
        if let Some(other) = held.as_ref()
            && refused.as_ref() != Some(other)
        {
            return Ok(other.clone());
        }
        let proof = match Demand::of(headers) {
            Some(Demand::Token { realm, service }) => self.token(&realm, service.as_deref()).await?,
            Some(Demand::Password) => match self.login().await? {
                Some(Login::Password { user, password }) => basic(&user, &password),
                Some(Login::Token(_)) | None => return Err(self.unauthorized()),
            },
            None => return Err(self.unauthorized()),
        };
        let mut proof = HeaderValue::from_str(&proof).map_err(|_| OciError::Document {
            what: format!("{} returned an invalid token", self.registry),
        })?;
        proof.set_sensitive(true);
        Ok(held.insert(proof).clone())
    }

    async fn login(&self) -> Result<Option<Login>, OciError> {
        self.access.keychain.find(&self.known_as).await
    }

    /// Gets a token for this repository, for no more than is to be done with it.
    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, OciError> {
        let what = "a token";
        let bad = || OciError::Document { what: format!("{} names no token server", self.registry) };
        let mut url = Url::parse(realm).map_err(|_| bad())?;
        self.check_realm(&url)?;
        let scope = format!("repository:{}:{}", self.repository, self.actions.as_str());
        let mut asked = vec![("scope", scope.as_str())];
        asked.extend(service.map(|service| ("service", service)));
        let request = match self.login().await? {
            Some(Login::Token(token)) => {
                asked.extend([("grant_type", "refresh_token"), ("client_id", "nexus")]);
                asked.push(("refresh_token", &token));
                // Only the query of a URL is form-encoded.
                let mut form = url.clone();
                form.query_pairs_mut().clear().extend_pairs(asked);
                let body = form.query().unwrap_or_default().to_owned();
                let form_type = "application/x-www-form-urlencoded";
                self.http.post(url).header(header::CONTENT_TYPE, form_type).body(body)
            }
            login => {
                url.query_pairs_mut().extend_pairs(asked);
                let request = self.http.get(url);
                match login {
                    Some(Login::Password { user, password }) => request.basic_auth(user, Some(password)),
                    _ => request,
                }
            }
        };
        let response = self.send(request, what).await?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.unauthorized()),
            _ => return Err(self.failure(response, what).await),
        }
        #[derive(Deserialize)]
        struct Given {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.capped(response, TOKEN_MAX, what).await?;
        let given: Option<Given> = serde_json::from_slice(&body).ok();
        let token =
            given.and_then(|given| given.token.or(given.access_token)).filter(|token| !token.is_empty());
        token
            .map(|token| format!("Bearer {token}"))
            .ok_or_else(|| OciError::Document { what: format!("{} returned no token", self.registry) })
    }

    /// Tokens must come over TLS, except for a registry on this machine, whose tokens may also come from this machine.
    fn check_realm(&self, realm: &Url) -> Result<(), OciError> {
        let is_here = |host: &str| is_loopback(host) && is_loopback(&self.registry);
        match realm.scheme() {
            "https" => Ok(()),
            "http" if realm.host_str().is_some_and(is_here) => Ok(()),
            _ => Err(self.untrusted("a token", TlsProblem::Downgrade { to: crate::os::shown::shown(realm) })),
        }
    }

    async fn send(&self, request: RequestBuilder, what: &str) -> Result<Response, OciError> {
        request.send().await.map_err(|e| self.transfer(what, e))
    }

    /// Reads a response up to a maximum size.
    pub(super) async fn capped(
        &self,
        mut response: Response,
        max: u64,
        what: &str,
    ) -> Result<Vec<u8>, OciError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.transfer(what, e))? {
            if (bytes.len() + chunk.len()) as u64 > max {
                let limit = ByteSize::bytes(max);
                return Err(OciError::TooLarge { what: format!("{what} of {}", self.registry), limit });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// The error for a failed response, with the registry's explanation if there is one.
    async fn failure(&self, response: Response, what: &str) -> OciError {
        #[derive(Deserialize)]
        struct Explanation {
            errors: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            code: Option<String>,
            message: Option<String>,
        }
        let status = response.status().as_u16();
        let body = self.capped(response, EXPLANATION_MAX, what).await.unwrap_or_default();
        let said: Option<Explanation> = serde_json::from_slice(&body).ok();
        let said = said.and_then(|said| said.errors.into_iter().next());
        let said = said.and_then(|entry| entry.message.filter(|m| !m.is_empty()).or(entry.code));
        let plain = |text: String| text.chars().filter(|c| !c.is_control()).take(EXPLANATION_SHOWN).collect();
        OciError::Status {
            registry: self.registry.clone(),
            what: what.to_owned(),
            status,
            said: said.map(plain).unwrap_or_default(),
        }
    }

    pub(super) fn transfer(&self, what: &str, error: reqwest::Error) -> OciError {
        match tls::refusal(&error) {
            Some(problem) => self.untrusted(what, problem),
            // URLs may contain tokens.
            None => OciError::Transfer {
                registry: self.registry.clone(),
                what: what.to_owned(),
                source: Box::new(error.without_url()),
            },
        }
    }

    fn untrusted(&self, what: &str, problem: TlsProblem) -> OciError {
        OciError::Untrusted { registry: self.registry.clone(), what: what.to_owned(), problem }
    }

    /// The registry did not answer in time.
    pub(super) fn slow(&self, what: &str) -> OciError {
        OciError::Slow { registry: self.registry.clone(), what: what.to_owned() }
    }

    /// The registry does not keep to the protocol.
    pub(super) fn misled(&self, why: &str) -> OciError {
        OciError::Document { what: format!("{} {why}", self.registry) }
    }

    fn unauthorized(&self) -> OciError {
        OciError::Unauthorized { registry: self.registry.clone(), image: self.repository.clone() }
    }
}

/// How a registry wants clients to authenticate.
#[derive(Debug, PartialEq)]
enum Demand {
    /// By a token from another server.
    Token { realm: String, service: Option<String> },
    /// By user name and password.
    Password,
}

impl Demand {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut found = None;
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            let Ok(challenges) = http_auth::parse_challenges(value.to_str().unwrap_or_default()) else {
                continue;
            };
            for challenge in challenges {
                let param = |name: &str| {
                    let value = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                    value.map(|(_, value)| value.to_unescaped())
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = param("realm")
                {
                    return Some(Self::Token { realm, service: param("service") });
                }
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    found = Some(Self::Password);
                }
            }
        }
        found
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}").as_bytes()))
}

/// Whether a registry (`HOST` or `HOST:PORT`) is this machine, by its name.
pub(super) fn is_loopback(registry: &str) -> bool {
    let (host, _) = host_and_port(registry);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The parts of a registry (`HOST` or `HOST:PORT`); an address of IPv6 is in brackets.
pub(super) fn host_and_port(registry: &str) -> (&str, Option<u16>) {
    let (host, rest) = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inner, rest)) => (inner, rest.strip_prefix(':')),
        None => match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, None),
        },
    };
    (host, rest.and_then(|port| port.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(host_and_port("[::1]:5000"), ("::1", Some(5000)));
        assert_eq!(host_and_port("[::1]"), ("::1", None));
        assert_eq!(host_and_port("example.com:443"), ("example.com", Some(443)));
        assert_eq!(host_and_port("example.com"), ("example.com", None));
    }

    #[test]
    fn tokens_come_from_safe_places() {
        let session = |registry: &str| {
            let actions = Actions::Pull;
            Session::new(registry.into(), registry.into(), "a".into(), actions, Access::default()).unwrap()
        };
        let allowed =
            |registry: &str, realm: &str| session(registry).check_realm(&realm.parse().unwrap()).is_ok();
        assert!(allowed("example.com", "https://auth.example.net/token"));
        assert!(allowed("127.0.0.1:5000", "http://127.0.0.1:5001/token"));
        for (registry, realm) in [
            ("example.com", "http://example.com/token"),
            ("example.com", "http://127.0.0.1/token"),
            ("127.0.0.1:5000", "http://example.com/token"),
            ("example.com", "file:///etc/passwd"),
        ] {
            assert!(!allowed(registry, realm), "{registry} {realm}");
        }
    }

    #[test]
    fn demands_are_read() {
        let demand = |values: &[&'static str]| {
            let pairs = values.iter().map(|v| (header::WWW_AUTHENTICATE, HeaderValue::from_static(v)));
            let mut headers = HeaderMap::new();
            pairs.for_each(|(name, value)| {
                headers.append(name, value);
            });
            Demand::of(&headers)
        };
        let token = Demand::Token { realm: "https://a/t".into(), service: Some("s".into()) };
        assert_eq!(demand(&["Bearer realm=\"https://a/t\",service=\"s\",scope=\"x\""]), Some(token));
        assert_eq!(demand(&["Basic realm=\"here\""]), Some(Demand::Password));
        let both = demand(&["Basic realm=\"here\"", "bearer realm=\"https://a/t\""]);
        assert_eq!(both, Some(Demand::Token { realm: "https://a/t".into(), service: None }));
        for none in [&["Negotiate"][..], &["Bearer"], &["=,="], &[]] {
            assert_eq!(demand(none), None, "{none:?}");
        }
    }
}
