//! A collector, and a request to it.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a collector may take for one batch.
const PATIENCE: Duration = Duration::from_secs(10);
/// The path of traces behind the configured address.
const TRACES: &str = "/v1/traces";
/// The port of OTLP over HTTP.
const PORT: u16 = 4318;

/// A collector of OpenTelemetry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector {
    host: String,
    port: u16,
    path: String,
}

impl Collector {
    /// Reads an address such as `http://127.0.0.1:4318`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri =
            text.parse().map_err(|_| format!("`{text}` is not an address such as http://127.0.0.1:4318"))?;
        if uri.scheme_str() != Some("http") {
            return Err(format!(
                "`{text}` does not begin with http://: use a collector on this host, which forwards by TLS"
            ));
        }
        let host = uri.host().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| format!("`{text}` names no host"))?;
        if uri.query().is_some() || uri.authority().is_some_and(|authority| authority.as_str().contains('@'))
        {
            return Err(format!("`{text}` has more than a host, a port and a path"));
        }
        let path = uri.path().trim_end_matches('/');
        let path = if path.ends_with(TRACES) { path.to_owned() } else { format!("{path}{TRACES}") };
        Ok(Self { host: host.to_owned(), port: uri.port_u16().unwrap_or(PORT), path })
    }

    /// Sends a request for export; why it was not taken, if it was not.
    pub(super) async fn post(&self, body: String) -> Result<(), String> {
        match timeout(PATIENCE, self.exchange(body)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        }
    }

    async fn exchange(&self, body: String) -> Result<(), String> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, self.port)).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let request = Request::post(&self.path)
            .header(header::HOST, format!("{}:{}", self.host, self.port))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("nexusd/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| error.to_string())?;
        // The connection ends once nothing is left of what uses it.
        let answer = async move { sender.send_request(request).await.map(|response| response.status()) };
        let (status, _) = tokio::join!(answer, connection);
        match status {
            Ok(status) if status.is_success() => Ok(()),
            Ok(status) => Err(format!("it answers {status}")),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}{}", self.host, self.port, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_exporters() {
        for (text, whole) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://localhost", "http://localhost:4318/v1/traces"),
            ("http://[::1]:1/otlp/", "http://[::1]:1/otlp/v1/traces"),
            ("http://a:1/v1/traces", "http://a:1/v1/traces"),
        ] {
            assert_eq!(Collector::parse(text).unwrap().to_string(), whole);
        }
        for text in [
            "",
            "localhost:4318",
            "https://a",
            "http://",
            "http://user:secret@a",
            "http://a/?x=1",
            "grpc://a",
        ] {
            assert!(Collector::parse(text).is_err(), "{text}");
        }
    }
}
