//! A small web server on the loopback interface, with or without TLS. It serves given files, and misbehaves on request.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// How to answer a request wrongly.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// With this status and nothing else.
    Status(u16),
    /// With a redirection to another path.
    Redirect(String),
    /// Correctly at first, but the connection is cut after so many bytes of the body.
    CutAfter(usize),
    /// Correctly at first, but nothing more is sent after so many bytes of the body.
    StallAfter(usize),
    /// With the whole file, regardless of the requested range.
    NoRange,
    /// With these bytes instead of the file's, without a length.
    Endless(Vec<u8>),
    /// With this status line and these headers, and nothing else.
    Head(String),
}

/// A request as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) target: String,
    pub(crate) range: Option<String>,
    pub(crate) if_range: Option<String>,
    pub(crate) authorization: Option<String>,
}

impl Request {
    fn header(&mut self, name: &str) -> Option<&mut Option<String>> {
        match name {
            "range" => Some(&mut self.range),
            "if-range" => Some(&mut self.if_range),
            "authorization" => Some(&mut self.authorization),
            _ => None,
        }
    }
}

/// A file, and its entity tag.
#[derive(Clone)]
struct File {
    bytes: Arc<[u8]>,
    tag: String,
}

#[derive(Default)]
struct State {
    files: HashMap<String, File>,
    faults: HashMap<String, VecDeque<Fault>>,
    requests: Vec<Request>,
    connections: usize,
    is_over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A connection.
trait Stream: Read + Write {}

impl<S: Read + Write> Stream for S {}

/// A running server; it stops when dropped.
pub(crate) struct Server {
    scheme: &'static str,
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::serving("http", |stream| Ok(Box::new(stream)))
    }

    /// One that speaks TLS.
    pub(crate) fn start_tls(identity: Arc<ServerConfig>) -> Self {
        Self::serving("https", move |stream| {
            let connection = ServerConnection::new(identity.clone()).map_err(std::io::Error::other)?;
            Ok(Box::new(StreamOwned::new(connection, stream)))
        })
    }

    fn serving(
        scheme: &'static str,
        accept: impl Fn(TcpStream) -> std::io::Result<Box<dyn Stream>> + Clone + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let inner = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut state = inner.state.lock().unwrap();
                if state.is_over {
                    return;
                }
                state.connections += 1;
                drop(state);
                let (inner, accept) = (inner.clone(), accept.clone());
                // A client may disconnect at any time.
                std::thread::spawn(move || accept(stream).and_then(|stream| inner.serve(stream)).ok());
            }
        });
        Self { scheme, address, shared }
    }

    /// The address of a path; the path begins with `/`.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        let bytes: Vec<u8> = bytes.into();
        let tag = format!("\"{}\"", &crate::asset::Sha256::of(&bytes).to_string()[..12]);
        let file = File { bytes: bytes.into(), tag };
        self.shared.state.lock().unwrap().files.insert(path.to_owned(), file);
    }

    pub(crate) fn remove(&self, path: &str) {
        self.shared.state.lock().unwrap().files.remove(path).expect("it was there");
    }

    /// Answers the next requests for a path with these faults, one each.
    pub(crate) fn misbehave(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        self.shared.state.lock().unwrap().faults.entry(path.to_owned()).or_default().extend(faults);
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.state.lock().unwrap().requests.clone()
    }

    /// How many connections were made, with or without a request.
    pub(crate) fn connections(&self) -> usize {
        self.shared.state.lock().unwrap().connections
    }

    /// How often a path was requested.
    pub(crate) fn count(&self, path: &str) -> usize {
        self.requests().iter().filter(|r| r.target == path).count()
    }

    /// Waits until a path was requested.
    pub(crate) fn wait_for(&self, path: &str) {
        self.wait_for_times(path, 1);
    }

    /// Waits until a path was requested this often.
    pub(crate) fn wait_for_times(&self, path: &str, times: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut state = self.shared.state.lock().unwrap();
        while state.requests.iter().filter(|r| r.target == path).count() < times {
            let left = deadline.checked_duration_since(Instant::now()).expect("the request comes in time");
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().is_over = true;
        self.shared.changed.notify_all();
        // Wakes the thread that waits for connections.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn serve(&self, stream: Box<dyn Stream>) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        // A proxy gets full addresses in its requests, a server only paths.
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut request = Request { target: target.clone(), ..Request::default() };
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 || line == "\r\n" {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && let Some(header) = request.header(&name.to_ascii_lowercase())
            {
                *header = Some(value.trim().to_owned());
            }
        }
        let (file, fault) = {
            let mut state = self.state.lock().unwrap();
            state.requests.push(request.clone());
            self.changed.notify_all();
            let fault = state.faults.get_mut(&target).and_then(VecDeque::pop_front);
            (state.files.get(&target).cloned(), fault)
        };
        let mut stream = reader.into_inner();
        self.answer(&mut stream, file, &request, fault)
    }

    fn answer(
        &self,
        stream: &mut dyn Stream,
        file: Option<File>,
        request: &Request,
        fault: Option<Fault>,
    ) -> std::io::Result<()> {
        if let Some(Fault::Head(head)) = &fault {
            return write!(stream, "HTTP/1.1 {head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        let Some(File { bytes: file, tag }) = file else {
            return write!(
                stream,
                "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        };
        match &fault {
            Some(Fault::Status(status)) => {
                return write!(
                    stream,
                    "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
            Some(Fault::Redirect(to)) => {
                return write!(
                    stream,
                    "HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
            Some(Fault::Endless(bytes)) => {
                write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
                loop {
                    stream.write_all(bytes)?;
                }
            }
            _ => {}
        }
        let range = request.range.clone().filter(|_| !matches!(fault, Some(Fault::NoRange)));
        let range = range.filter(|_| request.if_range.as_ref().is_none_or(|wanted| *wanted == tag));
        let from = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        let body = file.get(from.unwrap_or(0)..).unwrap_or_default();
        match from {
            Some(from) if from >= file.len() => {
                return write!(
                    stream,
                    "HTTP/1.1 416 X\r\nContent-Range: bytes */{}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    file.len()
                );
            }
            Some(from) => write!(
                stream,
                "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{}\r\n",
                file.len() - 1,
                file.len()
            )?,
            None => write!(stream, "HTTP/1.1 200 OK\r\n")?,
        }
        write!(stream, "ETag: {tag}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
        match fault {
            Some(Fault::CutAfter(n)) => stream.write_all(&body[..n.min(body.len())]),
            Some(Fault::StallAfter(n)) => {
                stream.write_all(&body[..n.min(body.len())])?;
                let mut state = self.state.lock().unwrap();
                while !state.is_over {
                    state = self.changed.wait(state).unwrap();
                }
                Ok(())
            }
            _ => stream.write_all(body),
        }
    }
}
