//! TCP connections to the guest's own loopback, for the host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::stream::{Done, Ended};
use nexus_wire::frames::{CopyError, FULL, Source, copy_spliced};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::open::{Receiver, Sender, finish};
use crate::os::reason;

/// Timeout of a connect. On loopback, only a full backlog makes it wait.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a program sends. Between two reads of much data the program gets the processor if little is left: so on a single one it writes as much as it can,
/// instead of being interrupted after each segment. What is left then is not read, but moved into frames by the kernel.
pub(crate) struct OfProgram<R> {
    read: R,
    is_bulk: bool,
}

impl<R: AsRef<TcpStream>> OfProgram<R> {
    pub(crate) fn new(read: R) -> Self {
        Self { read, is_bulk: false }
    }

    /// Returns how many bytes are left, after the program had the processor if these are few.
    fn left(&self) -> usize {
        let socket: &TcpStream = self.read.as_ref();
        let left = || rustix::io::ioctl_fionread(socket).map_or(0, |left| left as usize);
        let before = left();
        if before >= FULL {
            return before;
        }
        rustix::thread::sched_yield();
        left()
    }
}

impl<R: AsyncRead + AsRef<TcpStream> + Unpin> AsyncRead for OfProgram<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.is_bulk) {
            self.left();
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.read).poll_read(cx, buf);
        self.is_bulk = buf.filled().len() - before >= FULL;
        polled
    }
}

impl<R: AsyncRead + AsRef<TcpStream> + Unpin> Source for OfProgram<R> {
    fn much(&mut self) -> Option<(usize, BorrowedFd<'_>)> {
        if !self.is_bulk {
            return None;
        }
        let left = self.left();
        self.is_bulk = left >= FULL;
        let socket: &TcpStream = self.read.as_ref();
        self.is_bulk.then(|| (left, socket.as_fd()))
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
    let copied = copy_spliced(&mut receiver, &sender, &mut read, &mut write).await;
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
