//! Accepts the host's connections: on vsock ports, or on the one Unix socket that stands for all of them.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::link::{MCP_PORT, STREAM_PORT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use super::stream::{SOCKET, ShortPath};
use super::{Agent, Place, mcp};
use nexus_wire::duplex;

/// Connections at once; more are closed unheard.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may take to say which port it wants.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to leave a listener alone that fails, as it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Starts to listen.
pub(super) fn start(agent: &Arc<Agent>) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    match &agent.place {
        Place::Vm { .. } => {
            for port in [MCP_PORT, STREAM_PORT] {
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

async fn accept_vsock(agent: Arc<Agent>, listener: VsockListener, port: u32, room: Arc<Semaphore>) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Processes of the guest itself can come here too; only the host is served.
        if from.cid() != VMADDR_CID_HOST || port != MCP_PORT {
            continue;
        }
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Ok((reader, writer)) = stream.as_fd().try_clone_to_owned().and_then(duplex::split) {
                drop(stream);
                mcp::serve(agent, reader, writer).await;
            }
            drop(place);
        });
    }
}

async fn accept_unix(agent: Arc<Agent>, listener: UnixListener, room: Arc<Semaphore>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let agent = agent.clone();
        tokio::spawn(async move {
            // A peer that gets the handshake wrong is hung up on, as the device does.
            let _ = serve_unix(agent, stream).await;
            drop(place);
        });
    }
}

async fn serve_unix(agent: Arc<Agent>, mut stream: UnixStream) -> io::Result<()> {
    let asked = tokio::time::timeout(HANDSHAKE_TIMEOUT, read_connect(&mut stream));
    let port = asked.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if port != MCP_PORT {
        return Ok(());
    }
    stream.write_all(format!("OK {port}\n").as_bytes()).await?;
    let (reader, writer) = duplex::split(stream.into_std()?.into())?;
    mcp::serve(agent, reader, writer).await;
    Ok(())
}

/// Reads `CONNECT <port>\n` and not a byte more.
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
