//! TCP connections to the guest's own loopback, for the host.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::stream::{Done, Ended};
use nexus_wire::duplex::{self, Reader};
use nexus_wire::frames::{CopyError, FULL, copy};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::timeout;

use super::open::{Receiver, Sender, finish};
use crate::os::reason;

/// Timeout of a connect. On loopback, only a full backlog makes it wait.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a program sends. Between two reads of much data the program gets the processor if little is left: so on a single one it writes as much as it can,
/// instead of being interrupted after each segment.
pub(crate) struct OfProgram<R> {
    read: R,
    is_bulk: bool,
}

/// The reading half of a program's connection.
pub(crate) trait Half: AsyncRead + Unpin {
    /// Returns the socket.
    fn socket(&self) -> BorrowedFd<'_>;
}

impl Half for Reader {
    fn socket(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Half for &mut OwnedReadHalf {
    fn socket(&self) -> BorrowedFd<'_> {
        let socket: &tokio::net::TcpStream = self.as_ref();
        socket.as_fd()
    }
}

impl<R: Half> OfProgram<R> {
    pub(crate) fn new(read: R) -> Self {
        Self { read, is_bulk: false }
    }
}

impl<R: Half> AsyncRead for OfProgram<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let is_bulk = std::mem::take(&mut self.is_bulk);
        if is_bulk && rustix::io::ioctl_fionread(self.read.socket()).is_ok_and(|left| left < FULL as u64) {
            rustix::thread::sched_yield();
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.read).poll_read(cx, buf);
        self.is_bulk = buf.filled().len() - before >= FULL;
        polled
    }
}

/// Connects to a port on 127.0.0.1, or on ::1 if nothing listens there.
pub(super) async fn connect(port: u16) -> Result<OwnedFd, ToolError> {
    let dial = async {
        match dial((Ipv4Addr::LOCALHOST, port).into()).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                dial((Ipv6Addr::LOCALHOST, port).into()).await.map_err(|_| error)
            }
            connected => connected,
        }
    };
    let failed = |code, why: &str| ToolError::new(code, format!("connect to port {port} in the VM: {why}"));
    match timeout(CONNECT_TIMEOUT, dial).await {
        Ok(Ok(connection)) => {
            // Small writes must not be delayed.
            let _ = sockopt::set_tcp_nodelay(&connection, true);
            Ok(connection)
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(failed(ErrorCode::ConnectionRefused, "nothing is listening there")
                .hint("start the server first, and let it listen on 127.0.0.1 or on all addresses"))
        }
        Ok(Err(error)) => Err(failed(ErrorCode::GuestFailed, &reason(&error))),
        Err(_) => Err(failed(ErrorCode::Timeout, "it does not accept connections")),
    }
}

/// Connects to an address on the loopback interface.
async fn dial(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Err(Errno::INPROGRESS) => {}
        connected => return connected.map(|()| socket).map_err(Into::into),
    }
    // The other end has usually answered by now, so the second call says how.
    match rustix::net::connect(&socket, &address) {
        Err(Errno::ALREADY | Errno::INPROGRESS) => duplex::connected(socket).await,
        Ok(()) | Err(Errno::ISCONN) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Forwards a connection until both directions have ended. If the host disconnects, the connection is reset.
pub(super) async fn serve(connection: OwnedFd, mut receiver: Receiver, sender: Sender) {
    // Without it, the host's end is closed.
    let Ok((read, mut write)) = duplex::split(connection) else { return };
    let mut read = OfProgram::new(read);
    let copied = copy(&mut receiver, &sender, &mut read, &mut write).await;
    let failed = |what: &str, error: &io::Error| {
        Done::Error(ToolError::new(
            ErrorCode::GuestFailed,
            format!("{what} the connection: {}", reason(error)),
        ))
    };
    let done = match copied {
        Ok(_) => Done::Ok(Ended::default()),
        Err(CopyError::Read(error)) => failed("read from", &error),
        Err(CopyError::Write(error)) => failed("write to", &error),
        Err(CopyError::Frames(_)) => {
            // The server then sees a reset instead of a normal end.
            if let Ok(connection) = duplex::join((read.read, write)) {
                let _ = sockopt::set_socket_linger(&connection, Some(Duration::ZERO));
            }
            return;
        }
    };
    drop((read, write));
    finish(receiver, sender, done).await;
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use nexus_wire::frames::{Incoming, over};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_port_is_connected_to_on_either_loopback_address_or_refused() {
        let mut addresses = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))];
        // Machines without IPv6 have only the other one.
        if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.is_ok() {
            addresses.push((Ipv6Addr::LOCALHOST, 0).into());
        }
        for address in addresses {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let connection = connect(port).await.unwrap();
            let (mut near, (mut far, _)) =
                (std::net::TcpStream::from(connection), listener.accept().await.unwrap());
            std::io::Write::write_all(&mut near, b"hello").unwrap();
            let mut hello = [0; 5];
            far.read_exact(&mut hello).await.unwrap();
            assert_eq!(&hello, b"hello");
            drop(listener);
            let refused = connect(port).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::ConnectionRefused);
        }
    }

    /// A server's end of a connection that is forwarded, and the host's end.
    async fn forwarded() -> (tokio::net::TcpStream, UnixStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connection = connect(listener.local_addr().unwrap().port()).await.unwrap();
        let (near, host) = UnixStream::pair().unwrap();
        let (reader, writer) = duplex::split(near.into_std().unwrap().into()).unwrap();
        let (receiver, sender) = over(reader, writer, BytesMut::new());
        tokio::spawn(serve(connection, receiver, sender));
        (listener.accept().await.unwrap().0, host)
    }

    #[tokio::test]
    async fn much_data_comes_whole_and_each_direction_ends_on_its_own() {
        let (mut server, host) = forwarded().await;
        let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
        let content = sent.clone();
        let serving = tokio::spawn(async move {
            server.write_all(&content).await.unwrap();
            server.shutdown().await.unwrap();
            let mut asked = String::new();
            server.read_to_string(&mut asked).await.unwrap();
            asked
        });
        let (reader, writer) = duplex::split(host.into_std().unwrap().into()).unwrap();
        let (mut receiver, sender) = over(reader, writer, BytesMut::new());
        let mut received = Vec::new();
        while let Incoming::Data(bytes) = timeout(SOON, receiver.next()).await.unwrap().unwrap().unwrap() {
            received.extend_from_slice(&bytes);
            sender.took(bytes.len()).await.unwrap();
        }
        assert!(received == sent);
        sender.data(b"after the end").await.unwrap();
        sender.end().await.unwrap();
        assert_eq!(timeout(SOON, serving).await.unwrap().unwrap(), "after the end");
        let done = timeout(SOON, receiver.next()).await.unwrap().unwrap();
        assert!(matches!(done, Some(Incoming::Done(_))), "{done:?}");
    }

    #[tokio::test]
    async fn a_server_sees_a_reset_when_the_host_is_gone() {
        let (mut server, host) = forwarded().await;
        drop(host);
        let error = timeout(SOON, server.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
