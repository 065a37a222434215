//! Clients with minimal work of their own: requests are written as text, answers are not parsed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const INITIALIZE: &str = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"bench","version":"0"}}}"#;
const INITIALIZED: &str = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
/// The timeout for any answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection on which requests are sent one after another.
pub(crate) trait Wire {
    /// Sends a request and waits for its answer.
    fn ask(&mut self, request: &str) -> io::Result<&[u8]>;
}

/// Panics unless an answer is a result, and not a tool's error.
pub(crate) fn check(request: &str, answer: &[u8]) {
    let said = || String::from_utf8_lossy(answer).into_owned();
    assert!(find(answer, b"\"result\"").is_some(), "{request}: {}", said());
    assert!(find(answer, b"\"isError\":true").is_none(), "{request}: {}", said());
}

/// JSON lines.
pub(crate) struct Lines<R, W> {
    read: BufReader<R>,
    write: W,
    line: Vec<u8>,
}

impl<R: Read, W: Write> Lines<R, W> {
    fn open(read: BufReader<R>, write: W) -> io::Result<Self> {
        let mut this = Self { read, write, line: Vec::new() };
        this.ask(INITIALIZE)?;
        this.say(INITIALIZED)?;
        Ok(this)
    }

    fn say(&mut self, message: &str) -> io::Result<()> {
        self.line.clear();
        self.line.extend_from_slice(message.as_bytes());
        self.line.push(b'\n');
        self.write.write_all(&self.line)?;
        self.write.flush()
    }

    fn hear(&mut self) -> io::Result<&[u8]> {
        self.line.clear();
        match self.read.read_until(b'\n', &mut self.line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(&self.line),
        }
    }

    /// Keeps `callers` requests running until `total` were answered; returns the answers per second. `params` are those of
    /// `tools/call`.
    pub(crate) fn ask_together(
        &mut self,
        method: &str,
        params: &str,
        callers: usize,
        total: usize,
    ) -> io::Result<f64> {
        let (mut sent, mut done) = (0, 0);
        let mut requests = String::new();
        let start = Instant::now();
        while done < total {
            requests.clear();
            while sent < total && sent - done < callers {
                sent += 1;
                requests.push_str(&request(sent, method, params));
                requests.push('\n');
            }
            self.write.write_all(requests.as_bytes())?;
            self.write.flush()?;
            // Reads everything that is available, so that this client itself is not measured.
            loop {
                let answer = self.hear()?;
                check(method, answer);
                done += 1;
                if done == sent || self.read.buffer().is_empty() {
                    break;
                }
            }
        }
        Ok(total as f64 / start.elapsed().as_secs_f64())
    }
}

impl<R: Read, W: Write> Wire for Lines<R, W> {
    fn ask(&mut self, request: &str) -> io::Result<&[u8]> {
        self.say(request)?;
        self.hear()
    }
}

/// A request as text.
pub(crate) fn request(id: usize, method: &str, params: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}"#)
}

/// The daemon's upgraded stream.
pub(crate) fn upgraded(socket: &Path) -> io::Result<Lines<UnixStream, UnixStream>> {
    upgraded_at(socket, "/mcp", "")
}

/// The same at another endpoint, with more lines in the head of the request.
pub(crate) fn upgraded_at(
    socket: &Path,
    path: &str,
    lines: &str,
) -> io::Result<Lines<UnixStream, UnixStream>> {
    let mut stream = connect(socket)?;
    let head =
        format!("HTTP/1.1\r\nHost: localhost\r\n{lines}Connection: upgrade\r\nUpgrade: mcp-stream\r\n\r\n");
    stream.write_all(format!("GET {path} {head}").as_bytes())?;
    let mut read = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if read.read_line(&mut head)? == 0 {
            return Err(io::Error::other(format!("no upgrade: {head}")));
        }
    }
    Lines::open(read, stream)
}

/// A guest's own port, behind the hybrid socket of its vsock device.
pub(crate) fn guest(socket: &Path) -> io::Result<Lines<UnixStream, UnixStream>> {
    let mut stream = connect(socket)?;
    stream.write_all(b"CONNECT 200\n")?;
    let mut read = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    read.read_line(&mut line)?;
    if !line.starts_with("OK ") {
        return Err(io::Error::other(format!("not connected: {line:?}")));
    }
    Lines::open(read, stream)
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A program with JSON lines on its stdin and stdout.
pub(crate) struct Program {
    lines: Lines<ChildStdout, ChildStdin>,
    child: Child,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (Some(write), Some(read)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        Ok(Self { lines: Lines::open(BufReader::new(read), write)?, child })
    }
}

impl Wire for Program {
    fn ask(&mut self, request: &str) -> io::Result<&[u8]> {
        self.lines.ask(request)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have already exited.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// MCP over HTTP on one connection, in a session.
pub(crate) struct Http {
    stream: BufReader<TcpStream>,
    head: String,
    text: Vec<u8>,
    body: Vec<u8>,
}

impl Http {
    pub(crate) fn open(address: SocketAddr, token: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let head = format!(
            "POST /mcp HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
             Accept: application/json, text/event-stream\r\n"
        );
        let mut this = Self { stream: BufReader::new(stream), head, text: Vec::new(), body: Vec::new() };
        let answer = this.post(INITIALIZE)?;
        let session = answer.ok_or_else(|| io::Error::other("no session"))?;
        this.head.push_str(&format!("Mcp-Session-Id: {session}\r\n"));
        this.post(INITIALIZED)?;
        Ok(this)
    }

    /// Posts a message; `body` then contains the answer. Returns the session id in it.
    fn post(&mut self, message: &str) -> io::Result<Option<String>> {
        self.text.clear();
        write!(self.text, "{}Content-Length: {}\r\n\r\n{message}", self.head, message.len())?;
        self.stream.get_mut().write_all(&self.text)?;
        let (mut length, mut is_chunked, mut session) = (0, false, None);
        let mut line = String::new();
        loop {
            line.clear();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            let Some((name, value)) = line.split_once(": ") else {
                if !line.starts_with("HTTP/1.1 2") {
                    return Err(io::Error::other(line.to_owned()));
                }
                continue;
            };
            match &*name.to_ascii_lowercase() {
                "content-length" => length = value.parse().map_err(io::Error::other)?,
                "transfer-encoding" => is_chunked = value == "chunked",
                "mcp-session-id" => session = Some(value.to_owned()),
                _ => {}
            }
        }
        self.body.clear();
        if !is_chunked {
            self.body.resize(length, 0);
            self.stream.read_exact(&mut self.body)?;
            return Ok(session);
        }
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
            let start = self.body.len();
            self.body.resize(start + size + 2, 0);
            self.stream.read_exact(&mut self.body[start..])?;
            self.body.truncate(start + size);
            if size == 0 {
                return Ok(session);
            }
        }
    }
}

impl Wire for Http {
    fn ask(&mut self, request: &str) -> io::Result<&[u8]> {
        self.post(request)?;
        Ok(&self.body)
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}
