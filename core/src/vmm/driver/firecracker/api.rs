//! A client of Firecracker's API: one HTTP/1.1 exchange per connection to its Unix socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::WHAT;
use super::requests::Request;
use crate::vmm::driver::{DriverError, REQUEST};

/// Maximum size of an answer with its head, in bytes.
const ANSWER_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 32;

/// The API of one firecracker.
#[derive(Debug)]
pub(super) struct Api {
    socket: PathBuf,
}

/// One answer.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    body: Value,
}

impl Api {
    /// Returns a client of the API at a socket, whose path must be short.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.socket)
    }

    /// Sends a request and checks that it succeeded.
    pub(super) fn send(&self, request: &Request) -> Result<(), DriverError> {
        self.send_within(request, REQUEST)
    }

    /// The same for a request that may take longer.
    pub(super) fn send_within(&self, request: &Request, limit: Duration) -> Result<(), DriverError> {
        self.exchange(request.method, &request.path, Some(&request.body), limit).map(drop)
    }

    /// Sends a GET request and returns the answer's body.
    pub(super) fn get(&self, path: &str) -> Result<Value, DriverError> {
        self.exchange("GET", path, None, REQUEST)
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Value, DriverError> {
        let request = format!("{method} {path}");
        let answer = self.connect().and_then(|stream| talk(stream, &request, body, limit));
        match answer {
            Ok(Answer { status: 200..=299, body }) => Ok(body),
            Ok(Answer { status, body }) => {
                let fault = body.get("fault_message").and_then(Value::as_str).map(str::to_owned);
                let message = fault.unwrap_or_else(|| format!("HTTP status {status}"));
                Err(DriverError::Refused { what: WHAT, request, message })
            }
            Err(source) => Err(DriverError::Unanswered { what: WHAT, request, source }),
        }
    }
}

fn talk(mut stream: UnixStream, request: &str, body: Option<&Value>, limit: Duration) -> io::Result<Answer> {
    let deadline = Instant::now() + limit;
    stream.set_write_timeout(Some(REQUEST))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
    };
    let text =
        format!("{request} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{head}\r\n{body}");
    stream.write_all(text.as_bytes())?;
    let mut received = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => received.extend_from_slice(&chunk[..read]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        }
        if let Some(answer) = parse(&received)? {
            return Ok(answer);
        }
        if received.len() > ANSWER_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
        }
    }
}

/// Parses an answer; `None` if it is incomplete.
fn parse(received: &[u8]) -> io::Result<Option<Answer>> {
    let garbled = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(received).map_err(|e| garbled(e.to_string()))? {
        httparse::Status::Complete(head) => head,
        httparse::Status::Partial => return Ok(None),
    };
    let status = response.code.ok_or_else(|| garbled("no status".to_owned()))?;
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = match length {
        // Firecracker sends the length of every body.
        None => 0,
        Some(header) => {
            let text = std::str::from_utf8(header.value).unwrap_or_default();
            text.trim().parse().map_err(|_| garbled(format!("a length of {text}")))?
        }
    };
    let body = &received[head..];
    if body.len() < length {
        return Ok(None);
    }
    // The body of a success without content is empty. A body that is not JSON is ignored.
    let body = serde_json::from_slice(&body[..length]).unwrap_or_default();
    Ok(Some(Answer { status, body }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const FAULT: &[u8] = b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n\
        Content-Length: 22\r\n\r\n{\"fault_message\":\"no\"}";

    #[test]
    fn answers_are_taken_once_they_are_whole() {
        let none = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        assert_eq!(parse(none).unwrap(), Some(Answer { status: 204, body: Value::Null }));
        for cut in 0..FAULT.len() {
            assert_eq!(parse(&FAULT[..cut]).unwrap(), None, "{cut}");
        }
        assert_eq!(
            parse(FAULT).unwrap(),
            Some(Answer { status: 400, body: json!({ "fault_message": "no" }) })
        );
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n").is_err());
        assert!(parse(b"SSH-2.0-OpenSSH\r\n").is_err());
    }

    #[test]
    fn refusals_and_silence_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("a.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            for answer in [FAULT, b"", b"HTTP/1.1 500 \r\n\r\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).unwrap();
                stream.write_all(answer).unwrap();
            }
        });
        let api = Api::new(socket);
        let request = super::super::requests::action("InstanceStart");
        let errors = [(); 3].map(|()| api.send(&request).unwrap_err().to_string());
        assert_eq!(
            errors,
            [
                "firecracker refused PUT /actions: no",
                "firecracker did not answer PUT /actions",
                "firecracker refused PUT /actions: HTTP status 500",
            ]
        );
        server.join().unwrap();
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
