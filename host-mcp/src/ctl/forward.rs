//! `nexusctl forward`: forwards local ports to ports in a VM.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nexus_schema::Reference;
use nexus_schema::id::VmKind;
use nexus_schema::stream::{Done, Open, TcpOpening};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};

use super::App;
use super::client::{Client, raw};
use super::error::Error;
use super::stream::{self, Stream};
use super::ui::Format;
use crate::frames::{CopyError, Incoming, copy};

/// The maximum number of connections at once.
const CONNECTIONS_MAX: usize = 200;
/// The delay after a listener fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What leads where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// A loopback port of this host and a port in the VM; a single number means both. HOSTPORT 0 chooses any free port
    #[arg(required = true, value_name = "[HOSTPORT:]PORT", value_parser = ports)]
    ports: Vec<Ports>,
}

/// A port of the host, and one in the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ports {
    host: u16,
    guest: u16,
}

fn ports(text: &str) -> Result<Ports, String> {
    let port =
        |word: &str| word.parse::<u16>().map_err(|_| format!("`{word}` is not a valid port: 1 to 65535"));
    let ports = match text.split_once(':') {
        Some((host, guest)) => Ports { host: port(host)?, guest: port(guest)? },
        None => Ports { host: port(text)?, guest: port(text)? },
    };
    if ports.guest == 0 { Err("0 is not a valid port in a VM".into()) } else { Ok(ports) }
}

/// Forwards until it is interrupted.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let vm = args.vm;
    let mut client = app.connect().await?;
    let mut listeners = Vec::new();
    for Ports { host, guest } in args.ports {
        // A missing VM is reported at once instead of at the first connection.
        stream::ticket(&mut client, &vm, Open::Tcp(TcpOpening { port: guest })).await?;
        let taken = |source: io::Error| Error::Listen { port: host, source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, host)).await.map_err(taken)?;
        let address = listener.local_addr().map_err(taken)?;
        match app.ui.format {
            Format::Json => app.ui.json(&raw(&json!({ "listen": address.to_string(), "port": guest }))?)?,
            Format::Quiet => app.ui.line(&address.to_string())?,
            Format::Human => {
                app.ui.say(&format!("forwarding {address} to port {guest} of {vm}; press ctrl-c to stop"))
            }
        }
        listeners.push((listener, guest));
    }
    let daemon = Mutex::new(Some(client));
    let all = futures::future::join_all(
        listeners.into_iter().map(|(listener, port)| serve(app, &daemon, &vm, listener, port)),
    );
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(|source| Error::Input { source })?;
    tokio::select! {
        _ = all => {}
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated.recv() => {}
    }
    Ok(0)
}

/// Serves one port; never ends.
async fn serve(
    app: &App,
    daemon: &Mutex<Option<Client>>,
    vm: &Reference<VmKind>,
    listener: TcpListener,
    port: u16,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut under_way = FuturesUnordered::new();
    loop {
        let (accepted, place) = tokio::select! {
            Some(()) = under_way.next() => continue,
            accepted = async {
                let place = room.clone().acquire_owned().await;
                (listener.accept().await, place)
            } => accepted,
        };
        let connection = match accepted {
            Ok((connection, _)) => connection,
            Err(error) => {
                app.ui.say(&format!("accept a connection: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        under_way.push(async move {
            match open(app, daemon, vm, port).await {
                Ok(stream) => {
                    if let Err(why) = carry(connection, stream).await {
                        app.ui.say(&why);
                    }
                }
                Err(error) => {
                    app.ui.fail(&error);
                    reset(&connection);
                }
            }
            drop(place);
        });
    }
}

/// Opens a stream, with a ticket over a new connection to the daemon if the last one is lost.
async fn open(
    app: &App,
    daemon: &Mutex<Option<Client>>,
    vm: &Reference<VmKind>,
    port: u16,
) -> Result<Stream, Error> {
    let path = {
        let mut daemon = daemon.lock().await;
        let open = Open::Tcp(TcpOpening { port });
        let before = match daemon.take() {
            Some(mut client) => {
                let path = stream::ticket(&mut client, vm, open.clone()).await;
                Some((client, path)).filter(|(_, path)| !matches!(path, Err(Error::Lost { .. })))
            }
            None => None,
        };
        let (client, path) = match before {
            Some(before) => before,
            None => {
                let mut client = app.connect_if_up().await?;
                let path = stream::ticket(&mut client, vm, open).await;
                (client, path)
            }
        };
        *daemon = Some(client);
        path?
    };
    stream::redeem(app, vm, &path).await
}

/// Carries one connection until both directions have ended; an error is text worth showing.
async fn carry(mut connection: TcpStream, stream: Stream) -> Result<(), String> {
    let Stream { mut receiver, sender, .. } = stream;
    // Small packets should not be delayed.
    let _ = connection.set_nodelay(true);
    let (mut read, mut write) = connection.split();
    let done = match copy(&mut receiver, &sender, &mut read, &mut write).await {
        Ok(Some(done)) => Some(done),
        Ok(None) => match receiver.next().await {
            Ok(Some(Incoming::Done(done))) => Some(done),
            Ok(_) | Err(_) => None,
        },
        // The local client disconnected; the connection in the VM ends with the stream.
        Err(CopyError::Read(_) | CopyError::Write(_)) => return Ok(()),
        Err(CopyError::Frames(error)) => {
            reset(&connection);
            return Err(format!("a connection was lost: {error}"));
        }
    };
    if !matches!(done.as_deref().map(serde_json::from_slice), Some(Ok(Done::Ok(_)))) {
        // The server in the VM reset the connection, or the VM is gone.
        reset(&connection);
    }
    Ok(())
}

/// Makes the connection end with a reset.
fn reset(connection: &TcpStream) {
    // It may already be closed.
    let _ = rustix::net::sockopt::set_socket_linger(connection, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_one_number_or_two() {
        assert_eq!(ports("80"), Ok(Ports { host: 80, guest: 80 }));
        assert_eq!(ports("8080:80"), Ok(Ports { host: 8080, guest: 80 }));
        assert_eq!(ports("0:80"), Ok(Ports { host: 0, guest: 80 }));
        for bad in ["", ":", "0", "80:0", "x", "65536", "1:2:3", "-1"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }
}
