//! Gives the TAPs of this namespace to the processes that start VMs.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nexus_net_wire::hand::give;
use nexus_net_wire::{peer, tap};
use rustix::fs::OFlags;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::server::is;
use crate::view::Shared;

/// Pause after an error of the listener.
const PAUSE: Duration = Duration::from_millis(100);
/// Timeout of a client to say which TAP it wants.
const ASK: Duration = Duration::from_secs(5);

/// Serves clients until the process ends.
pub(crate) async fn serve(listener: UnixListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if is(&stream, peer::is_of_vmm) => {
                tracing::warn!("a process of a VMM asked for a TAP: it gets none");
            }
            Ok((stream, _)) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    if let Err(error) = timeout(ASK, one(stream, &shared)).await.unwrap_or(Ok(())) {
                        tracing::debug!(%error, "a client for a TAP failed");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client for a TAP");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn one(mut stream: UnixStream, shared: &Shared) -> std::io::Result<()> {
    let mut name = String::new();
    let (read, _) = stream.split();
    BufReader::new(read.take(tap::NAME_MAX as u64)).read_line(&mut name).await?;
    let opened = open(name.trim_end(), shared);
    give(&stream, opened.as_ref().map_err(String::as_str))
}

/// Opens the TAP of an attached VM. The kernel refuses it while a VMM has it.
fn open(name: &str, shared: &Shared) -> Result<OwnedFd, String> {
    if !shared.view().vms.values().any(|wired| wired.tap == name) {
        return Err(format!("{name} is not the TAP of a VM"));
    }
    match tap::open(name, OFlags::NONBLOCK) {
        Ok((device, _)) => Ok(device),
        Err(error) => Err(format!("open {name}: {error}")),
    }
}
