//! Streams of commands: an attached client sees a command's output, and writes its input.
//!
//! ```text
//! pipe or terminal ──> reading ─┬─> kept ──> watchers: at their own speed; learn how much they missed
//!                               └─> sink: at most one, gets every byte; reading waits for it
//! input <── feeding <── the sink's client
//! ```
//! The end of a stream does not end its command.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::stream::{AttachOpening, Control, Done, Ended, ExecOpening, Notice, Open, Opened, Opening};
use nexus_wire::frames::{FULL, FrameError, Incoming};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::calls::{order, resize, signal};
use super::command::{Command, Stream, Whose};
use super::show::signal_name;
use super::table::Table;
use crate::agent::{self, Sender};
use crate::holder::wire::Settings;
use crate::tools::agent_failed;

/// The maximum size of one piece for a watcher, in bytes.
const PIECE: usize = FULL;

/// The receiver of all of a command's output.
#[derive(Debug)]
pub(super) struct Sink {
    gate: watch::Sender<Gate>,
    /// Cancelled when another client takes over.
    taken_over: CancellationToken,
}

#[derive(Debug)]
enum Gate {
    /// The kept output must be sent first.
    Waiting,
    Open(Sender),
    Closed,
}

impl Sink {
    fn new() -> Arc<Self> {
        Arc::new(Self { gate: watch::Sender::new(Gate::Waiting), taken_over: CancellationToken::new() })
    }

    /// Sends output, once the kept output was sent; does nothing if the client is gone.
    pub(super) async fn deliver(&self, at: u8, bytes: &[u8]) {
        let mut gate = self.gate.subscribe();
        let sender = match gate.wait_for(|gate| !matches!(gate, Gate::Waiting)).await {
            Ok(gate) => match &*gate {
                Gate::Open(sender) => sender.clone(),
                Gate::Waiting | Gate::Closed => return,
            },
            Err(_) => return,
        };
        // The task that serves the stream notices the failure.
        let _ = send(&sender, at, bytes).await;
    }

    /// Sends nothing more.
    fn close(&self) {
        if let Gate::Open(sender) = self.gate.send_replace(Gate::Closed) {
            sender.close();
        }
    }
}

async fn send(sender: &Sender, at: u8, bytes: &[u8]) -> Result<(), FrameError> {
    if at == 0 { sender.data(bytes).await } else { sender.stderr(bytes).await }
}

/// How a stream ended.
enum End {
    /// The command has ended, and all its output was sent.
    Command,
    /// The host detached, or another client took over.
    Detached,
    /// The host has disconnected.
    Gone,
}

impl Table {
    /// Serves a stream of a command until it ends.
    pub(crate) async fn stream(self: &Arc<Self>, socket: OwnedFd, opening: Opening, settings: Settings) {
        let Opening { client, open, .. } = opening;
        let attached = match open {
            Open::Exec(exec) => self.exec(*exec, client, &settings),
            Open::Attach(attach) => self.attach(&attach),
            Open::Tcp(_) | Open::TreeIn(_) | Open::TreeOut(_) => {
                Err(agent_failed("this stream is not for a command"))
            }
        };
        // A host that has disconnected needs no answer.
        let _ = match attached {
            Ok(attached) => attached.serve(socket).await,
            Err(error) => agent::refuse(socket, error).await,
        };
    }

    fn exec(
        self: &Arc<Self>,
        exec: ExecOpening,
        client: Option<String>,
        settings: &Settings,
    ) -> Result<Attached, ToolError> {
        let (mut order, limits) = order(exec.start)?;
        order.login_shell = exec.login_shell;
        let command = self.start(order, limits, Whose { client, ..Whose::default() }, settings)?;
        // Nothing of its output has been read yet: other tasks of this thread do that.
        Ok(Attached::exactly(command, None))
    }

    fn attach(self: &Arc<Self>, attach: &AttachOpening) -> Result<Attached, ToolError> {
        let command = self.find(attach.id)?;
        let is_free = command.exact().is_none();
        if attach.write && (is_free || attach.take_over) {
            return Ok(Attached::exactly(command, attach.scroll_back));
        }
        let from = command.streams.each_ref().map(|stream| start(stream, attach.scroll_back));
        Ok(Attached { command, sink: None, kept: Default::default(), from })
    }
}

/// Returns the offset of the newest `most` kept bytes of a stream.
fn start(stream: &Stream, most: Option<u64>) -> u64 {
    let kept = stream.kept();
    let all = if kept.gap().is_empty() { 0 } else { kept.gap().end };
    most.map_or(all, |most| all.max(kept.total().saturating_sub(most)))
}

/// A command with an attached client.
struct Attached {
    command: Arc<Command>,
    /// Gets every byte of the output; `None` for a client that only watches.
    sink: Option<Arc<Sink>>,
    /// The kept output of each stream, sent before the sink opens.
    kept: [Vec<u8>; 2],
    /// The offset in each stream after the kept output, or where a watcher starts.
    from: [u64; 2],
}

impl Attached {
    /// Attaches as the sink that gets every byte, in place of the earlier one.
    fn exactly(command: Arc<Command>, scroll_back: Option<u64>) -> Self {
        let sink = Sink::new();
        let (kept, from) = {
            let mut exact = command.exact();
            if let Some(before) = exact.replace(sink.clone()) {
                before.taken_over.cancel();
                before.close();
            }
            let streams = command.streams.each_ref();
            let kept = streams.map(|stream| {
                let from = start(stream, scroll_back);
                stream.kept().read(from, usize::MAX).1
            });
            (kept, streams.map(|stream| stream.kept().total()))
        };
        Self { command, sink: Some(sink), kept, from }
    }

    async fn serve(self, socket: OwnedFd) -> std::io::Result<()> {
        let command = self.command.clone();
        let detaching = Detaching(self.sink.clone(), command.clone());
        let writer = self.sink.is_some() && command.input.try_lock().map_or(true, |input| input.is_some());
        let tty = command.terminal.is_some();
        let opened = Opened { command_id: Some(command.id), tty, writer, ..Opened::default() };
        let _hanging_up = HangingUp(socket.try_clone()?);
        let (mut receiver, sender) = agent::accept(socket, opened).await?;

        let (inputs, waiting) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let writes = self.sink.is_some();
        let feeding = tokio::spawn(feed(command.clone(), writes, waiting, sender.clone(), stop.clone()));
        let taken_over =
            self.sink.as_ref().map_or_else(CancellationToken::new, |sink| sink.taken_over.clone());
        let mut showing = tokio::spawn(self.show(sender.clone()));

        let end = loop {
            // Only cancel-safe futures are polled here: a frame is always written whole.
            let next = tokio::select! {
                biased;
                () = taken_over.cancelled() => break End::Detached,
                shown = &mut showing => {
                    break if shown.is_ok_and(|shown| shown.is_ok()) { End::Command } else { End::Gone };
                }
                next = receiver.next() => next,
            };
            match next {
                Ok(Some(Incoming::Data(bytes) | Incoming::Stderr(bytes))) => {
                    drop(inputs.send(Input::Bytes(bytes)));
                }
                Ok(Some(Incoming::End)) => drop(inputs.send(Input::End)),
                Ok(Some(Incoming::Control(message))) => match control(&command, &message, writes).await {
                    Ok(true) => {}
                    Ok(false) => break End::Detached,
                    Err(error) => {
                        let notice = serde_json::to_vec(&Notice::Refused(error)).unwrap_or_default();
                        if sender.control(&notice).await.is_err() {
                            break End::Gone;
                        }
                    }
                },
                Ok(Some(Incoming::Done(_)) | None) | Err(_) => break End::Gone,
            }
        };
        drop(detaching);
        drop(inputs);
        stop.cancel();
        // Senders of data stop between frames.
        sender.close();
        let done = match end {
            End::Command => Done::Ok(ended(&command)),
            End::Detached => Done::Ok(Ended { detached: true, ..Ended::default() }),
            End::Gone => return Ok(()),
        };
        let _ = feeding.await;
        agent::finish(receiver, sender, done).await;
        Ok(())
    }

    /// Sends the output and the end of the command.
    async fn show(self, sender: Sender) -> Result<(), FrameError> {
        let Self { command, sink, kept, from } = self;
        let Some(sink) = sink else { return watch(&command, from, &sender).await };
        for (at, (bytes, stream)) in kept.iter().zip(&command.streams).enumerate() {
            send(&sender, at as u8, bytes).await?;
            stream.was_read(from[at]);
        }
        drop(kept);
        sink.gate.send_if_modified(|gate| {
            let is_waiting = matches!(gate, Gate::Waiting);
            if is_waiting {
                *gate = Gate::Open(sender.clone());
            }
            is_waiting
        });
        command.ended().await;
        // Output of processes that it left behind is no longer sent.
        for stream in &command.streams {
            tokio::select! {
                () = stream.caught_up() => {}
                () = closed(&sink) => return Err(FrameError::Closed),
            }
        }
        if command.streams.iter().all(Stream::is_closed) {
            command.is_delivered.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// Shuts the socket down when dropped, so that no task keeps waiting to write to a host that does not read.
struct HangingUp(OwnedFd);

impl Drop for HangingUp {
    fn drop(&mut self) {
        // The host may have disconnected already.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

async fn closed(sink: &Sink) {
    // The sender lives as long as the sink.
    let _ = sink.gate.subscribe().wait_for(|gate| matches!(gate, Gate::Closed)).await;
}

/// Detaches the sink from the command when dropped; the command continues.
struct Detaching(Option<Arc<Sink>>, Arc<Command>);

impl Drop for Detaching {
    fn drop(&mut self) {
        let Self(Some(sink), command) = self else { return };
        let mut exact = command.exact();
        if exact.as_ref().is_some_and(|other| Arc::ptr_eq(other, sink)) {
            *exact = None;
        }
        sink.close();
    }
}

/// Sends kept and new output as fast as the client reads it; returns once the command has ended and everything was sent.
async fn watch(command: &Command, mut from: [u64; 2], sender: &Sender) -> Result<(), FrameError> {
    let mut news = command.watch();
    let mut until = None;
    loop {
        news.mark_unchanged();
        if until.is_none() && !command.is_running() {
            until = Some(command.streams.each_ref().map(|stream| stream.kept().total()));
        }
        let mut has_shown = false;
        for (at, stream) in command.streams.iter().enumerate() {
            let most = until.map_or(PIECE, |until| PIECE.min(until[at].saturating_sub(from[at]) as usize));
            let (start, bytes) = stream.kept().read(from[at], most);
            if start > from[at] {
                let notice = Notice::Missed { bytes: start - from[at] };
                sender.control(&serde_json::to_vec(&notice).unwrap_or_default()).await?;
            }
            send(sender, at as u8, &bytes).await?;
            from[at] = start + bytes.len() as u64;
            has_shown |= !bytes.is_empty();
        }
        if has_shown {
            continue;
        }
        if until.is_some() {
            return Ok(());
        }
        // The command was dropped, so it can be watched no longer.
        news.changed().await.map_err(|_| FrameError::Closed)?;
    }
}

/// Input for a command.
enum Input {
    Bytes(Bytes),
    End,
}

/// Writes input to a command. Input that the command no longer accepts is discarded, as by a closed pipe.
async fn feed(
    command: Arc<Command>,
    writes: bool,
    mut waiting: mpsc::UnboundedReceiver<Input>,
    sender: Sender,
    stop: CancellationToken,
) {
    while let Some(input) = waiting.recv().await {
        if stop.is_cancelled() {
            return;
        }
        match input {
            Input::Bytes(bytes) => {
                if writes {
                    write(&command, &bytes, &stop).await;
                }
                let _ = sender.took(bytes.len()).await;
            }
            Input::End if !writes => {}
            Input::End if command.terminal.is_some() => write(&command, b"\x04", &stop).await,
            Input::End => tokio::select! {
                mut input = command.input.lock() => *input = None,
                () = stop.cancelled() => {}
            },
        }
    }
}

async fn write(command: &Command, mut bytes: &[u8], stop: &CancellationToken) {
    let writing = async {
        // The input from the start of the command goes first.
        let mut input = command.input.lock().await;
        while !bytes.is_empty() {
            let Some(end) = input.as_ref() else { return };
            match end.write(bytes).await {
                Ok(written) => bytes = &bytes[written..],
                Err(_) => *input = None,
            }
        }
    };
    tokio::select! {
        () = writing => {}
        () = command.ended() => {}
        () = stop.cancelled() => {}
    }
}

/// Handles a control frame; returns `false` if the stream should end.
async fn control(command: &Arc<Command>, message: &[u8], writes: bool) -> Result<bool, ToolError> {
    let control: Control = serde_json::from_slice(message)
        .map_err(|error| ToolError::invalid(format!("control frame: {error}")))?;
    if !writes && control != (Control::Detach {}) {
        let text = "this client only watches the command";
        return Err(ToolError::new(ErrorCode::InputClosed, text).hint("attach with write and take_over"));
    }
    match control {
        Control::Resize { cols, rows } => resize(command, Some(cols), Some(rows))?,
        Control::Signal { signal: text } => {
            let (signal, _) = signal(&text)?;
            command.signal(signal).await;
        }
        Control::Detach {} => return Ok(false),
    }
    Ok(true)
}

fn ended(command: &Command) -> Ended {
    let Some(ending) = command.ending() else { return Ended::default() };
    Ended {
        status: Some(ending.status()),
        signal: ending.signal.map(signal_name),
        timed_out: ending.timed_out,
        ..Ended::default()
    }
}
