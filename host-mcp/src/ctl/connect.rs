//! Opens the daemon's JSON-lines stream: `GET /mcp` on the Unix socket with `Upgrade: mcp-stream`.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, HOST, UPGRADE};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use nexus_schema::error::GUEST;
use nexus_schema::{ErrorCode, ToolError};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::error::{Error, Refusal};
use super::hint::About;

/// The name of the upgraded protocol: one JSON-RPC message a line, both ways.
pub(crate) const PROTOCOL: &str = "mcp-stream";
/// The longest path that fits in a socket address.
const ADDRESS_MAX: usize = 107;
/// How long the daemon may take to accept and answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// The longest explanation of a refusal, in bytes.
const REFUSAL_MAX: usize = 64 << 10;

/// An open stream, and what was already read from it.
#[derive(Debug)]
pub(crate) struct Stream {
    /// The socket.
    pub(crate) socket: UnixStream,
    /// The bytes that followed the response to the upgrade.
    pub(crate) head: Bytes,
}

/// The view that a client connects to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Seen<'a> {
    /// The daemon, with a set of its tools; `None` for the configured set.
    Daemon(Option<&'a str>),
    /// The inside of a VM: its tools, or what is chosen instead.
    Vm(&'a str, Option<&'a str>),
}

/// The daemon with all its tools.
pub(crate) const ALL: Seen<'static> = Seen::Daemon(Some("all"));

/// Opens a stream to the daemon, with this user's rights or those of a token.
pub(crate) async fn open(socket: &Path, token: Option<&str>, seen: Seen<'_>) -> Result<Stream, Error> {
    let path = match seen {
        Seen::Vm(vm, None) => format!("/mcp/vm/{vm}"),
        Seen::Vm(vm, Some(tools)) => format!("/mcp/vm/{vm}?tools={tools}"),
        Seen::Daemon(Some(tools)) => format!("/mcp?tools={tools}"),
        Seen::Daemon(None) => "/mcp".into(),
    };
    open_at(socket, token, &path, PROTOCOL).await
}

/// Opens a path and upgrades it to a protocol.
pub(crate) async fn open_at(
    socket: &Path,
    token: Option<&str>,
    path: &str,
    protocol: &str,
) -> Result<Stream, Error> {
    let deadline = Instant::now() + DEADLINE;
    match timeout_at(deadline, upgrade(socket, token, path, protocol)).await {
        Ok(result) => result,
        Err(_) => Err(Error::Timeout { during: "connecting".into(), seconds: DEADLINE.as_secs() }),
    }
}

async fn upgrade(socket: &Path, token: Option<&str>, path: &str, protocol: &str) -> Result<Stream, Error> {
    let not_nexus = |what: String| Error::NotNexus { socket: socket.into(), what };
    let stream = dial(socket).await.map_err(|source| refused(socket, source))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| not_nexus(e.to_string()))?;
    let connection = tokio::spawn(connection.with_upgrades());
    let mut request = Request::get(path);
    if let Some(token) = token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request
        .header(HOST, "localhost")
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, protocol)
        .body(Empty::<Bytes>::new())
        .map_err(|e| Error::Usage { message: format!("`{path}` is not a valid path: {e}"), hint: None })?;
    let response = sender.send_request(request).await.map_err(|e| not_nexus(e.to_string()))?;
    let status = response.status();
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let body = Limited::new(response.into_body(), REFUSAL_MAX).collect().await;
        let body = body.map(|b| b.to_bytes()).unwrap_or_default();
        connection.abort();
        return Err(match serde_json::from_slice::<Said>(&body) {
            Ok(Said { error, from: Some(from) }) if from == GUEST => {
                Error::Guest(Refusal { error, about: About::default() })
            }
            Ok(Said { error, .. }) => error.into(),
            Err(_) if status == StatusCode::UNAUTHORIZED => {
                let error = ToolError::new(
                    ErrorCode::Forbidden,
                    "the daemon does not know the token in NEXUS_TOKEN, or it has ended",
                );
                error.hint("use another token, or unset NEXUS_TOKEN").into()
            }
            Err(_) => not_nexus(format!("{status}: {}", first_line(&body))),
        });
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|e| not_nexus(e.to_string()))?;
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| Error::Unexpected { what: "the upgraded connection is not the socket".into() })?;
    Ok(Stream { socket: parts.io.into_inner(), head: parts.read_buf })
}

/// The daemon's explanation of a refused upgrade.
#[derive(serde::Deserialize)]
struct Said {
    error: ToolError,
    #[serde(default)]
    from: Option<String>,
}

/// Connects to a Unix socket, even if its path does not fit in a socket address.
pub(crate) async fn dial(path: &Path) -> io::Result<UnixStream> {
    let (address, _directory) = address(path)?;
    loop {
        match UnixStream::connect(&address).await {
            // The backlog is full. There is nothing to wait for, and the caller has a deadline.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(Duration::from_millis(5)).await
            }
            result => return result,
        }
    }
}

/// A short path to a socket, and a descriptor that must stay open while it is used.
fn address(path: &Path) -> io::Result<(PathBuf, Option<rustix::fd::OwnedFd>)> {
    use rustix::fs::{Mode, OFlags};
    if path.as_os_str().len() <= ADDRESS_MAX {
        return Ok((path.into(), None));
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name), Some(directory)))
}

fn refused(socket: &Path, source: io::Error) -> Error {
    let socket = socket.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::DaemonDown { socket, hint: how_to_start() }
        }
        io::ErrorKind::PermissionDenied => Error::NoAccess { socket, source },
        _ => Error::Connect { socket, source },
    }
}

/// Explains how to start the daemon.
fn how_to_start() -> String {
    let user = if rustix::process::geteuid().is_root() { "" } else { "--user " };
    format!("start it with `nexusd &`, or `systemctl {user}start nexus` if it is installed as a service")
}

fn first_line(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_paths_are_dialled() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d".repeat(150));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("nexus.sock");
        let (short, _keep) = address(&path).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(short).unwrap();
        dial(&path).await.unwrap();
        drop(listener);
        assert_eq!(dial(&path).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_missing_socket_is_a_daemon_that_is_down() {
        let root = tempfile::tempdir().unwrap();
        let error = open(&root.path().join("nexus.sock"), None, ALL).await.unwrap_err();
        assert_eq!(error.exit_code(), 6);
        assert!(error.hint().unwrap().contains("nexusd &"), "{error}");
    }
}
