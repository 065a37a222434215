//! One connection made by the host: requested, answered, forwarded.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::egress::{
    ANSWER_MAX, EgressAnswer, EgressError, EgressFailure, EgressKind, EgressOpening, VERSION, WINDOW,
};
use nexus_schema::link::EGRESS_PORT;
use nexus_wire::duplex;
use nexus_wire::frames;
use nix::sys::socket::{self, SockFlag, VsockAddr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_vsock::VMADDR_CID_HOST;

use super::spare::{Ends, connect};
use crate::agent::{Agent, Place, SOCKET, ShortPath, privileged_socket};

/// Timeout of the host's answer: it resolves the name, and tries its addresses.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for the host to disconnect at the end.
const LINGER: Duration = Duration::from_secs(5);
/// The same for a host that gives no credit. Until it disconnects, much data may still be on its way to a machine that reads slowly.
const LONG_LINGER: Duration = Duration::from_mins(10);

/// A connection that the host has made.
#[derive(Debug)]
pub(super) struct Made {
    ends: Ends,
    /// What was read after the answer.
    read: BytesMut,
    /// Whether the frames are without credit.
    without_credit: bool,
}

/// Asks the host for a connection.
pub(super) async fn open(agent: &Agent, host: &str, port: u16, how: EgressKind) -> Result<Made, EgressError> {
    let failed = |failure, why: String| EgressError::new(failure, why);
    let lost = |error: io::Error| {
        let failure = match error.kind() {
            io::ErrorKind::TimedOut => EgressFailure::Timeout,
            _ => EgressFailure::Failed,
        };
        failed(failure, format!("cannot reach the VM's host for a connection: {error}"))
    };
    let late = |_| failed(EgressFailure::Timeout, "the VM's host did not answer".to_owned());
    let opening = EgressOpening { version: VERSION, host: host.to_owned(), port, how, without_credit: true };
    let mut line = serde_json::to_vec(&opening).map_err(|error| lost(error.into()))?;
    line.push(b'\n');
    let spare = match agent.proxy.spare.take() {
        // If the host has given it up, it fails at once.
        Some(ends) => timeout(ANSWER_TIMEOUT, ask(ends, &line)).await.map_err(late)?.ok(),
        None => None,
    };
    let (answer, ends, read) = match spare {
        Some(asked) => asked,
        None => {
            let ends = connect(agent).await.map_err(lost)?;
            timeout(ANSWER_TIMEOUT, ask(ends, &line)).await.map_err(late)?.map_err(lost)?
        }
    };
    agent.proxy.spare.want();
    match serde_json::from_slice(&answer) {
        Ok(EgressAnswer::Ok { without_credit }) => Ok(Made { ends, read, without_credit }),
        Ok(EgressAnswer::Error(error)) => Err(error),
        Err(error) => Err(lost(error.into())),
    }
}

/// Sends an opening; returns the line that answers it, the connection, and what was read after the line.
async fn ask((mut reader, mut writer): Ends, opening: &[u8]) -> io::Result<(BytesMut, Ends, BytesMut)> {
    let mut read = BytesMut::new();
    writer.write_all(opening).await?;
    let answer = frames::read_line(&mut reader, &mut read, ANSWER_MAX).await?;
    let answer = answer.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((answer, (reader, writer), read))
}

impl Made {
    /// Forwards a program's connection until both directions have ended. After an error, the caller should reset the program's connection.
    pub(super) async fn carry(
        self,
        read: &mut (impl AsyncRead + Unpin),
        write: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), frames::CopyError> {
        let (mut reader, mut writer) = self.ends;
        if self.without_credit {
            // A program of this guest may take as long as it likes.
            frames::copy_uncredited((&mut reader, &mut writer), &self.read, read, write, None).await?;
            let _ = timeout(LONG_LINGER, reader.read_u8()).await;
            return Ok(());
        }
        let (mut receiver, sender) = frames::over_with(reader, writer, self.read, WINDOW);
        frames::copy(&mut receiver, &sender, read, write).await?;
        // Otherwise data that the host has not read yet could be lost.
        let _ = timeout(LINGER, receiver.next()).await;
        Ok(())
    }
}

/// Connects to the host's port.
pub(super) async fn dial(agent: &Agent) -> io::Result<OwnedFd> {
    if let Some(serial) = agent.serial() {
        return serial.dial(EGRESS_PORT);
    }
    match agent.place() {
        Place::Vm { .. } => dial_vsock().await,
        Place::Process { directory } => {
            let directory = ShortPath::of(directory)?;
            let stream = UnixStream::connect(directory.join(&format!("{SOCKET}_{EGRESS_PORT}"))).await?;
            Ok(stream.into_std()?.into())
        }
    }
}

/// Connects from a port that only root can bind, as the host requires, and without a thread of its own.
async fn dial_vsock() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = privileged_socket(flags)?;
    match socket::connect(socket.as_raw_fd(), &VsockAddr::new(VMADDR_CID_HOST, EGRESS_PORT)) {
        Ok(()) => return Ok(socket),
        Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    duplex::connected(socket).await
}
