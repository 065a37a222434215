//! HTTP: CONNECT, and plain requests with absolute URLs, one per connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nexus_schema::egress::{EgressError, EgressFailure, EgressKind};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::oneshot;

use super::serve::{Program, open};
use crate::agent::{Agent, OfProgram};

/// The initial room for a request's head, in bytes.
const HEAD: usize = 4 << 10;
/// The maximum size of a request's head, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// The maximum number of header fields of a request.
const FIELDS_MAX: usize = 128;

/// A program's request.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    host: String,
    port: u16,
    /// The head to send to the destination; `None` if the program wants a tunnel.
    head: Option<Vec<u8>>,
    /// How many of the following bytes belong to the request; `None`: all of them.
    body: Option<u64>,
    /// Bytes that were received together with the head, after it.
    behind: Vec<u8>,
}

/// Reads a program's request. The inner error is the refusal to send if the request is not supported.
pub(super) async fn ask(program: &mut Program, first: u8) -> io::Result<Result<Request, Vec<u8>>> {
    let mut head = Vec::with_capacity(HEAD);
    head.push(first);
    loop {
        match parse(&head) {
            Ok(Some(request)) => return Ok(Ok(request)),
            Ok(None) if head.len() < HEAD_MAX => {}
            Ok(None) => {
                return Ok(Err(refusal(431, "Request Header Fields Too Large", "the head is too long")));
            }
            Err((status, phrase, why)) => return Ok(Err(refusal(status, phrase, why))),
        }
        if program.read.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

type Wrong = (u16, &'static str, &'static str);

/// Parses a head; `None` if it is not complete yet.
fn parse(bytes: &[u8]) -> Result<Option<Request>, Wrong> {
    const BAD: (u16, &str) = (400, "Bad Request");
    let bad = |why| (BAD.0, BAD.1, why);
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(bad("this is not HTTP or SOCKS5")),
    };
    let (Some(method), Some(path), Some(version)) = (request.method, request.path, request.version) else {
        return Err(bad("the request line is missing"));
    };
    let behind = bytes[length..].to_vec();
    if method == "CONNECT" {
        let (host, port) = authority(path, None).ok_or(bad("CONNECT needs a host and a port"))?;
        return Ok(Some(Request { host, port, head: None, body: None, behind }));
    }
    let Some(rest) = strip_scheme(path, "http://") else {
        return Err(match strip_scheme(path, "https://") {
            Some(_) => bad("use CONNECT for https"),
            None if path.contains("://") => {
                (501, "Not Implemented", "this proxy supports only http and https")
            }
            None => bad("this is a proxy: use an absolute URL, or CONNECT"),
        });
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (at, path) = rest.split_at(end);
    let at = at.rsplit_once('@').map_or(at, |(_, at)| at);
    let (host, port) = authority(at, Some(80)).ok_or(bad("the address has no host"))?;
    let path = path.split('#').next().unwrap_or_default();
    let slash = if path.starts_with('/') { "" } else { "/" };
    // The URL alone says where to, also if there is another Host (RFC 9112, 3.2.2).
    let mut head = format!("{method} {slash}{path} HTTP/1.{version}\r\nHost: {at}\r\n").into_bytes();
    let of_hop = named_by_connection(request.headers);
    let (mut lengths, mut is_chunked) = (Vec::new(), false);
    for field in request.headers.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        let starts_proxy = field.name.get(..6).is_some_and(|start| start.eq_ignore_ascii_case("proxy-"));
        if is("transfer-encoding") {
            is_chunked = true;
        } else if is("content-length") {
            let length =
                std::str::from_utf8(field.value).ok().and_then(|text| text.trim().parse::<u64>().ok());
            lengths.push(length.ok_or(bad("its Content-Length is invalid"))?);
        } else if starts_proxy
            || ["host", "connection", "keep-alive", "upgrade", "te"].into_iter().any(is)
            || of_hop.iter().any(|name| name.eq_ignore_ascii_case(field.name.as_bytes()))
        {
            continue;
        }
        head.extend_from_slice(field.name.as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(field.value);
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"Connection: close\r\n\r\n");
    let body = match (is_chunked, lengths.as_slice()) {
        (true, []) => None,
        (false, []) => Some(0),
        (false, [length]) => Some(*length),
        _ => return Err(bad("its length is given more than once")),
    };
    Ok(Some(Request { host, port, head: Some(head), body, behind }))
}

/// Returns the names of the fields that are for this connection alone: those that Connection lists.
fn named_by_connection<'a>(fields: &[httparse::Header<'a>]) -> Vec<&'a [u8]> {
    let listing = fields.iter().filter(|field| field.name.eq_ignore_ascii_case("connection"));
    listing.flat_map(|field| field.value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii).collect()
}

fn strip_scheme<'a>(path: &'a str, scheme: &str) -> Option<&'a str> {
    let start = path.get(..scheme.len())?;
    start.eq_ignore_ascii_case(scheme).then(|| &path[scheme.len()..])
}

/// Parses host and port of `example.org:443` or `[::1]:443`.
fn authority(text: &str, default: Option<u16>) -> Option<(String, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, behind) = rest.split_once(']')?;
            (host, if behind.is_empty() { None } else { Some(behind.strip_prefix(':')?) })
        }
        None => match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = match port.filter(|port| !port.is_empty()) {
        Some(port) => port.parse().ok()?,
        None => default?,
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// Makes the connection and forwards it.
pub(super) async fn serve(agent: &Agent, mut program: Program, request: Request) -> io::Result<()> {
    let Request { host, port, head, body, behind } = request;
    let how = if head.is_none() { EgressKind::Connect } else { EgressKind::Http };
    let made = match open(agent, &host, port, how).await {
        Ok(made) => made,
        Err(error) => return program.dismiss(&denial(&host, port, &error)).await,
    };
    let carried = match head {
        None => {
            program.write.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
            let mut read = behind.as_slice().chain(OfProgram::new(&mut program.read));
            made.carry(&mut read, &mut program.write).await
        }
        Some(head) => {
            let (ended, until) = oneshot::channel();
            let own = body.map_or(usize::MAX, |body| usize::try_from(body).unwrap_or(usize::MAX));
            let early = &behind[..behind.len().min(own)];
            let left = body.map(|body| body - early.len() as u64);
            let rest = Body { read: OfProgram::new(&mut program.read), left, until, is_deaf: false };
            let mut read = head.as_slice().chain(early).chain(rest);
            let mut write = Answer { write: &mut program.write, ended: Some(ended) };
            made.carry(&mut read, &mut write).await
        }
    };
    if carried.is_err() {
        program.reset();
    }
    Ok(())
}

/// What a program sends after a head: the request's body, and then nothing until the answer has ended or the program is gone. Another request on the
/// same connection could be for another machine, so it is ignored.
struct Body<R> {
    read: R,
    left: Option<u64>,
    until: oneshot::Receiver<()>,
    /// Whether the program sent more than the request, which is ignored.
    is_deaf: bool,
}

impl<R: AsyncRead + Unpin> AsyncRead for Body<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = self.left.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        if left > 0 {
            let most = left.min(buf.remaining());
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
            ready!(Pin::new(&mut self.read).poll_read(cx, &mut part))?;
            let read = part.filled().len();
            buf.advance(read);
            if let Some(left) = &mut self.left {
                *left -= read as u64;
            }
            return Poll::Ready(Ok(()));
        }
        if Pin::new(&mut self.until).poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if !self.is_deaf {
            let mut more = [0; 1];
            let mut more = ReadBuf::new(&mut more);
            ready!(Pin::new(&mut self.read).poll_read(cx, &mut more))?;
            if more.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.is_deaf = true;
        }
        Poll::Pending
    }
}

/// The writing side of the program's connection. Signals `ended` when the answer has ended.
struct Answer<W> {
    write: W,
    ended: Option<oneshot::Sender<()>>,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Answer<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.write).poll_shutdown(cx))?;
        if let Some(ended) = self.ended.take() {
            // The receiver may be gone.
            let _ = ended.send(());
        }
        Poll::Ready(Ok(()))
    }
}

/// Returns the answer if the host makes no connection.
fn denial(host: &str, port: u16, error: &EgressError) -> Vec<u8> {
    let (status, phrase, word) = match error.failure {
        EgressFailure::Denied => (403, "Forbidden by policy", "denied by policy"),
        EgressFailure::Invalid => (400, "Bad Request", "invalid"),
        EgressFailure::NoSuchName => (502, "Bad Gateway", "no such name"),
        EgressFailure::Refused => (502, "Bad Gateway", "connection refused"),
        EgressFailure::Unreachable => (502, "Bad Gateway", "unreachable"),
        EgressFailure::Timeout => (504, "Gateway Timeout", "timeout"),
        EgressFailure::Failed => (502, "Bad Gateway", "failed"),
    };
    let body = json!({
        "error": word,
        "reason": error.reason,
        "host": host,
        "port": port,
        "message": error.message,
        "hint": error.hint,
    });
    answer(status, phrase, &body.to_string())
}

fn refusal(status: u16, phrase: &str, why: &str) -> Vec<u8> {
    answer(status, phrase, &json!({ "error": why }).to_string())
}

fn answer(status: u16, phrase: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}\n",
        body.len() + 1
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        parse(text.as_bytes()).unwrap_or_else(|wrong| panic!("{text}: {wrong:?}")).expect("a whole head")
    }

    #[test]
    fn connect_is_a_tunnel() {
        for (text, host, port) in [
            ("CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", "example.org", 443),
            ("CONNECT example.org:443 HTTP/1.0\r\n\r\n", "example.org", 443),
            ("CONNECT [::1]:8443 HTTP/1.1\r\n\r\n", "::1", 8443),
        ] {
            let made = request(text);
            assert_eq!((made.host.as_str(), made.port, made.head, made.body), (host, port, None, None));
        }
        assert_eq!(request("CONNECT a:1 HTTP/1.1\r\n\r\nearly").behind, b"early");
    }

    #[test]
    fn plain_requests_are_made_what_the_other_machine_expects() {
        let made = request(
            "GET http://me:pw@Example.org:8080/a?b#c HTTP/1.1\r\nHost: example.org:8080\r\nProxy-Connection: keep-alive\r\n\
             Connection: keep-alive\r\nProxy-Authorization: x\r\nAccept: */*\r\n\r\n",
        );
        assert_eq!((made.host.as_str(), made.port, made.body), ("Example.org", 8080, Some(0)));
        let head = String::from_utf8(made.head.unwrap()).unwrap();
        assert_eq!(
            head,
            "GET /a?b HTTP/1.1\r\nHost: Example.org:8080\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        );
        let made = request("GET http://example.org HTTP/1.0\r\n\r\n");
        let head = String::from_utf8(made.head.unwrap()).unwrap();
        assert_eq!(
            (made.port, head.as_str()),
            (80, "GET / HTTP/1.0\r\nHost: example.org\r\nConnection: close\r\n\r\n")
        );
        let made = request("HEAD http://[::1]?x HTTP/1.1\r\nHost: [::1]\r\n\r\n");
        assert_eq!((made.host.as_str(), made.port), ("::1", 80));
        assert!(made.head.unwrap().starts_with(b"HEAD /?x HTTP/1.1\r\n"));
        let made = request("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
        assert_eq!((made.body, made.behind.as_slice()), (Some(5), &b"hello"[..]));
        assert_eq!(request("POST http://a/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").body, None);
    }

    #[test]
    fn other_machines_get_the_host_of_the_url_and_nothing_of_the_hop() {
        let made = request(
            "GET http://a.example/ HTTP/1.1\r\nHost: b.example\r\nhost: c.example\r\nX-Hop: 1\r\nX-End: 2\r\n\
             Connection: x-hop , close,Content-Length\r\nContent-Length: 3\r\n\r\nabc",
        );
        assert_eq!((made.host.as_str(), made.body), ("a.example", Some(3)));
        assert_eq!(
            String::from_utf8(made.head.unwrap()).unwrap(),
            "GET / HTTP/1.1\r\nHost: a.example\r\nX-End: 2\r\nContent-Length: 3\r\nConnection: close\r\n\r\n",
            "the length stays, whatever Connection says: it is what the body is told by"
        );
        // What a browser shows as one host and connects to another is one host here.
        for (url, host) in [
            ("http://a.example@b.example/", "b.example"),
            ("http://a.example:80@b.example:80/", "b.example"),
            ("http://a.example#@b.example/", "a.example"),
            ("http://a.example?@b.example/", "a.example"),
            ("http://a.example/@b.example", "a.example"),
        ] {
            let made = request(&format!("GET {url} HTTP/1.1\r\n\r\n"));
            let head = String::from_utf8(made.head.unwrap()).unwrap();
            assert_eq!(made.host, host, "{url}");
            assert!(
                head.contains(&format!("\r\nHost: {host}")) && !head.contains("\r\nHost: a.example@"),
                "{head}"
            );
        }
    }

    #[test]
    fn what_is_no_request_to_a_proxy_is_refused() {
        for (text, status) in [
            ("\0\0\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET https://a/ HTTP/1.1\r\n\r\n", 400),
            ("GET ftp://a/ HTTP/1.1\r\n\r\n", 501),
            ("GET http:/// HTTP/1.1\r\n\r\n", 400),
            ("CONNECT a HTTP/1.1\r\n\r\n", 400),
            ("CONNECT a:99999 HTTP/1.1\r\n\r\n", 400),
            ("CONNECT :1 HTTP/1.1\r\n\r\n", 400),
            ("POST http://a/ HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
            ("POST http://a/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
            ("POST http://a/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ] {
            let (given, ..) = parse(text.as_bytes()).expect_err(text);
            assert_eq!(given, status, "{text}");
        }
        assert_eq!(parse(b"GET http://a/ HTTP/1.1\r\nHost"), Ok(None));
    }
}
