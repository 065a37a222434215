//! The agent's side: starts the holder if there is none, and calls it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_schema::link::CommandEnded;
use nexus_schema::stream::Opening;
use nexus_schema::{Tool, ToolError};
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::wire::{self, Answer, FromHolder, OfStream, Request, Settings, ToHolder};
use super::{COMMANDS, SOCKET};
use crate::agent::ShortPath;
use crate::commands::{Orders, Problems, SERVICES_START, descriptors_of_commands};
use crate::console::say;
use crate::os::reason;
use crate::sys::{ChildSetup, prepare_child};
use crate::tools::{Block, Call, Reply, Tell, agent_failed, cancelled};

/// The maximum number of ends of commands that wait to be announced.
const ENDS_MAX: usize = 64;
/// Timeout of a holder to answer an agent that starts.
const FIND_MAX: Duration = Duration::from_secs(2);
/// Timeout for a holder to be found and to exit when told to.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// The holder as an agent sees it.
#[derive(Debug)]
pub(crate) struct Holder {
    /// The directory of its socket and its records.
    directory: PathBuf,
    in_vm: bool,
    connection: tokio::sync::Mutex<Option<Connection>>,
    last: AtomicU64,
    /// The ends of commands that no call was waiting for.
    ends: broadcast::Sender<CommandEnded>,
}

#[derive(Debug, Clone)]
struct Connection {
    outbox: mpsc::UnboundedSender<Vec<u8>>,
    waiting: Arc<Mutex<Waiting>>,
}

/// The calls in progress.
#[derive(Debug, Default)]
struct Waiting {
    calls: HashMap<u64, Waiter>,
    is_lost: bool,
}

struct Waiter {
    done: oneshot::Sender<Result<Answer, ToolError>>,
    tell: Option<Tell>,
}

impl std::fmt::Debug for Waiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiter").finish_non_exhaustive()
    }
}

impl Holder {
    /// Creates a client of the holder whose files are in `directory`; `in_vm` says whether it belongs to a VM.
    pub(crate) fn new(directory: PathBuf, in_vm: bool) -> Self {
        let ends = broadcast::Sender::new(ENDS_MAX);
        Self { directory, in_vm, connection: tokio::sync::Mutex::default(), last: AtomicU64::new(0), ends }
    }

    /// Hears of the ends of commands that no call was waiting for.
    pub(crate) fn ends(&self) -> broadcast::Receiver<CommandEnded> {
        self.ends.subscribe()
    }

    /// Connects to the holder of an earlier agent, if there is one, as [`find_again`](Self::find_again) does. Waits at most [`FIND_MAX`]: a holder may wait
    /// for a command that stands still before it has begun, and only an agent lets that go on.
    pub(crate) async fn find_soon(&self) {
        let _ = tokio::time::timeout(FIND_MAX, self.find_again()).await;
    }

    /// Connects to the holder of an earlier agent, if there is one and it is not connected yet. Waits until it answers.
    pub(crate) async fn find_again(&self) {
        let mut connection = self.connection.lock().await;
        if connection.as_ref().is_some_and(|known| !known.waiting().is_lost) {
            return;
        }
        if let Ok(stream) = self.dial().await {
            *connection = Some(Connection::over(stream, self.ends.clone()));
        }
    }

    /// Lets the holder run a tool call, and returns its answer.
    pub(crate) async fn call<T: Tool>(
        &self,
        call: Call,
        params: T::Params,
    ) -> Result<Reply<T::Output>, ToolError> {
        let broken = |error: serde_json::Error| agent_failed(format!("{}: {error}", T::NAME));
        let raw = to_raw_value(&params).map_err(broken)?;
        drop(params);
        let Answer { header, blocks, facts } = self.ask(call, T::NAME, raw).await?;
        let facts = serde_json::from_str(facts.get()).map_err(broken)?;
        let blocks = blocks.into_iter().map(|(stream, text)| match stream {
            Some(OfStream::Stdout) => Block::stream("stdout", text),
            Some(OfStream::Stderr) => Block::stream("stderr", text),
            None => Block::talk(text),
        });
        Ok(Reply { header, blocks: blocks.collect(), facts })
    }

    /// Lets the holder start the image's services; returns problems as messages.
    pub(crate) async fn start_services(&self, call: Call, orders: &Orders) -> Result<Vec<String>, ToolError> {
        let broken = |error: serde_json::Error| agent_failed(format!("{SERVICES_START}: {error}"));
        let answer = self.ask(call, SERVICES_START, to_raw_value(orders).map_err(broken)?).await?;
        let Problems { problems } = serde_json::from_str(answer.facts.get()).map_err(broken)?;
        Ok(problems)
    }

    async fn ask(&self, call: Call, tool: &str, params: Box<RawValue>) -> Result<Answer, ToolError> {
        let connection = self
            .connect()
            .await
            .map_err(|error| agent_failed(format!("start the command holder: {}", reason(&error))))?;
        let id = self.last.fetch_add(1, Ordering::Relaxed);
        let request = Request {
            id,
            tool: tool.to_owned(),
            params,
            client: call.client,
            trace: call.trace,
            progress: call.tell.is_some(),
            settings: call.settings.of_commands(&call.agent.proxy),
        };
        let mut outcome = connection.begin(id, call.tell)?;
        let mut guard = Guard { connection, id, is_over: false };
        guard.say(&ToHolder::Call(request));
        let outcome = tokio::select! {
            outcome = &mut outcome => outcome,
            () = call.cancel.cancelled() => {
                guard.is_over = true;
                let wants_kill = call.wants_kill.load(Ordering::Acquire);
                guard.say(&if wants_kill { ToHolder::Cancel(id) } else { ToHolder::Leave(id) });
                return Err(cancelled());
            }
        };
        guard.is_over = true;
        outcome.unwrap_or_else(|_| Err(lost()))
    }

    /// Hands a command's stream over to the holder, so that it outlives this process. The holder answers on it.
    pub(crate) async fn hand_over(
        &self,
        socket: impl AsFd,
        opening: Opening,
        settings: Settings,
    ) -> Result<(), ToolError> {
        let failed =
            |error: io::Error| agent_failed(format!("connect to the command holder: {}", reason(&error)));
        // This starts the holder if necessary, and binds its commands to this process's directory, as with calls.
        self.connect().await.map_err(failed)?;
        let mut stream = self.dial().await.map_err(failed)?;
        let message = wire::frame(&ToHolder::Stream(wire::Stream { opening, settings })).map_err(failed)?;
        stream.write_all(&message).await.map_err(failed)?;
        wire::send_socket(&stream, socket).await.map_err(failed)
    }

    /// Tells the holder to kill all commands and exit, also one that was not found before. Waits until it has, at most [`END_TIMEOUT`].
    pub(crate) async fn end(&self) {
        let ended = async {
            self.find_again().await;
            let Some(connection) = self.connection.lock().await.take() else { return };
            if let Ok(frame) = wire::frame(&ToHolder::End) {
                let _ = connection.outbox.send(frame);
            }
            connection.outbox.closed().await;
        };
        let _ = tokio::time::timeout(END_TIMEOUT, ended).await;
    }

    async fn connect(&self) -> io::Result<Connection> {
        let mut connection = self.connection.lock().await;
        match &*connection {
            Some(connection) if !connection.waiting().is_lost => Ok(connection.clone()),
            _ => {
                let stream = match self.dial().await {
                    Ok(stream) => stream,
                    Err(_) => {
                        self.start()?;
                        self.dial().await?
                    }
                };
                Ok(connection.insert(Connection::over(stream, self.ends.clone())).clone())
            }
        }
    }

    /// Connects to a running holder.
    async fn dial(&self) -> io::Result<UnixStream> {
        let directory = ShortPath::of(&self.directory)?;
        let mut stream = UnixStream::connect(directory.join(SOCKET)).await?;
        match wire::read(&mut stream).await? {
            Some(FromHolder::Hello) => Ok(stream),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            None => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Starts a holder, which outlives this process. It gets the listening socket, so that clients can connect at once.
    fn start(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.directory)?;
        let directory = ShortPath::of(&self.directory)?;
        let path = directory.join(SOCKET);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(&path)?;
        let program = std::env::current_exe().unwrap_or_else(|_| Path::new("/proc/self/exe").to_owned());
        let mut command = std::process::Command::new(program);
        command.arg(if self.in_vm { "hold" } else { "hold-for-process" }).arg(&self.directory);
        command.stdin(OwnedFd::from(listener)).stdout(Stdio::null());
        if !self.in_vm {
            // Otherwise a reader of this process's stderr would wait for the holder, which outlives this process.
            command.stderr(Stdio::null());
        }
        // A separate session, so that signals to the agent's group do not reach it.
        // It gives commands the limits that it was started with.
        let descriptors = Some(descriptors_of_commands());
        prepare_child(&mut command, ChildSetup { descriptors, ..ChildSetup::default() });
        // The runtime reaps it if it ends first.
        drop(tokio::process::Command::from(command).spawn()?);
        Ok(())
    }
}

fn lost() -> ToolError {
    agent_failed("the command holder was killed, and all commands with it")
        .hint("command_list shows which commands were lost")
}

/// Abandons a call if it is dropped before the call has ended.
struct Guard {
    connection: Connection,
    id: u64,
    is_over: bool,
}

impl Guard {
    fn say(&self, message: &ToHolder) {
        match wire::frame(message) {
            // If the holder is gone, the reader of its answers reports it.
            Ok(frame) => drop(self.connection.outbox.send(frame)),
            Err(error) => say(format_args!("send to the holder: {error}")),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.connection.waiting().calls.remove(&self.id);
        if !self.is_over {
            self.say(&ToHolder::Leave(self.id));
        }
    }
}

impl Connection {
    fn over(stream: UnixStream, ends: broadcast::Sender<CommandEnded>) -> Self {
        let (reader, mut writer) = stream.into_split();
        let (outbox, mut frames) = mpsc::unbounded_channel::<Vec<u8>>();
        let waiting: Arc<Mutex<Waiting>> = Arc::default();
        let mut reading = tokio::spawn(hear(reader, waiting.clone(), ends));
        tokio::spawn(async move {
            loop {
                let frame = tokio::select! {
                    frame = frames.recv() => frame,
                    // The holder is gone; closing this channel reports that.
                    _ = &mut reading => break,
                };
                let Some(frame) = frame else {
                    reading.abort();
                    break;
                };
                if writer.write_all(&frame).await.is_err() {
                    let _ = reading.await;
                    break;
                }
            }
        });
        Self { outbox, waiting }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(
        &self,
        id: u64,
        tell: Option<Tell>,
    ) -> Result<oneshot::Receiver<Result<Answer, ToolError>>, ToolError> {
        let (done, outcome) = oneshot::channel();
        let mut waiting = self.waiting();
        if waiting.is_lost {
            return Err(lost());
        }
        waiting.calls.insert(id, Waiter { done, tell });
        Ok(outcome)
    }
}

/// Reads a holder's messages until it disconnects.
async fn hear(
    mut reader: OwnedReadHalf,
    waiting: Arc<Mutex<Waiting>>,
    ends: broadcast::Sender<CommandEnded>,
) {
    let lock = || waiting.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match wire::read(&mut reader).await {
            Ok(Some(FromHolder::Hello)) => {}
            Ok(Some(FromHolder::Done(id, outcome))) => {
                let waiter = lock().calls.remove(&id);
                if let Some(waiter) = waiter {
                    // The caller may be gone.
                    let _ = waiter.done.send(outcome);
                }
            }
            Ok(Some(FromHolder::Progress(id, text))) => {
                let tell = lock().calls.get(&id).and_then(|waiter| waiter.tell.clone());
                if let Some(tell) = tell {
                    tell(&text);
                }
            }
            // Without a host, nobody hears it.
            Ok(Some(FromHolder::Ended(ended))) => drop(ends.send(ended)),
            Ok(None) => break,
            Err(error) => {
                say(format_args!("read from the holder: {error}"));
                break;
            }
        }
    }
    let mut waiting = lock();
    waiting.is_lost = true;
    // Closes each caller's channel, which reports the end.
    waiting.calls.clear();
}

/// Returns the holder's directory in a VM.
pub(crate) fn directory_in_vm() -> PathBuf {
    COMMANDS.into()
}

#[cfg(test)]
mod tests {
    use nexus_schema::id::CommandId;
    use tokio::net::UnixListener;

    use super::*;

    /// Much longer than anything takes that works.
    const LONG: Duration = Duration::from_secs(60);

    /// Answers the next agent that connects, as a holder.
    async fn answer(listener: &UnixListener) -> UnixStream {
        let accepted = tokio::time::timeout(LONG, listener.accept()).await;
        let (mut stream, _) = accepted.expect("an agent connects").unwrap();
        stream.write_all(&wire::frame(&FromHolder::Hello).unwrap()).await.unwrap();
        stream
    }

    fn place() -> (tempfile::TempDir, UnixListener, Arc<Holder>) {
        let place = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(place.path().join(SOCKET)).unwrap();
        let holder = Arc::new(Holder::new(place.path().to_owned(), false));
        (place, listener, holder)
    }

    #[tokio::test]
    async fn a_holder_that_is_found_without_a_call_is_heard_and_kept() {
        let (_place, listener, holder) = place();
        let mut ends = holder.ends();
        let finding = holder.clone();
        let finding = tokio::spawn(async move { finding.find_again().await });
        let mut found = answer(&listener).await;
        finding.await.unwrap();
        // It is connected, so nobody has to answer.
        tokio::time::timeout(LONG, holder.find_again()).await.expect("it is not dialled twice");
        let command_id = CommandId::from_random([7; 8]).unwrap();
        let ended = CommandEnded { command_id, status: 3, duration_ms: 1 };
        found.write_all(&wire::frame(&FromHolder::Ended(ended)).unwrap()).await.unwrap();
        assert_eq!(tokio::time::timeout(LONG, ends.recv()).await.unwrap().unwrap(), ended);
        // Once it is gone, another one is found.
        drop(found);
        let lost = || async { holder.connection.lock().await.as_ref().unwrap().waiting().is_lost };
        while !lost().await {
            tokio::task::yield_now().await;
        }
        let finding = holder.clone();
        let finding = tokio::spawn(async move { finding.find_again().await });
        let _found = answer(&listener).await;
        finding.await.unwrap();
        assert!(!lost().await);
    }

    #[tokio::test]
    async fn a_holder_that_was_not_found_is_told_to_end() {
        let (_place, listener, holder) = place();
        let ending = tokio::spawn(async move { holder.end().await });
        let mut found = answer(&listener).await;
        let told: Option<ToHolder> =
            tokio::time::timeout(LONG, wire::read(&mut found)).await.unwrap().unwrap();
        assert!(matches!(told, Some(ToHolder::End)), "{told:?}");
        drop(found);
        ending.await.unwrap();
    }
}
