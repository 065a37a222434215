//! TCP connections to the guest's own loopback, for the host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::stream::{Done, Ended};
use nexus_wire::frames::{CopyError, FULL, copy};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
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

impl<R> OfProgram<R> {
    pub(crate) fn new(read: R) -> Self {
        Self { read, is_bulk: false }
    }
}

impl<R: AsyncRead + AsRef<TcpStream> + Unpin> AsyncRead for OfProgram<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let is_bulk = std::mem::take(&mut self.is_bulk);
        let socket: &TcpStream = self.read.as_ref();
        if is_bulk && rustix::io::ioctl_fionread(socket).is_ok_and(|left| left < FULL as u64) {
            rustix::thread::sched_yield();
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.read).poll_read(cx, buf);
        self.is_bulk = buf.filled().len() - before >= FULL;
        polled
    }
}

/// Connects to a port on 127.0.0.1, or on ::1 if nothing listens there.
pub(super) async fn connect(port: u16) -> Result<TcpStream, ToolError> {
    let dial = async {
        match TcpStream::connect((IpAddr::from(Ipv4Addr::LOCALHOST), port)).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                TcpStream::connect((IpAddr::from(Ipv6Addr::LOCALHOST), port)).await.map_err(|_| error)
            }
            connected => connected,
        }
    };
    let failed = |code, why: &str| ToolError::new(code, format!("connect to port {port} in the VM: {why}"));
    match timeout(CONNECT_TIMEOUT, dial).await {
        Ok(Ok(connection)) => {
            // Small writes must not be delayed.
            let _ = connection.set_nodelay(true);
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

/// Forwards a connection until both directions have ended. If the host disconnects, the connection is reset.
pub(super) async fn serve(mut connection: TcpStream, mut receiver: Receiver, sender: Sender) {
    let (read, mut write) = connection.split();
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
            let _ = rustix::net::sockopt::set_socket_linger(&connection, Some(Duration::ZERO));
            return;
        }
    };
    drop(connection);
    finish(receiver, sender, done).await;
}
