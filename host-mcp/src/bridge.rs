//! `nexusd --stdio` beside a running daemon: forwards stdin and stdout to the daemon's stream.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use nexus_core::host::{duplex, socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};

use crate::endpoint::STREAM_PROTOCOL;

/// The longest response to the upgrade request, in bytes.
const HEAD_MAX: usize = 8 << 10;
/// How often to check for a client that has sent its last line.
const GONE_CHECK: Duration = Duration::from_millis(50);

/// Forwards until either side ends.
pub(crate) async fn pump(socket: &Path) -> ExitCode {
    match try_pump(socket).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, socket = %socket.display(), "cannot use the daemon that runs");
            ExitCode::FAILURE
        }
    }
}

/// Returns when nobody reads stdout any more.
async fn unread() {
    while !duplex::is_unread(io::stdout()) {
        tokio::time::sleep(GONE_CHECK).await;
    }
}

async fn try_pump(path: &Path) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut stream = socket::connect_in_tokio(directory, name).await?;
    let request = format!(
        "GET /mcp HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: {STREAM_PROTOCOL}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > HEAD_MAX {
            return Err(io::Error::other("the daemon's answer is too long"));
        }
        head.push(stream.read_u8().await?);
    }
    if !head.starts_with(b"HTTP/1.1 101 ") {
        let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
        return Err(io::Error::other(format!("the daemon refused: {line}")));
    }
    let (mut from, mut to) = stream.into_split();
    let (mut stdin, mut stdout) = rmcp::transport::stdio_pipes();
    let sending = async move {
        let sent = copy(&mut stdin, &mut to).await;
        // The daemon lets running calls finish, then closes.
        to.shutdown().await?;
        sent
    };
    let receiving = copy(&mut from, &mut stdout);
    tokio::pin!(sending, receiving);
    tokio::select! {
        received = &mut receiving => { received?; }
        sent = &mut sending => {
            sent?;
            tokio::select! {
                received = receiving => { received?; }
                () = unread() => {}
            }
        }
    }
    Ok(())
}
