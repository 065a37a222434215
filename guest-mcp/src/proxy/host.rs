//! One connection made by the host: requested, answered, forwarded.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::egress::{
    ANSWER_MAX, EgressAnswer, EgressError, EgressFailure, EgressKind, EgressOpening, VERSION, WINDOW,
};
use nexus_schema::link::EGRESS_PORT;
use nexus_wire::duplex::{self, Reader, Writer};
use nexus_wire::frames;
use nix::sys::socket::{self, SockFlag, VsockAddr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_vsock::VMADDR_CID_HOST;

use crate::agent::{Agent, Place, SOCKET, ShortPath, privileged_socket};

/// Timeout of the connection to the host.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of the host's answer: it resolves the name, and tries its addresses.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for a host that gives credit to disconnect at the end.
const LINGER: Duration = Duration::from_secs(5);

/// A connection that the host has made.
#[derive(Debug)]
pub(super) struct Made {
    ends: (Reader, Writer),
    /// What was read after the answer.
    read: BytesMut,
    /// Whether the frames are without credit.
    without_credit: bool,
}

/// Asks the host for a connection.
pub(super) async fn open(agent: &Agent, host: &str, port: u16, how: EgressKind) -> Result<Made, EgressError> {
    let failed = |failure, why: String| EgressError::new(failure, why);
    let lost = |error: io::Error| {
        failed(EgressFailure::Failed, format!("cannot reach the VM's host for a connection: {error}"))
    };
    let late = |_| failed(EgressFailure::Timeout, "the VM's host did not answer".to_owned());
    let socket = timeout(DIAL_TIMEOUT, dial(agent)).await.map_err(late)?.map_err(lost)?;
    let (mut reader, mut writer) = duplex::split(socket).map_err(lost)?;
    let opening = EgressOpening { version: VERSION, host: host.to_owned(), port, how, without_credit: true };
    let mut line = serde_json::to_vec(&opening).map_err(|error| lost(error.into()))?;
    line.push(b'\n');
    let mut read = BytesMut::new();
    let answer = async {
        writer.write_all(&line).await?;
        frames::read_line(&mut reader, &mut read, ANSWER_MAX).await
    };
    let answer = timeout(ANSWER_TIMEOUT, answer).await.map_err(late)?.map_err(lost)?;
    let answer = answer.ok_or_else(|| lost(io::ErrorKind::UnexpectedEof.into()))?;
    match serde_json::from_slice(&answer) {
        Ok(EgressAnswer::Ok { without_credit }) => Ok(Made { ends: (reader, writer), read, without_credit }),
        Ok(EgressAnswer::Error(error)) => Err(error),
        Err(error) => Err(lost(error.into())),
    }
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
            frames::copy_uncredited((&mut reader, &mut writer), &self.read, read, write).await?;
            // Until the host has passed on all data: much of it may still be on its way.
            let _ = reader.read_u8().await;
            return Ok(());
        }
        let (mut receiver, sender) = frames::over_with(reader, writer, self.read, WINDOW);
        frames::copy(&mut receiver, &sender, read, write).await?;
        // Otherwise data that the host has not read yet could be lost.
        let _ = timeout(LINGER, receiver.next()).await;
        Ok(())
    }
}

async fn dial(agent: &Agent) -> io::Result<OwnedFd> {
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
