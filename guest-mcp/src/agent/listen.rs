//! Accepts the host's connections: on vsock ports, from the serial ports or on the one Unix socket that replace them.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::link::{LEASE_PORT, MCP_PORT, RESUME_PORT, STREAM_PORT};
use nexus_vsock::Nonce;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use super::stream::{SOCKET, ShortPath};
use super::{Agent, Place, lease, mcp, open, serial};
use crate::console::say;
use nexus_wire::{duplex, frames};

/// The maximum number of connections for calls; further ones are closed at once.
const CONNECTIONS_MAX: usize = 64;
/// The maximum number of streams; further ones are closed at once. An open stream of a command does not count, because the holder owns it.
const STREAMS_MAX: usize = 256;
/// Timeout of the handshake that says which port a connection is for.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest line that says that this guest was restored, in bytes.
const HANDSHAKE_MAX: usize = 128;
/// Pause after a failed accept, for example when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Starts listening.
pub(super) async fn start(agent: &Arc<Agent>) -> io::Result<()> {
    let room = Room { calls: limit(CONNECTIONS_MAX), streams: limit(STREAMS_MAX) };
    match &agent.place {
        Place::Vm { .. } if serial::is_here() => {
            let (serial, events) = serial::start().await?;
            if agent.serial.set(serial).is_ok() {
                tokio::spawn(accept_serial(agent.clone(), events, room));
            }
        }
        Place::Vm { .. } => {
            for port in [MCP_PORT, STREAM_PORT, RESUME_PORT, LEASE_PORT] {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
                tokio::spawn(accept_vsock(agent.clone(), listener, port, room.clone()));
            }
        }
        Place::Process { directory } => {
            let directory = ShortPath::of(directory)?;
            let path = directory.join(SOCKET);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            tokio::spawn(accept_unix(agent.clone(), UnixListener::bind(path)?, room));
        }
    }
    Ok(())
}

/// The number of free connections of each port.
#[derive(Clone)]
struct Room {
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

fn limit(connections: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(connections))
}

impl Room {
    /// Takes a free connection of a port; `None` if there is none, or no such port.
    fn take(&self, port: u32) -> Option<OwnedSemaphorePermit> {
        let room = match port {
            MCP_PORT | RESUME_PORT | LEASE_PORT => &self.calls,
            STREAM_PORT => &self.streams,
            _ => return None,
        };
        room.clone().try_acquire_owned().ok()
    }
}

async fn accept_vsock(agent: Arc<Agent>, listener: VsockListener, port: u32, room: Room) {
    loop {
        // Not as a socket of tokio, which would watch it too.
        let (stream, from) = match poll_fn(|cx| listener.poll_accept_std(cx)).await {
            Ok(accepted) => accepted,
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Processes in the guest can also connect here, but only the host is served.
        if from.cid() != VMADDR_CID_HOST {
            continue;
        }
        let Some(place) = room.take(port) else { continue };
        let agent = agent.clone();
        tokio::spawn(async move {
            let _ = serve(agent, port, stream.into()).await;
            drop(place);
        });
    }
}

async fn accept_serial(agent: Arc<Agent>, mut events: mpsc::UnboundedReceiver<serial::Event>, room: Room) {
    while let Some(event) = events.recv().await {
        match event {
            serial::Event::Accepted(port, socket) => {
                let Some(place) = room.take(port) else { continue };
                let agent = agent.clone();
                tokio::spawn(async move {
                    let _ = serve(agent, port, socket).await;
                    drop(place);
                });
            }
            serial::Event::Relinked(nonce) => {
                say(format_args!("this VM was restored; the link to the host has begun anew"));
                super::resume::relinked(&agent, nonce.to_string());
            }
        }
    }
}

/// Serves one connection until it ends.
async fn serve(agent: Arc<Agent>, port: u32, socket: OwnedFd) -> io::Result<()> {
    match port {
        STREAM_PORT => open::serve(agent, socket).await,
        RESUME_PORT => {
            let told = tokio::time::timeout(HANDSHAKE_TIMEOUT, hear_of_restore(&agent, socket));
            told.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        }
        LEASE_PORT => {
            let served = tokio::time::timeout(HANDSHAKE_TIMEOUT, lease::serve(&agent, socket));
            served.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        }
        _ => {
            let (reader, writer) = duplex::split(socket)?;
            mcp::serve(agent, reader, writer).await;
            Ok(())
        }
    }
}

/// Reads the nonce of the restore after which this guest goes on, and repeats it.
async fn hear_of_restore(agent: &Arc<Agent>, socket: OwnedFd) -> io::Result<()> {
    let (mut reader, mut writer) = duplex::split(socket)?;
    let mut read = BytesMut::new();
    let Some(line) = frames::read_line(&mut reader, &mut read, HANDSHAKE_MAX).await? else { return Ok(()) };
    let text = std::str::from_utf8(&line).map_err(io::Error::other)?;
    let nonce: Nonce = text.parse().map_err(io::Error::other)?;
    say(format_args!("this VM was restored; the link to the host has begun anew"));
    super::resume::relinked(agent, nonce.to_string());
    writer.write_all(format!("{nonce}\n").as_bytes()).await
}

async fn accept_unix(agent: Arc<Agent>, listener: UnixListener, room: Room) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (agent, room) = (agent.clone(), room.clone());
        tokio::spawn(async move {
            // A failed handshake closes the connection, as the vsock device does.
            let _ = serve_unix(agent, stream, &room).await;
        });
    }
}

async fn serve_unix(agent: Arc<Agent>, mut stream: UnixStream, room: &Room) -> io::Result<()> {
    let asked = tokio::time::timeout(HANDSHAKE_TIMEOUT, read_connect(&mut stream));
    let port = asked.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let Some(_place) = room.take(port) else { return Ok(()) };
    stream.write_all(format!("OK {port}\n").as_bytes()).await?;
    serve(agent, port, stream.into_std()?.into()).await
}

/// Reads `CONNECT <port>\n`, and nothing after it.
async fn read_connect(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<u32> {
    let refuse = || io::Error::from(io::ErrorKind::InvalidData);
    let mut line = Vec::with_capacity(32);
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if line.len() < 32 => line.push(byte),
            _ => return Err(refuse()),
        }
    }
    let text = std::str::from_utf8(&line).map_err(|_| refuse())?;
    text.strip_prefix("CONNECT ").and_then(|port| port.trim().parse().ok()).ok_or_else(refuse)
}
