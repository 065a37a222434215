//! Accepts connections and serves HTTP/1.1 on them.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nexus_core::host::{is_of_vm, socket};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::users::{Others, SocketUsers, User};
use super::wrong::Who;
use super::{Door, Endpoints, Peer};

/// The maximum number of connections per listener.
const CONNECTIONS_MAX: usize = 1024;
/// How long a client may take to send the head of its request.
const HEAD_MAX: Duration = Duration::from_secs(30);

/// Serves the Unix socket `name` in `directory` until the endpoints stop. This user and root may connect, and the group of `users`.
pub fn serve_unix(endpoints: &Endpoints, directory: &Path, name: &str, users: SocketUsers) -> io::Result<()> {
    let listener: UnixListener = socket::bind_in_tokio(directory, name)?;
    users.open(directory, name)?;
    let this = endpoints.clone();
    let others = Others::default();
    endpoints.tasks().spawn(async move {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut refused: u64 = 0;
        while let Some((permit, accepted)) = next(&this, &room, listener.accept()).await {
            let accepted = accepted.and_then(|(stream, _)| {
                let peer = stream.peer_cred()?;
                Ok((stream, peer.uid(), peer.pid(), users.peer(peer.uid())))
            });
            match accepted {
                Ok((_, uid, Some(pid), _)) if is_of_vmm(uid, pid) => {
                    refused += 1;
                    // Few lines, however often it tries.
                    if refused.is_power_of_two() {
                        tracing::warn!(
                            pid,
                            refused,
                            "a process of a VMM connected to the daemon's socket: it is not served"
                        );
                    }
                }
                Ok((stream, uid, _, user)) => {
                    let share = match &user {
                        User::Owner(_) => None,
                        User::Other { .. } => match others.take(uid) {
                            Some(share) => Some(share),
                            // It has too many open; the daemon's user always finds room.
                            None => continue,
                        },
                    };
                    let peer = Peer { user: Some(user), who: Who::User(uid), _share: share };
                    converse(&this, Door::Unix, peer, stream, permit);
                }
                Err(error) => pause(&error).await,
            }
        }
    });
    Ok(())
}

/// Whether a client is a shim or a VMM of this user, or was started by one. Under a daemon of an ordinary user, a guest that has taken its VMM over would
/// have all rights here. VMMs that run as other users cannot connect.
fn is_of_vmm(uid: u32, pid: i32) -> bool {
    // A process of another PID namespace has the number 0 here; a VMM cannot make one.
    let pid = u32::try_from(pid).ok().filter(|pid| *pid != 0);
    uid == rustix::process::geteuid().as_raw() && pid.is_some_and(is_of_vm)
}

/// Serves a TCP listener until the endpoints stop.
pub fn serve_tcp(endpoints: &Endpoints, listener: TcpListener, door: Door) {
    let this = endpoints.clone();
    endpoints.tasks().spawn(async move {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        while let Some((permit, accepted)) = next(&this, &room, listener.accept()).await {
            match accepted {
                Ok((stream, address)) => {
                    // Small responses should not be delayed.
                    let _ = stream.set_nodelay(true);
                    let peer = Peer { user: None, who: Who::Address(address.ip()), _share: None };
                    converse(&this, door.clone(), peer, stream, permit);
                }
                Err(error) => pause(&error).await,
            }
        }
    });
}

/// The next connection, once there is a free slot; `None` when the endpoints stop.
async fn next<T>(
    endpoints: &Endpoints,
    room: &Arc<Semaphore>,
    accept: impl Future<Output = io::Result<T>>,
) -> Option<(OwnedSemaphorePermit, io::Result<T>)> {
    tokio::select! {
        biased;
        () = endpoints.stop().cancelled() => None,
        next = async { (Arc::clone(room).acquire_owned().await.ok(), accept.await) } => Some((next.0?, next.1)),
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn converse<S>(endpoints: &Endpoints, door: Door, peer: Peer, stream: S, permit: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let this = endpoints.clone();
    endpoints.tasks().spawn(async move {
        let stop = this.stop().clone();
        let (door, peer) = (Arc::new(door), Arc::new(peer));
        let service = service_fn(move |request| {
            let (this, door, peer) = (this.clone(), Arc::clone(&door), Arc::clone(&peer));
            async move {
                Ok::<_, std::convert::Infallible>(Box::pin(this.answer(&door, &peer, request)).await)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended badly");
        }
        drop(permit);
    });
}
