//! The holder: a process that owns all commands with their pipes, terminals and output, so that they outlive the agent.
//!
//! ```text
//! host ── port 200 ── agent ── Unix socket ── holder ── commands
//!                     may die                 starts, reads, waits for and kills them
//!      ── port 201 ── agent ── hands over ──> holder: the streams of commands
//! ```
//! The agent starts it for the first command, and passes the listening socket as its stdin. A restarted agent connects to
//! it again. If the holder itself is killed, its commands are killed too; the next holder reports which they were.

pub(crate) mod client;
pub(crate) mod wire;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use nexus_schema::link::CommandEnded;
use nix::sys::signal::SigSet;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::wire::{FromHolder, Stream, ToHolder};
use crate::commands::{Caller, Table};
use crate::console::say;
use crate::os::reason;
use crate::runtime;
use crate::tools::caught;

/// The directory of a VM's holder, with its socket and its records.
const COMMANDS: &str = "/run/nexus/commands";
/// The name of its socket.
const SOCKET: &str = "socket";
/// How long a holder outside a VM waits for another agent before it kills its commands and exits.
const LINGER: Duration = Duration::from_secs(20);
/// How long commands may take to end by themselves when the VM shuts down.
const DOWN_TIMEOUT: Duration = Duration::from_secs(4);

/// Runs a holder until it exits.
pub(crate) fn run(directory: PathBuf, in_vm: bool) -> ExitCode {
    // A distinct name in process listings. A failure does not matter.
    let _ = rustix::thread::set_name(c"nexus-commands");
    if let Err(error) = SigSet::empty().thread_set_mask() {
        say(format_args!("unblock signals: {error}"));
    }
    let held = runtime::with_pool(8).and_then(|runtime| {
        let held = runtime.block_on(hold(directory, in_vm));
        runtime.shutdown_background();
        held
    });
    match held {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("cannot hold commands: {}", reason(&error)));
            ExitCode::FAILURE
        }
    }
}

async fn hold(directory: PathBuf, in_vm: bool) -> io::Result<()> {
    let listener = std::os::unix::net::UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let table = Table::new(directory, in_vm);
    let agents = watch::Sender::new(0_usize);
    let end = CancellationToken::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let own = rustix::process::geteuid().as_raw();
                if !stream.peer_cred().is_ok_and(|peer| peer.uid() == own) {
                    continue;
                }
                let (table, agents, end) = (table.clone(), agents.clone(), end.clone());
                agents.send_modify(|count| *count += 1);
                tokio::spawn(async move {
                    serve(stream, table, end).await;
                    agents.send_modify(|count| *count -= 1);
                });
            }
            () = end.cancelled() => break,
            _ = terminate.recv() => {
                if in_vm {
                    // All processes got SIGTERM, including the commands; a shell in a terminal reacts only to a hangup.
                    table.go_down();
                    let _ = tokio::time::timeout(DOWN_TIMEOUT, table.all_ended()).await;
                }
                break;
            }
            () = alone(agents.subscribe()), if !in_vm => break,
        }
    }
    table.kill_all().await;
    Ok(())
}

/// Waits until there has been no agent for [`LINGER`].
async fn alone(mut agents: watch::Receiver<usize>) {
    loop {
        // The sender lives as long as this.
        let _ = agents.wait_for(|count| *count == 0).await;
        if tokio::time::timeout(LINGER, agents.wait_for(|count| *count > 0)).await.is_err() {
            return;
        }
    }
}

/// Serves one agent until it disconnects. Its commands keep running.
async fn serve(stream: UnixStream, table: Arc<Table>, end: CancellationToken) {
    let (mut reader, mut writer) = stream.into_split();
    let (answers, mut outbox) = mpsc::unbounded_channel::<FromHolder>();
    drop(answers.send(FromHolder::Hello));
    let writing = tokio::spawn(async move {
        while let Some(answer) = outbox.recv().await {
            let Ok(frame) = wire::frame(&answer) else { continue };
            drop(answer);
            if writer.write_all(&frame).await.is_err() {
                break;
            }
        }
    });
    let announcing = tokio::spawn(announce(table.ends(), answers.clone()));
    let under_way: Arc<Mutex<HashMap<u64, UnderWay>>> = Arc::default();
    let lock = || under_way.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let message = match wire::read(&mut reader).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(error) => {
                say(format_args!("read from the agent: {}", reason(&error)));
                break;
            }
        };
        match message {
            ToHolder::Call(request) => {
                let id = request.id;
                let cancel = CancellationToken::new();
                let tell: Option<Box<dyn Fn(String) + Send + Sync>> = request.progress.then(|| {
                    let answers = answers.clone();
                    Box::new(move |text| drop(answers.send(FromHolder::Progress(id, text)))) as Box<_>
                });
                let caller = Caller {
                    client: request.client,
                    trace: request.trace,
                    settings: request.settings,
                    cancel: cancel.clone(),
                    tell,
                };
                let (table, answers, under_way) = (table.clone(), answers.clone(), under_way.clone());
                let mut work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
                    let call = pin!(table.call(&request.tool, request.params, caller));
                    let outcome = caught(call).await;
                    under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                    drop(answers.send(FromHolder::Done(id, outcome)));
                });
                // At once: the command begins, also if the next message says that its caller is gone. The new task polls it again, which
                // registers the real waker.
                if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
                    let work = tokio::spawn(work);
                    lock().insert(id, UnderWay { cancel, work });
                }
            }
            ToHolder::Cancel(id) => {
                if let Some(call) = lock().get(&id) {
                    call.cancel.cancel();
                }
            }
            ToHolder::Leave(id) => {
                if let Some(call) = lock().remove(&id) {
                    call.work.abort();
                }
            }
            ToHolder::Stream(Stream { opening, settings }) => {
                match wire::receive_socket(reader.as_ref()).await {
                    Ok(socket) => table.stream(socket, opening, settings).await,
                    Err(error) => say(format_args!("receive a stream: {}", reason(&error))),
                }
                break;
            }
            ToHolder::End => {
                end.cancel();
                // Closing the connection at exit tells the agent that everything is done.
                std::future::pending::<()>().await;
            }
        }
    }
    for (_, call) in lock().drain() {
        call.work.abort();
    }
    announcing.abort();
    writing.abort();
}

/// Tells an agent of the ends of commands. Those that come too fast are left out.
async fn announce(mut ends: broadcast::Receiver<CommandEnded>, answers: mpsc::UnboundedSender<FromHolder>) {
    loop {
        match ends.recv().await {
            Ok(ended) if answers.send(FromHolder::Ended(ended)).is_ok() => {}
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Ok(_) | Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// A call in progress that an agent waits for.
struct UnderWay {
    cancel: CancellationToken,
    work: tokio::task::JoinHandle<()>,
}
