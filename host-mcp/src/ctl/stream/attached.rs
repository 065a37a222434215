//! Attaches to a command in a VM: handles its input, its output, signals, and its end.
//!
//! ```text
//! stdin thread ──> typing ──────────────┐
//! signals, resizes ──> speaking ────────┼──> frames ──> VM
//!                        ^ took         │
//! stdout thread <── the loop in `run` <─┴── frames <── VM
//! ```
//! The loop waits for any next event, so an interrupt is always handled.

use std::io;
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::id::CommandId;
use nexus_schema::stream::{Control, Done, Ended, Notice};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::Stream;
use super::keys::DetachKeys;
use super::pipes::{Output, To, input};
use super::terminal::{RawMode, size};
use crate::ctl::App;
use crate::ctl::error::{Error, Refusal};
use crate::ctl::format;
use crate::ctl::hint::About;
use crate::duplex::Writer;
use crate::frames::{Incoming, Sender};

/// After this many interrupts without effect, nexusctl exits by itself.
const INTERRUPTS_MAX: u32 = 3;
/// How long a command whose output cannot be written may continue before it is killed, and how long killing it may take.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(2);

/// An attached client.
pub(crate) struct Attached<'a> {
    pub(crate) app: &'a App,
    pub(crate) vm: String,
    pub(crate) stream: Stream,
    /// Whether standard input is passed on.
    pub(crate) input: bool,
    /// Whether the command has a terminal for its input.
    pub(crate) tty: bool,
    pub(crate) keys: DetachKeys,
}

/// How it ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The command has ended.
    Ended(Ended),
    /// It continues without this client.
    Detached {
        /// Its id.
        command: Option<CommandId>,
        /// Whether another client took over.
        is_taken_over: bool,
    },
}

/// Messages to the VM other than input.
enum Word {
    Control(Control),
    Took(usize),
}

impl Attached<'_> {
    /// Stays attached until the end.
    pub(crate) async fn run(self) -> Result<Outcome, Error> {
        let Self { app, vm, stream, input, tty, keys } = self;
        let Stream { opened, mut receiver, sender } = stream;
        let command = opened.command_id;
        let mut signals = Signals::listen()?;
        // Dropped last, however this ends.
        let raw = (tty && input).then(RawMode::begin).flatten();
        let (words, waiting) = mpsc::unbounded_channel();
        tokio::spawn(speak(sender.clone(), waiting));
        let (leave, mut leaving) = mpsc::channel(1);
        if input {
            tokio::spawn(type_in(sender, raw.is_some().then_some(keys), leave));
        } else {
            drop(leave);
        }
        let say = |control| drop(words.send(Word::Control(control)));
        if let (true, Some((cols, rows))) = (tty, size()) {
            say(Control::Resize { cols, rows });
        }
        let mut output = Output::start();
        let (mut unwritten, mut interrupts) = (0, 0);
        let (mut done, mut broken, mut is_leaving) = (None, None::<io::Error>, false);
        let (mut deadline, mut is_killed) = (None, false);
        loop {
            if unwritten == 0
                && let Some(done) = done.take()
            {
                return match broken {
                    Some(source) => Err(Error::Output { source }),
                    None => ended(done, &vm, command, is_leaving),
                };
            }
            tokio::select! {
                biased;
                signal = signals.next() => match signal {
                    Happened::Resized => if let (true, Some((cols, rows))) = (tty, size()) {
                        say(Control::Resize { cols, rows });
                    },
                    // The terminal was closed, or somebody wants this program to end: the command is not affected.
                    Happened::Signal("TERM" | "HUP") if tty => return Err(Error::Interrupted),
                    Happened::Signal(name) => {
                        interrupts += u32::from(name == "INT");
                        if interrupts >= INTERRUPTS_MAX || done.is_some() {
                            return Err(Error::Interrupted);
                        }
                        say(Control::Signal { signal: name.to_owned() });
                    }
                },
                Some(written) = output.written.recv() => match written {
                    Ok(length) => {
                        unwritten -= length;
                        drop(words.send(Word::Took(length)));
                    }
                    Err(error) => {
                        // As in a shell, a program that writes to a closed pipe is terminated.
                        say(Control::Signal { signal: "PIPE".into() });
                        deadline = Some(Instant::now() + UNREAD_TIMEOUT);
                        (broken, unwritten) = (Some(error), 0);
                    }
                },
                next = receiver.next(), if done.is_none() => match next {
                    Ok(Some(Incoming::Data(bytes) | Incoming::Stderr(bytes))) if broken.is_some() => {
                        drop(words.send(Word::Took(bytes.len())));
                    }
                    Ok(Some(Incoming::Data(bytes))) => {
                        unwritten += bytes.len();
                        output.put(To::Stdout, bytes);
                    }
                    Ok(Some(Incoming::Stderr(bytes))) => {
                        unwritten += bytes.len();
                        output.put(To::Stderr, bytes);
                    }
                    Ok(Some(Incoming::Control(notice))) => notify(app, &notice),
                    Ok(Some(Incoming::End)) => {}
                    Ok(Some(Incoming::Done(message))) => {
                        let garbled = |source| Error::Garbled { during: "a stream".into(), source };
                        done = Some(serde_json::from_slice::<Done>(&message).map_err(garbled)?);
                    }
                    Ok(None) => return Err(cut(vm, command, None)),
                    Err(error) => return Err(cut(vm, command, Some(error.into()))),
                },
                Some(left) = leaving.recv() => match left {
                    Left::Detached => {
                        is_leaving = true;
                        say(Control::Detach {});
                    }
                    Left::Failed(source) => return Err(Error::Input { source }),
                },
                () = until(deadline) => {
                    if std::mem::replace(&mut is_killed, true) && let Some(source) = broken.take() {
                        // If even that has no effect, it is left alone.
                        return Err(Error::Output { source });
                    }
                    say(Control::Signal { signal: "KILL".into() });
                    deadline = Some(Instant::now() + UNREAD_TIMEOUT);
                }
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn ended(done: Done, vm: &str, command: Option<CommandId>, is_leaving: bool) -> Result<Outcome, Error> {
    match done {
        Done::Ok(Ended { detached: true, .. }) => {
            Ok(Outcome::Detached { command, is_taken_over: !is_leaving })
        }
        Done::Ok(ended) => Ok(Outcome::Ended(ended)),
        Done::Error(error) if error.code.may_be_of_guest() => {
            let error =
                ToolError { message: tame(&error.message), hint: error.hint.as_deref().map(tame), ..error };
            Err(Error::Guest(Refusal { error, about: About::subject("command_start", Some(vm)) }))
        }
        Done::Error(_) => Err(ToolError::new(
            ErrorCode::GuestMisbehaved,
            format!("{vm} ended the stream with an invalid final message"),
        )
        .into()),
    }
}

/// A guest's text without control characters, shortened.
fn tame(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').take(2000).collect()
}

fn cut(
    vm: String,
    command: Option<CommandId>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::Cut { vm, command: command.map(|id| id.to_string()), source }
}

/// Prints a guest's notice if it is important.
fn notify(app: &App, notice: &[u8]) {
    match serde_json::from_slice(notice) {
        Ok(Notice::Missed { bytes }) => app.ui.warn(&format!("{} of output lost", format::size(bytes))),
        Ok(Notice::Refused(error)) => app.ui.warn(&tame(&error.message)),
        // Newer guests may send other notices.
        Ok(Notice::Writer { .. }) | Err(_) => {}
    }
}

async fn speak(sender: Sender<Writer>, mut words: mpsc::UnboundedReceiver<Word>) {
    while let Some(word) = words.recv().await {
        let sent = match word {
            Word::Control(control) => sender.control(&serde_json::to_vec(&control).unwrap_or_default()).await,
            Word::Took(bytes) => sender.took(bytes).await,
        };
        // The reading side reports why.
        if sent.is_err() {
            return;
        }
    }
}

/// Why typing ended before the end of input.
enum Left {
    /// The detach keys were typed.
    Detached,
    /// Standard input cannot be read.
    Failed(io::Error),
}

async fn type_in(sender: Sender<Writer>, mut keys: Option<DetachKeys>, leave: mpsc::Sender<Left>) {
    let mut pieces = input();
    while let Some(piece) = pieces.recv().await {
        let (bytes, detached) = match piece {
            Err(error) => {
                let _ = leave.send(Left::Failed(error)).await;
                return;
            }
            Ok(bytes) => match &mut keys {
                Some(keys) => keys.pass(&bytes),
                None => (bytes, false),
            },
        };
        // The reading side reports why it cannot be sent.
        if sender.data(&bytes).await.is_err() {
            return;
        }
        if detached {
            let _ = leave.send(Left::Detached).await;
            return;
        }
    }
    let _ = sender.end().await;
}

/// Signals to this process.
struct Signals {
    all: [(&'static str, Signal); 4],
    resized: Signal,
}

enum Happened {
    Signal(&'static str),
    Resized,
}

impl Signals {
    fn listen() -> Result<Self, Error> {
        let listen = |kind| signal(kind).map_err(|source| Error::Input { source });
        Ok(Self {
            all: [
                ("INT", listen(SignalKind::interrupt())?),
                ("TERM", listen(SignalKind::terminate())?),
                ("HUP", listen(SignalKind::hangup())?),
                ("QUIT", listen(SignalKind::quit())?),
            ],
            resized: listen(SignalKind::window_change())?,
        })
    }

    async fn next(&mut self) -> Happened {
        let [(int, interrupt), (term, terminate), (hup, hangup), (quit, quits)] = &mut self.all;
        tokio::select! {
            _ = interrupt.recv() => Happened::Signal(int),
            _ = terminate.recv() => Happened::Signal(term),
            _ = hangup.recv() => Happened::Signal(hup),
            _ = quits.recv() => Happened::Signal(quit),
            _ = self.resized.recv() => Happened::Resized,
        }
    }
}
