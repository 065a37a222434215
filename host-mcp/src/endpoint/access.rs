//! Access control: peers of the Unix socket by its mode, all others by a token, and no web pages.

use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use http::uri::Authority;
use http::{Request, Response, StatusCode, header};
use nexus_core::Caller;
use nexus_core::host::same_secret;

use super::{Body, plain};

/// The token's file in the state directory.
pub(super) const TOKEN_NAME: &str = "http-token";
/// The owner name of clients with that token.
const TOKEN_OWNER: &str = "token:http";
/// Host names of this machine that a request may be addressed to.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// A way for clients to connect.
#[derive(Debug, Clone)]
pub enum Door {
    /// The Unix socket: everyone who can connect has access.
    Unix,
    /// Loopback TCP: only with the token, and not from web pages.
    Tcp {
        /// The token.
        token: Arc<str>,
        /// Allowed origins of web pages, such as `http://localhost:6274`.
        origins: Arc<[String]>,
    },
}

impl Door {
    pub(super) fn offers_streams(&self) -> bool {
        matches!(self, Self::Unix)
    }

    /// Whether browsers come through it.
    pub(super) fn offers_page(&self) -> bool {
        matches!(self, Self::Tcp { .. })
    }

    /// Refuses requests that a web page could have sent: for other hosts (DNS rebinding) or from other origins. Also refuses
    /// requests with two hosts (RFC 9112 section 3.2).
    pub(super) fn check_origin<B>(&self, request: &Request<B>) -> Result<(), Box<Response<Body>>> {
        if request.headers().get_all(header::HOST).iter().nth(1).is_some() {
            return Err(Box::new(plain(StatusCode::BAD_REQUEST, "more than one Host header\n")));
        }
        let Self::Tcp { origins, .. } = self else { return Ok(()) };
        let host = match request.uri().authority() {
            Some(authority) => Some(authority.clone()),
            None => request
                .headers()
                .get(header::HOST)
                .and_then(|host| host.to_str().ok())
                .and_then(|host| host.parse::<Authority>().ok()),
        };
        let ours = host.filter(|host| LOOPBACK.iter().any(|ours| host.host().eq_ignore_ascii_case(ours)));
        let Some(ours) = ours else {
            return Err(Box::new(plain(StatusCode::FORBIDDEN, "host name not served; use localhost\n")));
        };
        let own_origin = format!("http://{ours}");
        for origin in request.headers().get_all(header::ORIGIN) {
            let mut allowed = origins.iter().chain([&own_origin]);
            if !allowed.any(|allowed| allowed.as_bytes().eq_ignore_ascii_case(origin.as_bytes())) {
                let text = "origin not allowed; add it to `http_origins`\n";
                return Err(Box::new(plain(StatusCode::FORBIDDEN, text)));
            }
        }
        Ok(())
    }

    /// The caller: by the token of the request, which `authenticate` knows if it is none of the door's own; without one, `peer`, if
    /// the door identifies callers by connection. `None` if the token is missing or wrong.
    pub(super) fn identify<B>(
        &self,
        request: &Request<B>,
        peer: Option<&Caller>,
        authenticate: impl FnOnce(&str) -> Option<Caller>,
    ) -> Option<Caller> {
        if !request.headers().contains_key(header::AUTHORIZATION) {
            return peer.cloned();
        }
        let given = given(request)?;
        match self {
            Self::Tcp { token, .. } if same_secret(given.as_bytes(), token.as_bytes()) => {
                Some(Caller::owner(TOKEN_OWNER))
            }
            Self::Tcp { .. } | Self::Unix => authenticate(given),
        }
    }
}

/// The answer to a request whose token is missing or wrong.
pub(super) fn unauthorized(is_too_many: bool) -> Response<Body> {
    if is_too_many {
        let mut refusal =
            plain(StatusCode::TOO_MANY_REQUESTS, "too many wrong bearer tokens; try again later\n");
        refusal.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        return refusal;
    }
    let mut refusal = plain(StatusCode::UNAUTHORIZED, "the bearer token is missing or wrong\n");
    refusal.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    refusal
}

/// The only token that a request gives.
pub(super) fn given<B>(request: &Request<B>) -> Option<&str> {
    let mut given = request.headers().get_all(header::AUTHORIZATION).iter();
    match (given.next(), given.next()) {
        (Some(value), None) => bearer(value.as_bytes()),
        (None | Some(_), _) => None,
    }
}

/// The token in a header.
fn bearer(value: &[u8]) -> Option<&str> {
    let (scheme, given) = value.split_at_checked(7)?;
    let given = scheme.eq_ignore_ascii_case(b"bearer ").then_some(given)?;
    std::str::from_utf8(given).ok()
}

/// Why the token is not available.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Its file could not be read or made.
    #[error("use the token file {file}")]
    Io {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Other users can read it.
    #[error("the token file {file} may be read by others: chmod 600 {file}")]
    Exposed {
        /// The file.
        file: String,
    },
    /// It contains no token.
    #[error("the token file {file} holds no token of at least 32 characters: delete it to get a new one")]
    Malformed {
        /// The file.
        file: String,
    },
}

/// Reads the token of a state directory. It is made on first use, readable only by this user.
pub fn load_token(state_dir: &Path) -> Result<Arc<str>, TokenError> {
    let path = state_dir.join(TOKEN_NAME);
    let file = path.display().to_string();
    let failed = |source| TokenError::Io { file: file.clone(), source };
    match fs_err::metadata(&path) {
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => {
            return Err(TokenError::Exposed { file });
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let mut bytes = [0; 32];
            rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
                .map_err(|e| failed(e.into()))?;
            let token = data_encoding::HEXLOWER.encode(&bytes);
            let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            made.and_then(|mut made| writeln!(made, "{token}")).map_err(failed)?;
        }
        Err(e) => return Err(failed(e)),
    }
    let text = fs_err::read_to_string(&path).map_err(failed)?;
    let token = text.trim();
    if token.len() < 32 || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(TokenError::Malformed { file });
    }
    Ok(token.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door() -> Door {
        Door::Tcp { token: "t".repeat(32).into(), origins: vec!["http://localhost:6274".to_owned()].into() }
    }

    fn request(headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().uri("/mcp");
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    #[test]
    fn web_pages_stay_outside() {
        let door = door();
        for host in ["localhost:9600", "127.0.0.1:9600", "[::1]:9600", "LOCALHOST"] {
            assert!(door.check_origin(&request(&[("host", host)])).is_ok(), "{host}");
        }
        for host in ["evil.example:9600", "127.0.0.1.evil.example", "", "localhost:9600@evil.example"] {
            assert!(door.check_origin(&request(&[("host", host)])).is_err(), "{host}");
        }
        assert!(door.check_origin(&request(&[])).is_err());
        let two = request(&[("host", "localhost"), ("host", "localhost")]);
        for door in [&door, &Door::Unix] {
            assert_eq!(door.check_origin(&two).unwrap_err().status(), StatusCode::BAD_REQUEST);
        }
        let ours = ("host", "localhost:9600");
        for origin in ["http://localhost:6274", "http://localhost:9600"] {
            assert!(door.check_origin(&request(&[ours, ("origin", origin)])).is_ok(), "{origin}");
        }
        for origin in ["http://evil.example", "null", "https://localhost:9600", "http://localhost:9601"] {
            assert!(door.check_origin(&request(&[ours, ("origin", origin)])).is_err(), "{origin}");
        }
    }

    #[test]
    fn only_the_whole_token_opens() {
        let door = door();
        let good = format!("Bearer {}", "t".repeat(32));
        let identify = |headers: &[(&str, &str)]| door.identify(&request(headers), None, |_| None);
        assert_eq!(&*identify(&[("authorization", &good)]).unwrap().owner, TOKEN_OWNER);
        assert!(identify(&[("authorization", &good), ("authorization", &good)]).is_none());
        for bad in
            ["", "Bearer ", "Bearer t", &good[..20], &format!("{good}t"), &good.replace("Bearer", "Basic")]
        {
            assert!(identify(&[("authorization", bad)]).is_none(), "{bad}");
        }
        assert!(identify(&[]).is_none());
        // A peer of the Unix socket that gives a token is judged by that.
        let peer = Caller::owner("uid:7");
        let known = |secret: &str| (secret == "x").then(|| Caller::owner("token:x"));
        let identify = |headers: &[(&str, &str)]| Door::Unix.identify(&request(headers), Some(&peer), known);
        assert_eq!(&*identify(&[]).unwrap().owner, "uid:7");
        assert_eq!(&*identify(&[("authorization", "Bearer x")]).unwrap().owner, "token:x");
        assert!(identify(&[("authorization", "Bearer y")]).is_none());
    }

    #[test]
    fn a_token_is_made_once_and_kept_secret() {
        let temp = tempfile::tempdir().unwrap();
        let token = load_token(temp.path()).unwrap();
        assert_eq!(token.len(), 64);
        assert_eq!(load_token(temp.path()).unwrap(), token);
        let path = temp.path().join(TOKEN_NAME);
        assert_eq!(fs_err::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load_token(temp.path()), Err(TokenError::Exposed { .. })));
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        fs_err::write(&path, "short\n").unwrap();
        assert!(matches!(load_token(temp.path()), Err(TokenError::Malformed { .. })));
    }
}
