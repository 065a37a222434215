//! Listens for the connections of one boot's guest to vsock port 1025.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_schema::egress::CONNECTIONS_MAX;
use tokio_util::task::AbortOnDropHandle;

use super::connection::serve;
use super::state::Egress;
use crate::os::paths::vm_files;
use crate::os::socket;

/// Serves one VM's guest. Dropping it stops the server, removes the socket, and ends every connection of the guest.
#[derive(Debug)]
pub(crate) struct EgressServer {
    _task: AbortOnDropHandle<()>,
    socket: PathBuf,
}

impl EgressServer {
    /// Listens in the VM's directory; replaces a socket that an earlier daemon left.
    pub(crate) fn bind(directory: &Path, egress: Arc<Egress>) -> io::Result<Self> {
        let listener = socket::bind_in_tokio(directory, vm_files::EGRESS)?;
        let serving = socket::serve_each(listener, CONNECTIONS_MAX, move |stream| {
            let egress = Arc::clone(&egress);
            async move {
                // Errors of a guest that goes away are ignored.
                let _ = serve(egress, stream).await;
            }
        });
        let task = AbortOnDropHandle::new(tokio::spawn(serving));
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
