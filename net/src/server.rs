//! The socket that nexusd connects to.

use std::io;
use std::path::Path;
use std::sync::Arc;

use nexus_net_wire::ErrorCode;
use nexus_net_wire::{
    Answer, Call, Event, Hello, LINE_MAX, NetError, PROTOCOL, Reply, Request, Watching, decode, encode, peer,
};
use nexus_wire::lines::{Line, LineReader};
use tokio::io::{AsyncWriteExt as _, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::error::Error;
use crate::network::Network;
use crate::view::Shared;

/// A request for the network's task, and the channel for its answer.
pub(crate) type Job = (Request, oneshot::Sender<Result<Answer, NetError>>);

/// Binds the socket, accessible only to its owner. Replaces one that a killed process left.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    listener
}

/// Serves clients until the network is cleaned up.
pub(crate) async fn serve(listener: UnixListener, jobs: mpsc::Sender<Job>, shared: Arc<Shared>) {
    let (ended, mut end) = mpsc::channel::<()>(1);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if is(&stream, peer::is_of_vm) => {
                    tracing::warn!("a shim or a process of a VMM connected to this socket: it is not served");
                }
                Ok((stream, _)) => {
                    let client = client(stream, jobs.clone(), Arc::clone(&shared), ended.clone());
                    tokio::spawn(async move {
                        if let Err(error) = client.await {
                            tracing::debug!(%error, "the connection of a client failed");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            _ = end.recv() => return,
        }
    }
}

/// Returns whether a client is of a kind that is not served: if a guest has taken it over, it would govern the network.
pub(crate) fn is(stream: &UnixStream, kind: fn(u32) -> bool) -> bool {
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
    // A process of another PID namespace has the number 0 here; a VMM cannot make one.
    pid.is_none_or(|pid| pid != 0 && kind(pid))
}

async fn client(
    stream: UnixStream,
    jobs: mpsc::Sender<Job>,
    shared: Arc<Shared>,
    ended: mpsc::Sender<()>,
) -> io::Result<()> {
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = LineReader::new(read, LINE_MAX, LINE_MAX as u64);
    let mut events: Option<broadcast::Receiver<Event>> = None;
    loop {
        let line = tokio::select! {
            line = lines.next() => line?,
            event = next_event(&mut events) => {
                say(&mut write, &Reply::Event { event }).await?;
                continue;
            }
        };
        let call = match line {
            Some(Line::Whole(line)) => decode::<Call>(line),
            Some(Line::TooLong(_)) => {
                let error = invalid(format!("a line is longer than {LINE_MAX} bytes"));
                say(&mut write, &Reply::Error { id: 0, error }).await?;
                continue;
            }
            Some(Line::TooLongEnd { .. }) => continue,
            None => return Ok(()),
        };
        let Call { id, request } = match call {
            Ok(call) => call,
            Err(error) => {
                let error = invalid(format!("{error}: {}", error.source));
                say(&mut write, &Reply::Error { id: 0, error }).await?;
                continue;
            }
        };
        let is_last = matches!(request, Request::Cleanup { .. });
        let answer = match request {
            Request::Hello { .. } => Ok(Answer::Hello(Hello {
                protocol: PROTOCOL,
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            })),
            Request::Watch {} => {
                events = Some(shared.denials.watch());
                Ok(Answer::Watch(Watching {}))
            }
            request => {
                let (done, answer) = oneshot::channel();
                let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
                jobs.send((request, done)).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
                answer.await.map_err(gone)?
            }
        };
        let is_done = answer.is_ok();
        let reply = match answer {
            Ok(answer) => Reply::Answer { id, answer },
            Err(error) => Reply::Error { id, error },
        };
        say(&mut write, &reply).await?;
        if is_last && is_done {
            write.shutdown().await?;
            // The channel is full if another client has requested the same.
            let _ = ended.try_send(());
            return Ok(());
        }
    }
}

async fn next_event(events: &mut Option<broadcast::Receiver<Event>>) -> Event {
    let Some(events) = events else { return std::future::pending().await };
    match events.recv().await {
        Ok(event) => event,
        Err(RecvError::Lagged(missed)) => Event::Missed(missed),
        Err(RecvError::Closed) => std::future::pending().await,
    }
}

async fn say(write: &mut WriteHalf<UnixStream>, reply: &Reply) -> io::Result<()> {
    write.write_all(&encode(reply)).await
}

fn invalid(message: String) -> NetError {
    NetError { code: ErrorCode::Invalid, message, hint: None }
}

/// Handles requests one after the other; reverts changes by other programs, and tries again what failed for now, in between.
pub(crate) async fn work(
    mut network: Network,
    mut jobs: mpsc::Receiver<Job>,
    mut changed: mpsc::Receiver<()>,
) {
    loop {
        let due = network.due();
        tokio::select! {
            biased;
            job = jobs.recv() => {
                let Some((request, done)) = job else { return };
                let answer = perform(&mut network, request).await;
                if let Err(error) = &answer {
                    tracing::warn!(%error, cause = ?std::error::Error::source(error), "a request failed");
                }
                // The client may be gone; its request is done anyway.
                let _ = done.send(answer.map_err(|error| error.to_wire()));
            }
            seen = changed.recv() => {
                if seen.is_none() {
                    return;
                }
                if let Err(error) = network.repair().await {
                    tracing::warn!(%error, cause = ?std::error::Error::source(&error), "cannot repair the network");
                }
            }
            () = until(due) => network.try_again(),
        }
    }
}

async fn until(due: Option<std::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

async fn perform(network: &mut Network, request: Request) -> Result<Answer, Error> {
    Ok(match request {
        Request::Configure { instance } => Answer::Configure(network.configure(instance).await?),
        Request::Attach { vm } => Answer::Attach(network.attach(vm).await?),
        Request::Update { vm } => Answer::Update(network.update(vm).await?),
        Request::Detach { id } => Answer::Detach(network.detach(id).await?),
        Request::State {} => Answer::State(Box::new(network.state().await?)),
        Request::Retain { ids } => Answer::Retain(network.retain(ids).await?),
        Request::Cleanup { instance } => Answer::Cleanup(network.cleanup(instance).await?),
        Request::Hello { .. } | Request::Watch {} => {
            return Err(Error::Invalid {
                what: "this request cannot be handled by the network's task".to_owned(),
            });
        }
    })
}
