//! One connection of a guest, from its opening to its end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nexus_schema::egress::{
    EgressAnswer, EgressError, EgressFailure, EgressOpening, OPENING_MAX, OPENING_TIMEOUT, WINDOW,
};
use nexus_schema::network::NetworkPolicy;
use nexus_wire::duplex::{self, Reader, Writer};
use nexus_wire::frames::{self, CopyError, FrameError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::counted::Passed;
use super::dial::{Dialled, Way, dial};
use super::state::{Counted, Egress};

/// Timeout for a guest to read an answer, and then to close the connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves a connection until it ends. A violation by the guest ends only this connection.
pub(super) async fn serve(egress: Arc<Egress>, stream: UnixStream) -> io::Result<()> {
    let socket: OwnedFd = stream.into_std()?.into();
    let (mut reader, mut writer) = duplex::split(socket)?;
    let mut read = BytesMut::new();
    let line = match timeout(OPENING_TIMEOUT, frames::read_line(&mut reader, &mut read, OPENING_MAX)).await {
        Ok(Ok(Some(line))) => EgressOpening::parse(&line),
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            Err(EgressError::new(EgressFailure::Invalid, format!("open a connection: {error}")))
        }
        // The guest is gone: there is nobody to answer.
        Ok(Ok(None) | Err(_)) | Err(_) => return Ok(()),
    };
    let dialled = match line {
        Ok(opening) => tokio::select! {
            dialled = dial(&egress, &opening) => dialled.map(|dialled| (dialled, opening.without_credit)),
            // The guest closed the connection and does not wait for an answer.
            _ = reader.read_u8(), if read.is_empty() => return Ok(()),
        },
        Err(error) => Err(error),
    };
    match dialled {
        Ok((Dialled { stream, way }, without_credit)) => {
            let answered = answer(&mut writer, &EgressAnswer::Ok { without_credit }).await;
            // The guest does not wait for the log.
            way.log(&egress);
            answered?;
            carry(&egress, stream, &way, Ends { halves: (reader, writer), read, without_credit }).await;
        }
        Err(error) => {
            answer(&mut writer, &EgressAnswer::Error(error)).await?;
            writer.shutdown().await?;
            // Otherwise data that the guest has not read yet could be lost.
            let _ = timeout(ANSWER_TIMEOUT, reader.read_u8()).await;
        }
    }
    Ok(())
}

async fn answer(writer: &mut Writer, answer: &EgressAnswer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    timeout(ANSWER_TIMEOUT, writer.write_all(&line))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// The connection to the guest, after the answer.
struct Ends {
    halves: (Reader, Writer),
    /// What was read after the opening.
    read: BytesMut,
    /// Whether the frames are without credit.
    without_credit: bool,
}

impl Ends {
    /// Copies until both directions have ended.
    async fn copy(
        self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), CopyError> {
        let Self { halves: (mut reader, mut writer), read, without_credit } = self;
        if without_credit {
            return frames::copy_uncredited((&mut reader, &mut writer), &read, from, to).await;
        }
        let (mut receiver, sender) = frames::over_with(reader, writer, read, WINDOW);
        match frames::copy(&mut receiver, &sender, from, to).await? {
            None => Ok(()),
            // There is no final message on these connections.
            Some(_) => Err(FrameError::Closed.into()),
        }
    }
}

/// Relays the connection until both directions have ended, or the policy no longer allows it.
async fn carry(egress: &Egress, mut stream: TcpStream, way: &Way, ends: Ends) {
    let _open = Counted::new(&egress.counts.open);
    let policy = egress.policy();
    let (from, to) = stream.split();
    let mut from = Passed::new(from, &egress.counts.received, &egress.to_vm);
    let mut to = Passed::new(to, &egress.counts.sent, &egress.from_vm);
    let is_whole = tokio::select! {
        biased;
        denied = no_longer_allowed(policy, way) => {
            tracing::debug!(?denied, "closing a guest's connection that its changed policy no longer allows");
            denied.noted(egress);
            false
        }
        copied = ends.copy(&mut from, &mut to) => copied.is_ok(),
    };
    if !is_whole {
        // The other machine gets a reset instead of a normal end.
        let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
    }
}

/// Waits until the policy no longer allows a connection.
async fn no_longer_allowed(
    mut policy: watch::Receiver<Arc<NetworkPolicy>>,
    way: &Way,
) -> super::dial::Denied {
    loop {
        // The policy may have changed while the connection was being made.
        let now = policy.borrow_and_update().clone();
        if let Err(denied) = way.check(&now) {
            return denied;
        }
        if policy.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
