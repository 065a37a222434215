//! The proxy of the daemon's environment (`https_proxy` and the like), through which guests' connections go.
//!
//! The policy decides first, as without it. Every connection is a tunnel (CONNECT), plain HTTP too: a guest's own requests to the proxy could lead
//! anywhere.

use std::io;
use std::time::Duration;

use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use nexus_schema::egress::{EgressError, EgressFailure, EgressKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::Environment;

/// Timeout for the proxy and its answer.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum length of the head of an answer, in bytes.
const HEAD_MAX: usize = 8 << 10;

/// The configured proxy.
#[derive(Debug)]
pub(crate) struct Upstream(Matcher);

impl Upstream {
    /// Returns the proxy that these variables name; `None` if they name none. Lower case wins.
    pub(crate) fn of(environment: &Environment) -> Option<Self> {
        let get = |name: &str| {
            let value = environment.get(name).or_else(|| environment.get(&name.to_ascii_uppercase()));
            value.and_then(|value| value.to_str()).filter(|value| !value.is_empty()).map(str::to_owned)
        };
        let [http, https, all] = ["http_proxy", "https_proxy", "all_proxy"].map(get);
        if http.is_none() && https.is_none() && all.is_none() {
            return None;
        }
        let matcher = Matcher::builder()
            .http(http.unwrap_or_default())
            .https(https.unwrap_or_default())
            .all(all.unwrap_or_default())
            .no(get("no_proxy").unwrap_or_default());
        Some(Self(matcher.build()))
    }

    /// Returns the proxy for a host; `None`: connect directly.
    pub(super) fn via(&self, host: &str, port: u16, how: EgressKind) -> Option<Via> {
        let authority = authority(host, port);
        let scheme = if how == EgressKind::Http { "http" } else { "https" };
        let uri = format!("{scheme}://{authority}/").parse().ok()?;
        Some(Via { proxy: self.0.intercept(&uri)?, authority })
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A connection through the proxy.
#[derive(Debug)]
pub(super) struct Via {
    proxy: Intercept,
    authority: String,
}

impl Via {
    /// Opens a tunnel.
    pub(super) async fn connect(&self) -> Result<TcpStream, EgressError> {
        // The guest need not know where the proxy is.
        let failed = |failure, why: String| {
            EgressError::new(
                failure,
                format!("connect to {} through the host's proxy: {why}", self.authority),
            )
        };
        match timeout(TIMEOUT, self.tunnel()).await {
            Err(_) => Err(failed(EgressFailure::Timeout, "no answer".to_owned())),
            Ok(Err(error)) => Err(failed(EgressFailure::Failed, error.to_string())),
            Ok(Ok((stream, 200..=299))) => Ok(stream),
            Ok(Ok((_, status))) => Err(failed(
                EgressFailure::Refused,
                format!("the proxy refuses the tunnel with status {status}"),
            )),
        }
    }

    async fn tunnel(&self) -> io::Result<(TcpStream, u16)> {
        let uri = self.proxy.uri();
        if uri.scheme_str() != Some("http") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "only http:// proxies are supported"));
        }
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let mut stream = TcpStream::connect((host, uri.port_u16().unwrap_or(80))).await?;
        let _ = stream.set_nodelay(true);
        let mut request = format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n", self.authority).into_bytes();
        if let Some(credentials) = self.proxy.basic_auth() {
            request.extend(b"Proxy-Authorization: ");
            request.extend(credentials.as_bytes());
            request.extend(b"\r\n");
        }
        request.extend(b"\r\n");
        stream.write_all(&request).await?;
        // Byte by byte: what follows the head belongs to the tunnel.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= HEAD_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its answer is too long"));
            }
            head.push(stream.read_u8().await?);
        }
        let line = String::from_utf8_lossy(&head);
        let status = line.split_whitespace().nth(1).and_then(|status| status.parse().ok());
        let status = status.filter(|_| head.starts_with(b"HTTP/1."));
        let status =
            status.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its answer is not HTTP"))?;
        Ok((stream, status))
    }
}
