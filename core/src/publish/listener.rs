//! The host side of a published port: a TCP port on the loopback interface or a Unix socket, and its clients.

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::Reference;
use nexus_schema::id::VmId;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::relay::{self, Client};
use super::spare::Spare;
use crate::context::{Handle, Shared, socket_name};
use crate::os::paths::Paths;
use crate::os::socket;
use crate::store::ports::PortRecord;

/// Maximum number of clients of one port that are served at once; others wait to be accepted.
const CLIENTS_MAX: usize = 512;
/// Delay after a listener fails, for example because file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Interval between two tries to bind a port that another program uses.
const BIND_AGAIN: Duration = Duration::from_secs(5);

/// Where clients connect.
#[derive(Debug)]
pub(crate) enum Listener {
    /// A port on the loopback interface.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

/// Listens on a published port's address; on any free port if the record says 0.
pub(crate) fn bind(paths: &Paths, port: &PortRecord) -> io::Result<Listener> {
    match port.host_port {
        Some(host_port) => {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, host_port))?;
            listener.set_nonblocking(true)?;
            Ok(Listener::Tcp(TcpListener::from_std(listener)?))
        }
        None => {
            let name = socket_name(port.vm, port.guest_port);
            Ok(Listener::Unix(socket::bind_in_tokio(&paths.sockets(), &name)?))
        }
    }
}

impl Listener {
    /// Returns the port of the host, if it is a TCP listener.
    pub(crate) fn host_port(&self) -> io::Result<Option<u16>> {
        match self {
            Self::Tcp(listener) => Ok(Some(listener.local_addr()?.port())),
            Self::Unix(_) => Ok(None),
        }
    }

    async fn accept(&self) -> io::Result<Client> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Client::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Client::Unix(listener.accept().await?.0)),
        }
    }
}

/// Serves a published port until it is unpublished, its VM is deleted or the daemon stops.
pub(super) async fn serve(
    shared: Weak<Shared>,
    port: PortRecord,
    listener: Option<Listener>,
    until: CancellationToken,
) {
    let Some(vm) = shared.upgrade().and_then(|shared| find(&shared, port.vm)) else { return };
    tokio::select! {
        () = until.cancelled() => {}
        () = gone(vm) => {}
        () = accept(&shared, &port, listener, &until) => {}
    }
    if let Some(shared) = shared.upgrade() {
        shared.published.end(port.id);
        if port.host_port.is_none() {
            let path = shared.paths.sockets().join(socket_name(port.vm, port.guest_port));
            tokio::task::spawn_blocking(move || fs_err::remove_file(path).ok());
        }
    }
}

pub(super) fn find(shared: &Shared, vm: VmId) -> Option<Handle> {
    shared.vms.of_daemon(&Reference::Id(vm)).ok()
}

/// Waits until a VM is deleted or its task has ended.
async fn gone(mut vm: Handle) {
    // An error means that the VM's task has ended.
    let _ = vm.view.wait_for(|view| view.deleted).await;
}

async fn accept(
    shared: &Weak<Shared>,
    port: &PortRecord,
    mut listener: Option<Listener>,
    until: &CancellationToken,
) {
    let (places, spare) = (Arc::new(Semaphore::new(CLIENTS_MAX)), Arc::new(Spare::default()));
    loop {
        let Some(listening) = &listener else {
            let Some(shared) = shared.upgrade() else { return };
            match bind(&shared.paths, port) {
                Ok(bound) => {
                    shared.published.say(port.id, None);
                    listener = Some(bound);
                }
                Err(error) => {
                    shared.published.say(port.id, Some(format!("cannot listen: {error}")));
                    drop(shared);
                    tokio::time::sleep(BIND_AGAIN).await;
                }
            }
            continue;
        };
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let client = match listening.accept().await {
            Ok(client) => client,
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (shared, vm, guest_port, until) = (shared.clone(), port.vm, port.guest_port, until.clone());
        let spare = spare.clone();
        tokio::spawn(async move {
            let serving = relay::serve(shared, vm, guest_port, client, &spare);
            let served = until.run_until_cancelled(serving).await;
            if let Some(Err(error)) = served {
                tracing::debug!(%vm, guest_port, %error, "a connection to a published port ends");
            }
            drop(place);
        });
    }
}
