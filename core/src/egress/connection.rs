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
/// Timeout of a write to a machine that has ended its own direction, once the guest is gone: otherwise it could keep a place among the VM's connections.
const PATIENCE: Duration = Duration::from_mins(10);

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
            let halves = (&mut reader, &mut writer);
            return frames::copy_uncredited(halves, &read, from, to, Some(PATIENCE)).await;
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

#[cfg(test)]
mod tests {
    use nexus_schema::id::VmId;
    use nexus_schema::network::NetworkMode;
    use tokio::net::TcpListener;

    use super::*;
    use crate::egress::{Egresses, read_log};
    use crate::event::Events;

    #[tokio::test]
    async fn guests_get_frames_with_or_without_credit_as_they_ask() {
        let directory = tempfile::tempdir().unwrap();
        let egresses = Egresses::new(directory.path().to_owned(), Events::new());
        let vm = VmId::from_i64(1).unwrap();
        let allow = vec!["127.0.0.1".parse().unwrap()];
        let policy = NetworkPolicy { mode: NetworkMode::Proxy, allow, ..NetworkPolicy::default() };
        let egress = egresses.of(vm, &policy);
        let here = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = here.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = here.accept().await {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
            }
        });
        let without = ",\"without_credit\":true";
        for (asked, answer) in [("", "{\"ok\":{}}\n"), (without, "{\"ok\":{\"without_credit\":true}}\n")] {
            let (mut guest, host) = UnixStream::pair().unwrap();
            let serving = tokio::spawn(serve(egress.clone(), host));
            let opening = format!(
                "{{\"version\":1,\"host\":\"127.0.0.1\",\"port\":{port},\"how\":\"connect\"{asked}}}\n"
            );
            guest.write_all(opening.as_bytes()).await.unwrap();
            let mut said = vec![0; answer.len()];
            guest.read_exact(&mut said).await.unwrap();
            assert_eq!(String::from_utf8(said).unwrap(), answer);
            let frames = b"\x01\0\0\x05hello\x03\0\0\0";
            guest.write_all(frames).await.unwrap();
            let mut back = Vec::new();
            guest.read_to_end(&mut back).await.unwrap();
            assert_eq!(back, frames);
            serving.await.unwrap().unwrap();
        }
        let count = |of: &std::sync::atomic::AtomicU64| of.load(std::sync::atomic::Ordering::Relaxed);
        let counts = &egress.counts;
        assert_eq!(
            [&counts.allowed, &counts.open, &counts.sent, &counts.received].map(count),
            [2, 0, 10, 10]
        );
        let logged = async {
            loop {
                let logged = read_log(directory.path(), vm, None, 9).unwrap().0.len();
                if logged >= 2 {
                    return logged;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert_eq!(timeout(ANSWER_TIMEOUT, logged).await.unwrap(), 2);
    }
}
