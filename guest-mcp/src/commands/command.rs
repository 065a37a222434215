//! One command from its start to its end.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nexus_schema::error::ErrorCode;
use nexus_schema::id::CommandId;
use nexus_schema::tools::command::{CommandEntry, CommandState, Descendants, LogFacts};
use nexus_schema::{Timestamp, ToolError};
use rustix::process::Signal;
use tokio::process::Child;
use tokio::sync::watch;

use super::attach::Sink;
use super::kept::Kept;
use super::launch::Started;
use super::oom;
use super::reading::{self, Log};
use super::streams::End;
use super::table::Table;
use super::tree::Tree;

/// How long a process may take to be gone once it was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a command waits for a reader before its output is dropped after all.
const READER_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a command may live, and how it is ended.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    /// After how long it is killed; `None`: never.
    pub(super) timeout: Option<Duration>,
    /// How long before that it is asked to end.
    pub(super) grace: Duration,
    /// Whether what it leaves running is killed when it ends.
    pub(super) kill_descendants: bool,
    /// How much of each stream is kept, in bytes.
    pub(super) keep: usize,
    /// Whether it waits for its reader rather than that output is dropped.
    pub(super) lossless: bool,
}

/// One of a command's output streams.
#[derive(Debug)]
pub(super) struct Stream {
    kept: Mutex<Kept>,
    /// Where it is read from; `None` once it has ended.
    end: Mutex<Option<End>>,
    /// How far a reader has come who is waited for, and whether one is waited for at all.
    read: watch::Sender<u64>,
    is_paced: AtomicBool,
}

impl Stream {
    fn new(limits: &Limits, end: Option<End>) -> Self {
        let kept = if limits.lossless { Kept::newest(limits.keep) } else { Kept::new(limits.keep) };
        Self {
            kept: Mutex::new(kept),
            end: Mutex::new(end),
            read: watch::Sender::new(0),
            is_paced: AtomicBool::new(limits.lossless),
        }
    }

    fn end(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept of it.
    pub(super) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.end().is_none()
    }

    pub(super) fn close(&self) {
        self.end().take();
        self.kept().end();
        // Whoever waits for a reader to come so far waits for this as well.
        self.read.send_modify(|_| {});
    }

    /// Waits until a reader has all that was written to it by now, or until it has ended.
    pub(super) async fn caught_up(&self) {
        let unread = self.end().as_ref().map_or(0, End::unread);
        let target = self.kept().total() + unread;
        let mut read = self.read.subscribe();
        // The sender lives as long as this.
        let _ = read.wait_for(|read| self.is_closed() || *read >= target).await;
    }

    /// Whether something was written that is not read yet.
    pub(super) fn has_unread(&self) -> bool {
        self.end().as_ref().is_some_and(|end| end.unread() > 0)
    }

    /// A reader has all before `offset`.
    pub(super) fn was_read(&self, offset: u64) {
        self.read.send_if_modified(|read| std::mem::replace(read, (*read).max(offset)) < offset);
    }

    /// Whether it waits for its reader, of which there is none yet.
    pub(super) fn is_full(&self, keep: usize) -> bool {
        let unread = self.kept().total().saturating_sub(*self.read.borrow());
        self.is_paced.load(Ordering::Acquire) && unread >= keep as u64
    }

    /// Waits until there is room for more, and says how much; not for ever for a reader who does not come.
    pub(super) async fn room(&self, keep: usize) -> usize {
        let unread = |read: &u64| self.kept().total().saturating_sub(*read) as usize;
        if !self.is_paced.load(Ordering::Acquire) {
            return usize::MAX;
        }
        let mut read = self.read.subscribe();
        let room =
            async { read.wait_for(|read| unread(read) < keep).await.map_or(0, |read| keep - unread(&read)) };
        match tokio::time::timeout(READER_TIMEOUT, room).await {
            Ok(room @ 1..) => room,
            Ok(0) | Err(_) => {
                self.is_paced.store(false, Ordering::Release);
                usize::MAX
            }
        }
    }
}

/// How a command came to its end.
#[derive(Debug, Clone, Default)]
pub(super) struct Ending {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) timed_out: bool,
    pub(super) duration: Duration,
    pub(super) oom_killed: Vec<String>,
    /// What it left running, when that was last looked at.
    pub(super) left: Descendants,
}

impl Ending {
    /// What a shell says of it.
    pub(super) fn status(&self) -> u8 {
        match (self.code, self.signal) {
            (Some(code), _) => (code & 0xff) as u8,
            (None, Some(signal)) => u8::try_from(signal).unwrap_or(127).saturating_add(128),
            (None, None) => u8::MAX,
        }
    }
}

/// On whose behalf a command runs.
#[derive(Debug, Clone, Default)]
pub(super) struct Whose {
    /// The client that started it.
    pub(super) client: Option<String>,
    /// The service that it is.
    pub(super) service: Option<String>,
}

/// A command.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) id: CommandId,
    pub(super) line: String,
    pub(super) whose: Whose,
    pub(super) user: String,
    pub(super) cwd: String,
    pub(super) begun_at: SystemTime,
    pub(super) begun: Instant,
    /// Standard output, and standard error.
    pub(super) streams: [Stream; 2],
    pub(super) log: Option<Log>,
    /// Its terminal.
    pub(super) terminal: Option<End>,
    /// Where its input goes, until that is closed.
    pub(super) input: tokio::sync::Mutex<Option<End>>,
    /// Who gets its output to the byte: it waits for them. Locked before what is kept.
    pub(super) exact: Mutex<Option<Arc<Sink>>>,
    pub(super) tree: Tree,
    pub(super) limits: Limits,
    /// Which stream was written to last.
    pub(super) newest: AtomicU8,
    /// Bytes that came so far, also of those that nobody wants any more.
    pub(super) seen: AtomicU64,
    /// Whether a reply had all of its output, so that it need not be kept for long.
    pub(super) is_delivered: AtomicBool,
    /// Whether a call has sent it a signal that ends it.
    pub(super) was_told_to_end: AtomicBool,
    /// Whether nobody can ask for it any more.
    pub(super) is_forgotten: AtomicBool,
    ending: Mutex<Option<Ending>>,
    ended_at: Mutex<Option<Instant>>,
    /// Grows with all that happens.
    changed: watch::Sender<u64>,
}

impl Command {
    /// Takes care of a command that was started, until its end.
    pub(super) fn live(
        table: &Arc<Table>,
        id: CommandId,
        whose: Whose,
        started: Started,
        limits: Limits,
        stdin_open: bool,
        memory: oom::Before,
    ) -> Arc<Self> {
        let Started { child, tree, line, cwd, user, ends, input, log } = started;
        let terminal = ends.stdin.clone().filter(End::is_terminal);
        let stdin_open = stdin_open || terminal.is_some();
        let command = Arc::new(Self {
            id,
            line,
            whose,
            user,
            cwd,
            begun_at: SystemTime::now(),
            begun: Instant::now(),
            streams: [
                Stream::new(&limits, Some(ends.stdout.clone())),
                Stream::new(&limits, ends.stderr.clone()),
            ],
            log: log.map(Log::new),
            terminal,
            input: tokio::sync::Mutex::new(ends.stdin),
            exact: Mutex::default(),
            tree,
            limits,
            newest: AtomicU8::new(0),
            seen: AtomicU64::new(0),
            is_delivered: AtomicBool::new(false),
            was_told_to_end: AtomicBool::new(false),
            is_forgotten: AtomicBool::new(false),
            ending: Mutex::default(),
            ended_at: Mutex::default(),
            changed: watch::Sender::new(0),
        });
        table.add(&command);
        for (at, end) in [(0, Some(ends.stdout)), (1, ends.stderr)] {
            if let Some(end) = end {
                tokio::spawn(reading::read(end, command.clone(), at, table.clone()));
            }
        }
        if let Some(input) = input {
            tokio::spawn(feed(command.clone(), input, stdin_open));
        }
        tokio::spawn(watch_over(child, command.clone(), table.clone(), memory));
        command
    }

    /// Who gets its output to the byte.
    pub(super) fn exact(&self) -> MutexGuard<'_, Option<Arc<Sink>>> {
        self.exact.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all who wait that something happened.
    pub(super) fn changed(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Watches for what happens.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// How it ended, once it has.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When it ended.
    pub(super) fn ended_at(&self) -> Option<Instant> {
        *self.ended_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its main process runs.
    pub(super) fn is_running(&self) -> bool {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) {
        let mut watch = self.watch();
        // The sender lives as long as this.
        let _ = watch.wait_for(|_| !self.is_running()).await;
    }

    /// Kills all of it.
    pub(super) async fn kill(self: &Arc<Self>) {
        self.tree.signal_group(Signal::KILL);
        // Without a thread for it, which there may be no memory for.
        if self.tree.kill_at_once() {
            return;
        }
        let this = self.clone();
        // To look for what belongs to it may take a moment on a busy machine.
        let _ = tokio::task::spawn_blocking(move || this.tree.kill()).await;
    }

    /// Kills all of it, and waits until it has ended.
    pub(super) async fn kill_to_the_end(self: &Arc<Self>) -> Result<(), ToolError> {
        let gone = tokio::time::timeout(KILL_TIMEOUT, async {
            self.kill().await;
            self.ended().await;
        });
        gone.await.map_err(|_| {
            ToolError::new(ErrorCode::Timeout, "the command hangs in the kernel and could not be killed")
        })
    }

    /// Sends a signal: to its group while it runs, to all that is left of it afterwards.
    pub(super) async fn signal(self: &Arc<Self>, signal: Signal) {
        if signal == Signal::KILL {
            return self.kill().await;
        }
        if self.is_running() {
            return self.tree.signal_group(signal);
        }
        let this = self.clone();
        let _ = tokio::task::spawn_blocking(move || this.tree.signal_all(signal)).await;
    }

    /// What it has left running, looked at anew.
    pub(super) async fn left(self: &Arc<Self>) -> Option<Descendants> {
        let ending = self.ending()?;
        if ending.left.count == 0 {
            return None;
        }
        let left = self.look_for_left().await;
        if let Some(ending) = &mut *self.ending.lock().unwrap_or_else(PoisonError::into_inner) {
            ending.left = left.clone();
        }
        if left.count == 0 {
            self.tree.release();
        }
        (left.count > 0).then_some(left)
    }

    async fn look_for_left(self: &Arc<Self>) -> Descendants {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.tree.left()).await.unwrap_or_default()
    }

    /// The file that gets all output.
    pub(super) fn log_facts(&self) -> Option<LogFacts> {
        self.log.as_ref().map(Log::facts)
    }

    /// It in a list.
    pub(super) fn entry(&self) -> CommandEntry {
        let ending = self.ending();
        let duration = ending.as_ref().map_or_else(|| self.begun.elapsed(), |ending| ending.duration);
        CommandEntry {
            command_id: self.id,
            command: self.line.clone(),
            client: self.whose.client.clone(),
            service: self.whose.service.clone(),
            started_at: Timestamp::from(self.begun_at),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            pid: self.tree.root().as_raw_nonzero().get().cast_unsigned(),
            tty: self.terminal.is_some(),
            state: if ending.is_some() { CommandState::Ended } else { CommandState::Running },
            status: ending.as_ref().map(Ending::status),
            timed_out: ending.as_ref().is_some_and(|ending| ending.timed_out),
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            output_bytes: self.streams.iter().map(|stream| stream.kept().total()).sum(),
            descendants: ending.map(|ending| ending.left).filter(|left| left.count > 0),
            problem: None,
        }
    }
}

/// Waits for a command's process, ends it when its time is up, and writes down how it ended.
async fn watch_over(mut child: Child, command: Arc<Command>, table: Arc<Table>, memory: oom::Before) {
    let limits = command.limits;
    let time_is_up = async {
        match limits.timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let mut timed_out = false;
    let status = tokio::select! {
        // A command that ended in time has ended in time.
        biased;
        status = child.wait() => status,
        () = time_is_up => {
            timed_out = true;
            let ended = if limits.grace.is_zero() {
                None
            } else {
                command.tree.signal_group(Signal::TERM);
                let this = command.clone();
                let _ = tokio::task::spawn_blocking(move || this.tree.signal_all(Signal::TERM)).await;
                tokio::time::timeout(limits.grace, child.wait()).await.ok()
            };
            match ended {
                // What did not heed it is killed all the same.
                Some(status) => {
                    command.tree.reaped();
                    command.kill().await;
                    status
                }
                None => {
                    command.kill().await;
                    child.wait().await
                }
            }
        }
    };
    command.tree.reaped();
    let duration = command.begun.elapsed();
    // Only if something else reaped it: there is no status then, but it is gone.
    let status = status.unwrap_or_else(|_: std::io::Error| ExitStatus::default());
    if limits.kill_descendants {
        command.kill().await;
    }
    reading::drain(&command).await;
    let oom_killed = memory.killed_since().await;
    let left = command.look_for_left().await;
    if left.count == 0 {
        command.tree.release();
        // An input that is being fed is let go of by that.
        if let Ok(mut input) = command.input.try_lock() {
            *input = None;
        }
    }
    let ending =
        Ending { code: status.code(), signal: status.signal(), timed_out, duration, oom_killed, left };
    *command.ended_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    *command.ending.lock().unwrap_or_else(PoisonError::into_inner) = Some(ending);
    command.changed();
    table.ended(&command);
}

/// Writes what a command reads first; one that does not want it is no failure.
async fn feed(command: Arc<Command>, bytes: Vec<u8>, stays_open: bool) {
    let mut input = command.input.lock().await;
    let Some(end) = input.as_ref() else { return };
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let written = tokio::select! {
            written = end.write(rest) => written,
            () = command.ended() => break,
        };
        match written {
            Ok(written) => rest = &rest[written..],
            Err(_) => break,
        }
    }
    if !stays_open {
        *input = None;
    }
}
