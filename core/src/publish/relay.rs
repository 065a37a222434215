//! One client of a published port, and its stream into the guest.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::id::VmId;
use nexus_schema::stream::{Open, Opening, TcpOpening, VERSION};
use nexus_schema::tools::vm::VmState;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};

use super::listener::find;
use super::spare::Spare;
use crate::context::Shared;
use crate::guest::{EARLY_MAX, GuestStream, StreamError, Way};
use crate::vm::actor::DAEMON;
use crate::vm::wake;

/// Time for which a client waits for a VM that is starting.
const READY_WAIT: Duration = Duration::from_secs(30);

/// The connection of a client.
#[derive(Debug)]
pub(super) enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Client {
    /// Takes what the client has sent already, without waiting. If it has reset its connection, fails: the next read would take that for an end.
    fn first_bytes(&self) -> io::Result<Vec<u8>> {
        let socket = match self {
            Self::Tcp(client) => client.as_fd(),
            Self::Unix(client) => client.as_fd(),
        };
        let mut bytes = Vec::with_capacity(EARLY_MAX);
        match rustix::net::recv(socket, spare_capacity(&mut bytes), RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(bytes),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for what the client sends next, and takes it; nothing at its end. Cancel-safe.
    async fn next_bytes(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; EARLY_MAX];
        let length = match self {
            Self::Tcp(client) => client.read(&mut bytes).await?,
            Self::Unix(client) => client.read(&mut bytes).await?,
        };
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// Serves a client until both directions have ended.
pub(super) async fn serve(
    shared: Weak<Shared>,
    vm: VmId,
    guest_port: u16,
    mut client: Client,
    spare: &Arc<Spare>,
) -> Result<(), StreamError> {
    let found = shared.upgrade().and_then(|shared| Some((find(&shared, vm)?, shared.paths.vm(vm))));
    let Some((handle, directory)) = found else { return Ok(()) };
    let _busy = handle.activity.begin();
    let what = format!("a connection to its port {guest_port}");
    if let Err(error) = wake(&handle, DAEMON, &what, READY_WAIT).await {
        tracing::info!(vm = %vm, %error, "a connection to a published port cannot wake its vm");
        return Err(StreamError::Dial(io::ErrorKind::NotConnected.into()));
    }
    let mut view = handle.view;
    // A paused VM stays so until somebody resumes it.
    let settled = view.wait_for(|view| matches!(view.record.state, VmState::Ready | VmState::Paused));
    let settled = tokio::time::timeout(READY_WAIT, settled);
    if !matches!(settled.await, Ok(Ok(view)) if view.record.state == VmState::Ready) {
        return Err(StreamError::Dial(io::ErrorKind::NotConnected.into()));
    }
    let of_link = view.borrow().link.as_ref().map(|link| (link.offers().early_data, link.era()));
    let (takes_early, era) = of_link.unwrap_or_default();
    let early = if takes_early { client.first_bytes().map_err(StreamError::Own)? } else { Vec::new() };
    let more = async { if takes_early { client.next_bytes().await } else { std::future::pending().await } };
    let open = Open::Tcp(TcpOpening { port: guest_port });
    let opening = Opening { version: VERSION, client: None, open };
    let way = spare.take(&era).map_or(Way::New(&directory), Way::Made);
    let stream = GuestStream::open_with(way, &opening, &early, more).await?;
    spare.want(directory, era);
    match client {
        Client::Tcp(client) => {
            let (mut read, mut write) = client.into_split();
            stream.carry(&mut read, &mut write).await
        }
        Client::Unix(client) => {
            let (mut read, mut write) = client.into_split();
            stream.carry(&mut read, &mut write).await
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::time::{sleep, timeout};

    use super::*;

    #[tokio::test]
    async fn a_client_that_has_reset_its_connection_has_not_just_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (near, _) = listener.accept().await.unwrap();
        far.write_all(b"first").await.unwrap();
        near.readable().await.unwrap();
        let client = Client::Tcp(near);
        assert_eq!(client.first_bytes().unwrap(), b"first");
        assert_eq!(client.first_bytes().unwrap(), b"", "nothing is waited for");
        rustix::net::sockopt::set_socket_linger(&far, Some(Duration::ZERO)).unwrap();
        drop(far);
        let reset = async {
            loop {
                match client.first_bytes() {
                    Ok(bytes) => assert_eq!(bytes, b""),
                    Err(error) => return error,
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        let error = timeout(Duration::from_secs(20), reset).await.unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn what_a_client_sends_next_is_waited_for_and_then_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut client = Client::Tcp(listener.accept().await.unwrap().0);
        let soon = Duration::from_secs(20);
        let (next, written) = tokio::join!(timeout(soon, client.next_bytes()), far.write_all(b"later"));
        written.unwrap();
        assert_eq!(next.unwrap().unwrap(), b"later");
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"last").await.unwrap();
        drop(far);
        let mut client = Client::Unix(near);
        for expected in [&b"last"[..], b""] {
            assert_eq!(timeout(soon, client.next_bytes()).await.unwrap().unwrap(), expected);
        }
    }
}
