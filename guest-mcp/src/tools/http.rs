//! `http_request`: HTTP/1 to a server on this system's loopback only.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use nexus_schema::ToolError;
use nexus_schema::error::{ErrorCode, chain};
use nexus_schema::limits::{FILE_WRITE_MAX, OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::http::{HttpRequest, HttpRequestOutput, HttpRequestParams};
use tokio::net::TcpStream;

use super::text::{decode, incomplete_end, shown};
use super::{Block, Call, Reply, Run, cancelled, human_bytes};
use crate::os::with_errno;

/// The maximum size of a body that is shown as base64, in bytes.
const BASE64_MAX: u64 = 256 << 10;
/// The maximum total size of the headers in a result, in bytes.
const HEADERS_MAX: usize = 16 << 10;
/// The maximum size of a response's head, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// The default timeout of a request, in seconds.
const TIMEOUT_DEFAULT: f64 = 30.0;
/// The maximum timeout of a request, in seconds.
const TIMEOUT_MAX: f64 = 45.0;

impl Run for HttpRequest {
    async fn run(call: Call, params: HttpRequestParams) -> Result<Reply<HttpRequestOutput>, ToolError> {
        let (target, request) = prepare(&params)?;
        let encoding = params.encoding.unwrap_or_default();
        let most = match encoding {
            ContentEncoding::Text => OUTPUT_MAX,
            ContentEncoding::Base64 => BASE64_MAX,
        };
        let limit = params.limit.unwrap_or(OUTPUT_DEFAULT);
        if limit == 0 {
            return Err(ToolError::invalid("limit must be at least 1"));
        }
        let timeout = params.timeout_s.unwrap_or(TIMEOUT_DEFAULT);
        if !(0.0..=TIMEOUT_MAX).contains(&timeout) {
            return Err(ToolError::invalid(format!("timeout_s must be 0 to {TIMEOUT_MAX}")));
        }
        let asked = format!("{} {}", request.method(), shown(&params.url));
        let start = Instant::now();
        let answered = tokio::select! {
            answered = tokio::time::timeout(
                Duration::from_secs_f64(timeout),
                send(&target, request, limit.min(most) as usize),
            ) => answered,
            () = call.cancel.cancelled() => return Err(cancelled()),
        };
        let answer = match answered {
            Ok(answer) => answer.map_err(|what| what.told(&asked))?,
            Err(_) => {
                let text = format!("{asked}: no complete answer within {timeout} s");
                return Err(ToolError::new(ErrorCode::Timeout, text));
            }
        };
        Ok(reply(&asked, answer, encoding, start.elapsed()))
    }
}

/// The address of a server.
struct Target {
    addresses: Vec<IpAddr>,
    port: u16,
}

fn prepare(params: &HttpRequestParams) -> Result<(Target, Request<Full<Bytes>>), ToolError> {
    let (uri, target) = parse_url(&params.url)?;
    let body = match &params.body {
        Some(body) => params.body_encoding.unwrap_or_default().decode(body.clone()),
        None => Ok(Vec::new()),
    };
    let body = body.map_err(|error| ToolError::invalid(format!("body: {error}")))?;
    if body.len() as u64 > FILE_WRITE_MAX {
        let text = format!("body has {} bytes, at most {FILE_WRITE_MAX} are allowed", body.len());
        return Err(ToolError::new(ErrorCode::TooLarge, text));
    }
    let method = match params.method.as_deref() {
        None => {
            if params.body.is_some() {
                Method::POST
            } else {
                Method::GET
            }
        }
        Some(name) => Method::from_bytes(name.to_ascii_uppercase().as_bytes())
            .ok()
            .filter(|method| *method != Method::CONNECT)
            .ok_or_else(|| ToolError::invalid(format!("`{}` is not a method", shown(name))))?,
    };
    let mut headers = HeaderMap::new();
    for (name, value) in &params.headers {
        let wrong = || ToolError::invalid(format!("`{}` cannot be a header", shown(name)));
        let named = HeaderName::try_from(name.as_str()).map_err(|_| wrong())?;
        headers.insert(named, HeaderValue::try_from(value.as_str()).map_err(|_| wrong())?);
    }
    if !headers.contains_key(HOST)
        && let Some(host) =
            uri.authority().and_then(|authority| HeaderValue::try_from(authority.as_str()).ok())
    {
        headers.insert(HOST, host);
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().map_err(|_| wrong_url(&params.url, "its path is malformed"))?;
    *request.headers_mut() = headers;
    Ok((target, request))
}

fn wrong_url(url: &str, why: &str) -> ToolError {
    let url: String = shown(url).chars().take(200).collect();
    ToolError::invalid(format!("url `{url}`: {why}")).hint("use the form http://localhost:8080/path")
}

/// Parses a URL on the loopback: `http://HOST:PORT/PATH`, where scheme and host are optional.
fn parse_url(url: &str) -> Result<(Uri, Target), ToolError> {
    let whole = match url {
        port if port.starts_with(':') => format!("http://127.0.0.1{port}"),
        whole if whole.contains("://") => whole.to_owned(),
        bare => format!("http://{bare}"),
    };
    let uri: Uri = whole.parse().map_err(|_| wrong_url(url, "it is malformed"))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong_url(url, "only plain http is supported, without TLS"));
    }
    let host = uri.host().unwrap_or_default();
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let addresses = match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(address) if address.is_loopback() => vec![address],
        Err(_) if host.eq_ignore_ascii_case("localhost") => vec![v4, v6],
        _ => return Err(wrong_url(url, "its host is not the VM's loopback")),
    };
    let has_port = uri.authority().is_some_and(|authority| {
        authority.as_str().rsplit('@').next().is_some_and(|place| place.len() > host.len())
    });
    let port = match (uri.port_u16(), has_port) {
        (Some(port), _) => port,
        (None, false) => 80,
        (None, true) => return Err(wrong_url(url, "its port is invalid")),
    };
    Ok((uri, Target { addresses, port }))
}

/// Why there is no answer.
enum Failure {
    Connect(std::io::Error),
    Http(hyper::Error),
}

impl Failure {
    fn told(self, asked: &str) -> ToolError {
        match self {
            Self::Connect(error) => {
                let text = format!("{asked}: {}", crate::os::reason(&error));
                with_errno(ToolError::new(ErrorCode::RequestFailed, text), &error)
                    .hint("is the server running, and does it listen on this port? see guest_command_list")
            }
            Self::Http(error) => {
                ToolError::new(ErrorCode::RequestFailed, format!("{asked}: {}", chain(&error)))
            }
        }
    }
}

/// A server's answer.
struct Answer {
    response: Response<()>,
    body: Vec<u8>,
    truncated: bool,
}

/// Aborts a task when dropped.
struct Ends(tokio::task::JoinHandle<()>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn send(target: &Target, request: Request<Full<Bytes>>, limit: usize) -> Result<Answer, Failure> {
    let stream = connect(target).await.map_err(Failure::Connect)?;
    let mut builder = hyper::client::conn::http1::Builder::new();
    builder.max_buf_size(HEAD_MAX);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(Failure::Http)?;
    let _connection = Ends(tokio::spawn(async move { drop(connection.await) }));
    let response = sender.send_request(request).await.map_err(Failure::Http)?;
    let (parts, mut incoming) = response.into_parts();
    let (mut body, mut truncated) = (Vec::new(), false);
    while let Some(frame) = incoming.frame().await {
        let Ok(data) = frame.map_err(Failure::Http)?.into_data() else { continue };
        let room = limit - body.len();
        body.extend_from_slice(&data[..data.len().min(room)]);
        if data.len() > room {
            truncated = true;
            break;
        }
    }
    Ok(Answer { response: Response::from_parts(parts, ()), body, truncated })
}

async fn connect(target: &Target) -> std::io::Result<TcpStream> {
    let mut first = None;
    for address in &target.addresses {
        match TcpStream::connect((*address, target.port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| std::io::ErrorKind::AddrNotAvailable.into()))
}

fn reply(asked: &str, answer: Answer, encoding: ContentEncoding, took: Duration) -> Reply<HttpRequestOutput> {
    let Answer { response, mut body, truncated } = answer;
    let (text, lossy) = match encoding {
        ContentEncoding::Base64 => (data_encoding::BASE64.encode(&body), false),
        ContentEncoding::Text => {
            if truncated {
                body.truncate(body.len() - incomplete_end(&body));
            }
            decode(&body)
        }
    };
    let status = response.status();
    let mut header = format!(
        "{asked} · {} {} · {} · {} ms",
        status.as_u16(),
        status.canonical_reason().unwrap_or_default(),
        human_bytes(body.len() as u64),
        took.as_millis()
    );
    if truncated {
        header.push_str(" · the body is cut: give a larger limit");
    }
    let headers = headers(response.headers());
    for name in ["content-type", "location"] {
        if let Some(value) = headers.get(name) {
            header.push_str(&format!("\n{name}: {value}"));
        }
    }
    if lossy {
        header.push_str("\nnot UTF-8, bytes were replaced; encoding base64 gives them exactly");
    }
    let facts = HttpRequestOutput {
        status: status.as_u16(),
        headers,
        body_bytes: body.len() as u64,
        truncated,
        lossy,
        duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    };
    let mut reply = Reply::new(header, facts);
    if !text.is_empty() {
        reply.blocks.push(Block::stream("content", text));
    }
    reply
}

/// Returns the headers as text, as many as fit.
fn headers(all: &HeaderMap) -> BTreeMap<String, String> {
    let (mut kept, mut length) = (BTreeMap::<String, String>::new(), 0);
    for (name, value) in all {
        let value = shown(&decode(value.as_bytes()).0);
        length += name.as_str().len() + value.len();
        if length > HEADERS_MAX {
            break;
        }
        kept.entry(name.as_str().to_owned())
            .and_modify(|joined| {
                joined.push_str(", ");
                joined.push_str(&value);
            })
            .or_insert(value);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_on_the_loopback() {
        let of = |url: &str| {
            parse_url(url).map(|(uri, target)| (uri.path().to_owned(), target.port, target.addresses.len()))
        };
        assert_eq!(of("http://localhost:8080/a?b").unwrap(), ("/a".to_owned(), 8080, 2));
        assert_eq!(of("http://127.0.0.1").unwrap(), ("/".to_owned(), 80, 1));
        assert_eq!(of("http://[::1]:1/x").unwrap(), ("/x".to_owned(), 1, 1));
        assert_eq!(of(":3000/x").unwrap(), ("/x".to_owned(), 3000, 1));
        assert_eq!(of("localhost:3000").unwrap(), ("/".to_owned(), 3000, 2));
        for bad in [
            "",
            "https://localhost/",
            "http://example.com/",
            "http://10.0.0.1/",
            "http://127.0.0.1.example/",
            "http://[::2]/",
            "ftp://localhost/",
            "http://localhost:99999/",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
