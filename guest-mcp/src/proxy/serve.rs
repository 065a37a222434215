//! Programs that connect to the proxy.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::egress::{CONNECTIONS_MAX, EgressError, EgressKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::host::{self, Made};
use super::{http, socks};
use crate::agent::Agent;

/// Timeout of a program's request.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for a program to disconnect after an answer that ends its connection.
const LINGER: Duration = Duration::from_secs(2);
/// Pause after a failed accept, for example when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts programs forever. If too many are connected, further ones wait.
pub(super) async fn accept(agent: Arc<Agent>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    // A program that disconnects is not an error.
                    let _ = serve(&agent, stream).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// A program's connection.
pub(super) struct Program {
    pub(super) read: OwnedReadHalf,
    pub(super) write: OwnedWriteHalf,
}

impl Program {
    /// Sends the final bytes, and waits briefly until the program has read them.
    pub(super) async fn dismiss(mut self, last: &[u8]) -> io::Result<()> {
        let said = async {
            self.write.write_all(last).await?;
            self.write.shutdown().await
        };
        timeout(LINGER, said).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let _ = timeout(LINGER, tokio::io::copy(&mut self.read, &mut tokio::io::sink())).await;
        Ok(())
    }

    /// Resets the connection, so that the program does not take it for a normal end.
    pub(super) fn reset(self) {
        if let Ok(stream) = self.read.reunite(self.write) {
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
    }
}

async fn serve(agent: &Agent, stream: TcpStream) -> io::Result<()> {
    // Small writes must not be delayed.
    let _ = stream.set_nodelay(true);
    let (read, write) = stream.into_split();
    let mut program = Program { read, write };
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let first = timeout(ASK_TIMEOUT, program.read.read_u8()).await.map_err(late)??;
    if first == socks::VERSION {
        let asked = timeout(ASK_TIMEOUT, socks::ask(&mut program)).await.map_err(late)??;
        return match asked {
            Ok(to) => socks::serve(agent, program, to).await,
            Err(refusal) => program.dismiss(&refusal).await,
        };
    }
    let asked = timeout(ASK_TIMEOUT, http::ask(&mut program, first)).await.map_err(late)??;
    match asked {
        Ok(request) => http::serve(agent, program, request).await,
        Err(refusal) => program.dismiss(&refusal).await,
    }
}

/// Requests a connection from the host, and records a refusal.
pub(super) async fn open(agent: &Agent, host: &str, port: u16, how: EgressKind) -> Result<Made, EgressError> {
    let made = host::open(agent, host, port, how).await;
    if let Err(error) = &made {
        agent.proxy.refused.add(host, port, error);
    }
    made
}
