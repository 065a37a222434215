//! Listens where the guest of one boot dials port 1025.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::egress::CONNECTIONS_MAX;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::connection::serve;
use super::state::Egress;
use crate::os::paths::vm_files;
use crate::os::socket;

/// How long to leave a listener alone that fails, as it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves one VM's guest. When it is dropped it ends, takes its socket along, and every connection of the guest ends.
#[derive(Debug)]
pub(crate) struct EgressServer {
    _task: AbortOnDropHandle<()>,
    socket: PathBuf,
}

impl EgressServer {
    /// Listens in the VM's directory; a socket that an earlier daemon left is replaced.
    pub(crate) fn bind(directory: &Path, egress: Arc<Egress>) -> io::Result<Self> {
        let listener = socket::bind_in_tokio(directory, vm_files::EGRESS)?;
        let task = AbortOnDropHandle::new(tokio::spawn(accept(listener, egress)));
        Ok(Self { _task: task, socket: directory.join(vm_files::EGRESS) })
    }
}

impl Drop for EgressServer {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(socket = %self.socket.display(), %error, "a socket is left behind");
            }
            _ => {}
        }
    }
}

async fn accept(listener: UnixListener, egress: Arc<Egress>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // Whoever finds no place waits to be accepted; the kernel bounds how many can.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let egress = Arc::clone(&egress);
                connections.spawn(async move {
                    // A guest that goes away is no matter.
                    let _ = serve(egress, stream).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}
